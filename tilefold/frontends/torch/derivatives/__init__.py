"""Derivatives of PyTorch's calls beyond the first backward pass: second ones, and forward mode.

They are composed of torch's own products, tile by tile: each tile is made of a block of queries and
a block of keys, and tiles that the mask hides are skipped. So no array of len_q x len_k is made.
What pairs read of the arrays of a score is an argument of the tile, so memory is linear in these
arrays. Sums are in float32, or in float64 for such tensors, always in the same order; but a GPU may
add what equal entries of an array get in any order. As in "composed", a hidden key is multiplied by
0, and 0 * NaN is NaN.

walk       the tiles of a mask, and the pairs that it hides in them
modified   modified scores in operations of torch
arguments  what pairs read of arrays, and which of them dropout keeps
tiles      functions of one tile, and how they are differentiated
passes     the passes of attention as such functions, with derivatives written by hand
sums       the sum of such a function over all tiles, differentiable any number of times
formula    a modified score of all pairs at once, as an operation of autograd
attention  derivatives of attention and of its backward pass, as such sums
"""
