"""Metal's generators. Read products, then forward.

storage    how elements lie in memory, and how they are read and written
msl        lines and blocks of Metal source
fragment   the 8 x 8 matrix that a simdgroup multiplies
matmul2d   the product of Metal 4
arguments  the arguments of a kernel
mask       the text fold of a rule
dropout    which pairs of a tile stay
frame      what stands around every kernel
tile       reading a traversed operand
products   the two products, three blocks
scores     scores from products, dS from P and dP
sinks      what takes weight and gives nothing
softmax    the running softmax
forward    the forward pass
backward   dQ, and dK with dV
decode     the forward pass of few queries
inputs     the gradients of the arrays that a score reads
tensorops  the forward pass of Metal 4
"""
