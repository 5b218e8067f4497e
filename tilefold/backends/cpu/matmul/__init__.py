"""Products of matrices on processors.

spec         kernels as values
arguments    their argument blocks
panels       parts of A and B in the order in which products read them
tile         register tiles
activation   functions of sums
finish       results from sums
gemm         the kernels
few_rows     the kernel of products with few rows of A
blocks       units, register tiles and blocks
tuned        blocks that were measured on this machine
few_rows_plan  the same for few rows of A, read where B lies
plan         kernel and blocks of a product, and what is packed before
calls        products prepared for operands, and run
widen        codes of quantised matrices, widened in registers
quantized    the kernel of products of few rows with them
quantized_blocks  the kernel for many rows
quantized_integers  the kernels where rows are rounded to integers
quantized_fours  the same on AVX2, where rows are split
quantized_digits  the kernel of one row and codes of 4 bits, by exact sums on AVX2
quantized_calls  these products, prepared and run
"""
