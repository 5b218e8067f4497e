"""What plans of all backends are made of.

plan      the types that all plans share
kernels   what a kernel reads, writes and multiplies: the rows of `KERNELS`
visited   the tiles that a kernel visits, and how keys are split
tiles     runs as whole tiles, for the GPUs
roofline  how fast a problem can be at most
"""
