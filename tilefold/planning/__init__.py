"""The parts of the plans of all backends.

plan      the types that all plans share: a plan, and scratch
kernels   what a kernel reads, writes and multiplies: the rows of `KERNELS`
visited   block rows by weight, and how keys are split
masked    a problem whose mask is bound: its expression, and the tiles that kernels visit
entries   who adds what to the gradients of a score's arrays, on GPUs
tiles     runs as whole tiles, for the GPUs
roofline  how fast a problem can be at most
"""
