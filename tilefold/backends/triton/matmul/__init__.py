"""Products of matrices and softmax of rows on GPUs of NVIDIA and AMD.

activation  functions applied to each element of a result
codes       weights of a quantised matrix, widened from their codes
gemm        the kernel of a product
rows        the kernel of a softmax
operands    tensors as the kernels see them
tables      blocks of products
calls       tensors to launches
quantized   calls with quantised matrices
"""
