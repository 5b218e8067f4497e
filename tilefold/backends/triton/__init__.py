"""GPUs of NVIDIA and AMD: kernels in Triton, and in Gluon for Hopper.

spec           all that decides a kernel's source
architectures  GPUs and their limits
resources      what blocks take of a multiprocessor
datasheets     what chips reach at most
tables         blocks of the kernels
heuristics     the planner's other constants, as a value
kernels        everything that writes source
tuned          blocks that were measured on this machine
choice         the blocks of a kernel: a row of the tables, made to fit
source         spec to source
module         source to a function of Triton's
launch         what a plan holds and says
inputs         which programs share the entries of an array that a score reads
plan           problem to kernels, programs and scratch
machine        what runs kernels, as a protocol
interpreter    Triton's interpreter, as a machine
runtime        the GPU, through PyTorch
finish         gradients of sinks and of the arrays of a score, finished by torch
dispatch       a plan made ready for tensors, and run
calls          GPUs as machines, and calls on one of them
matmul         products of matrices and softmax of rows, as kernels of their own
autotune       the fastest blocks, measured
listing        what the compiler reports
ahead          compiling without a GPU
"""
