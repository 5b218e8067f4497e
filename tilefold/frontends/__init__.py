"""Frontends turn a framework's arrays into calls of a backend, one file for each framework.

foreign      objects that NumPy can view, and why it cannot view others
numpy        NumPy arrays, and objects that share memory with them
standard     arrays of other libraries that follow the array API standard
tensors      PyTorch tensors below autograd
observed     who observes operations on PyTorch tensors
outside      functions that a compiler runs outside of its graphs
spelled      requests spelled in plain constants, for `torch.compile`
written      requests as text that outlives the process
operation    what a graph of another framework computes
xla          the functions that XLA calls, of JAX and of TensorFlow
operators    PyTorch's operators, for `torch.compile`
derivatives  second derivatives and forward mode of PyTorch tensors
joined       results over disjoint keys, joined by PyTorch's operations
transforms   PyTorch tensors in the transforms of `torch.func`, and dual numbers
extended     PyTorch tensors beside q, k and v
torch        PyTorch tensors with autograd
jax          JAX arrays
tensorflow   TensorFlow tensors: operators of its graphs, with gradients
registry     the frontend of arrays, by their class
"""
