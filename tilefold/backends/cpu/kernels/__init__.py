"""The CPU's generators. Read microkernel, then forward, which opens with its pseudo-code.

ir           LLVM text: values, instructions, loops
convert      half types to float32 and back
prefetch     memory that is asked for early
masked       vectors of which some lanes exist
storage      how elements lie in memory, and how they are read and written
microkernel  the one product: a register tile
softmax      exponentials and logarithms to base 2
elementary   exp, log, tanh, sigmoid of modified scores
arguments    the argument block
entries      look-ups of a score, for gradients of its arrays
claims       what workers take from shared counters
stages       ticks of the stages of a kernel that counts
work         items of a plan, tiles from its runs
mask         the text fold of a rule and of a modified score
pack         operands turned into the order of the microkernel
ahead        a modified score of a tile, with what is made before its rows
pairs        products of pairs of bfloat16
tile         one tile of scores
dropout      factors of pairs that fall out or stay
amx          products on AMX tiles
scale        the scale in two factors, lse
block        one block of the parallel axis
multiply     products of single elements
products     which of the products a kernel uses
sinks        logits in the sum alone, and their gradients
scores       scores from products, dS from P and dP
forward      the forward pass
mass         sums of the columns of P
backward     delta, dQ, and dK with dV
reduce       sums of parts: of dQ, of gradients of arrays
targets      where the gradients of a score's arrays are added
inputs       gradients of the arrays that a score reads
fused        the backward pass in one kernel
sums         sums of the decode kernel
state        what the decode kernel holds
merge        parts of split keys, joined
decode       the forward pass of few queries
"""
