"""The functions of `protocols.Arrays`, in one file for each framework.

numpy  NumPy arrays
torch  PyTorch tensors
"""
