"""Triton's generators. Read forward, then what `tilefold inspect --backend triton` prints.

text              lines and blocks of Triton source
storage           how elements lie in memory, and how they are read and written
dropout           which pairs of a tile stay
mask              the text fold of a rule and of a score
arguments         the arguments of a kernel
frame             what stands around every kernel, and its walks over tiles
scores            scores from products, dS from P and dP
softmax           the running softmax
forward           the forward pass
backward          delta, dQ, and dK with dV
fused             the backward pass in one kernel
inputs            the gradient of an array that a score reads
decode            the forward pass of few queries
gluon             what kernels in Gluon are made of
hopper_nonfinite  Hopper's slow way through values that are not finite
hopper_launch     what a launch sees of Hopper's kernel
hopper            the forward pass of Hopper
"""
