"""Apple GPUs: kernels in the Metal Shading Language.

spec      all that decides a kernel's source
families  GPU families and their limits
tables    tuned block sizes
heuristics  the planner's other constants, as a value
kernels   everything that writes source
choice    the blocks of a kernel: a row of the tables, made to fit
source    spec to source
plan      problem to kernels, grids and scratch
modified  what a launch is given of a modified score
emulator  the headers that stand in for Metal's, and the compiler's invocation
emulate   the emulator: Metal source compiled for the CPU
dispatch  a plan made ready for arrays, and run
runtime   the Apple GPU, through PyTorch
calls     Apple GPUs as machines
gated     the gate of Metal 4
commands  lists of calls
matmul    products of matrices and softmax of rows, as kernels of their own
model     instructions that a kernel issues, from what the emulator counts
"""
