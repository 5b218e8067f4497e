"""What calls ask of arrays, one file for each framework, with the functions of `protocols.Arrays`.

numpy  NumPy arrays
torch  PyTorch tensors
"""
