"""Attention maps: the weights of a region, and what keys receive of all queries.

region      the pairs of a region, and what mask and score say of them
numpy       both maps of NumPy arrays
standard    both maps of arrays that follow the array API standard
torch       both maps of PyTorch tensors
jax         both maps of JAX arrays
tensorflow  both maps of TensorFlow tensors
doors       the public functions
"""
