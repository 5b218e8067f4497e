"""The backends: one folder for each kind of device, all with the same rooms.

protocols  the functions of arrays, machines and backends that a call uses
arrays     arrays of NumPy and PyTorch, as calls see them
registry   the backends by name, and the machine of a device
extra      arrays beside q, k and v: what a score reads, sinks, a seed
calls      from arrays to launches, looked up or prepared
launching  integers and data of launches on GPUs
matmul     products of matrices as kernels of GPUs take them
cpu        processors, by LLVM
metal      Apple GPUs, by Metal
triton     GPUs of NVIDIA and AMD, by Triton
"""
