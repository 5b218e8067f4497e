"""Products of matrices as public operations, and matrices of few bits per element.

places     where arrays lie in memory, and what shares a byte with a result
plans      a call of a product without its arrays: what it means, and its kernel made ready
packed     matrices that stay, packed once
repeated   calls that were made before, by the shortest way
derivatives  gradients and tangents of a product, made of products
torch      PyTorch tensors: gradients, compilers and transforms
calls      `tilefold.gemm` and `pack`, and their NumPy arrays
schemes    the schemes of quantised matrices, and how their codes lie in memory
palettes   the 64 values of a palette: k-means of one dimension
quantized  a quantised matrix: made from an array, widened again
files      quantised matrices in files, in the format of safetensors
quantized_calls  `tilefold.qgemm`, and its NumPy arrays
quantized_torch  its tensors and gradients
linear  linear layers of torch with quantised matrices, and `quantize_`
"""
