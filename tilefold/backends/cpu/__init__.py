"""Processors: kernels as LLVM text, compiled by llvmlite.

device    what this machine has: instruction set, cores, caches
spec      all that decides a kernel's source
tables    tuned block sizes
heuristics  the planner's other constants, as a value
partitions  who sums dQ in the fused backward pass
kernels   everything that writes source
runtime   source to machine code
kernel    spec to a loaded function
startable  how many threads the system starts
teams     threads that run one function together
threads   the team of this process, and how many threads a call uses
claims    how many items a worker takes at a time
tuned     block sizes that were measured on this machine
splits    how the keys of few queries are split
choice    a chooser: what multiplies in a kernel, and in which blocks
launches  one kernel of a plan, with its work items
inputs    who sums the gradients of the arrays of a score
plan      problem and device to kernels, work items and runs
growth    the plan of one more key, made from the plan before
dispatch  a plan made ready for arrays, and run
native    a prepared call as a record that runs without Python
records   records from Python
guard     what a call on arrays as they come looks at before its record runs
scan      masks in memory, read for the keys that queries see
matmul    products of matrices
calls     the processor as a machine
peak      what the processor reaches at most, measured
"""
