"""What becomes of the score of a pair before the softmax: the other half of the language of masks.

functions      functions of real numbers that a score may use: exp, tanh, where, table, ...
score          the base of all modifications, modifications in order, and a form without arrays
modifications  softcap, alibi, temperature, bias
relative       biases by relative position: T5's buckets, clipped distances, Swin's windows
traced         modifications of a user's own
repeated       scores of several batches in one
parts          scores of a part of the batch and of the heads
parse          modifications from strings
picture        heat maps of weights

A modification is bound to sizes as a rule is. Its expression is folded to exact values and to
kernel source; `masks/derivative.py` makes the derivative, an expression too.
"""
