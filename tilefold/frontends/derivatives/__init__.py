"""Derivatives of PyTorch's calls beyond the first backward pass: second ones, and forward mode.

They are composed of torch's own products, tile by tile: each tile is made of a block of queries and
a block of keys, and tiles that the mask hides are skipped. So no array of len_q x len_k is made.
Sums are in float32, or in float64 for such tensors, always in the same order. As in "composed",
a hidden key is multiplied by 0, and 0 * NaN is NaN.

modified   modified scores in operations of torch
walk       the tiles of a mask, and the pairs that it hides in them
tiles      functions of one tile, and how derivatives of them are made
sums       the sum of such a function over all tiles, differentiable any number of times
formula    a modified score of all pairs at once, as an operation of autograd
attention  derivatives of attention and of its backward pass, as such sums
"""
