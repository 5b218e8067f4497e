"""The functions of `protocols.Arrays`, in one file for each kind of arrays.

numpy  NumPy arrays
described  arrays to come: shape and type alone
torch  PyTorch tensors
"""
