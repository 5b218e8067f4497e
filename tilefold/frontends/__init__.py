"""Frontends turn arrays of a framework into calls of a backend: a file or folder each.

foreign       objects that NumPy can view, and why it cannot view others
numpy         NumPy arrays, and objects that share memory with them
standard      arrays of other libraries that follow the array API standard
written       requests as text that outlives the process
operation     what a graph of another framework computes
xla           the functions that XLA calls, of JAX and of TensorFlow
torch         PyTorch tensors, with autograd, compilers and transforms
transformers  models of Hugging Face transformers
jax           JAX arrays
tensorflow    TensorFlow tensors: operators of its graphs, with gradients
registry      the frontend of arrays, by their class
"""
