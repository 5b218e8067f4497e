"""One folder a device, each with the same rooms.

cpu     processors, by LLVM
metal   Apple GPUs, by Metal
triton  GPUs of NVIDIA and AMD, by Triton
"""
