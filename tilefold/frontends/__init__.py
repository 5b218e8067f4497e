"""Arrays of a framework to a call of a backend, and back: one file a framework.

numpy      NumPy arrays, and whatever shares its memory with them
tensors    PyTorch tensors below autograd
operators  PyTorch's operators, for `torch.compile`
torch      PyTorch tensors with autograd
registry   the frontend of arrays, by their class
"""
