"""Products of matrices and softmax of rows on Apple GPUs.

activation  functions applied to each element of a result
spec        the kernel of a product as a value
codes       weights of a quantised matrix, widened from their codes
gemm        the kernel of a product
tiles       the same by Metal 4's matmul2d
rows        the kernel of a softmax
calls       arrays to launches
quantized   calls with quantised matrices
"""
