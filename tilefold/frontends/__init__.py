"""Arrays of a framework to a call of a backend, and back: one file a framework.

numpy      NumPy arrays, and whatever shares its memory with them
gpu        tensors on GPUs
tensors    PyTorch tensors below autograd
operators  PyTorch's operators, for `torch.compile`
torch      PyTorch tensors with autograd
"""
