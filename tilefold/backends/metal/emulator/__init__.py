"""The parts of the emulator, which runs Metal kernels on the CPU through a C++ compiler.

fault      the exception of a faulty kernel
signature  a kernel's parameters, read from its source
arguments  the arguments of a launch in memory
toolchain  the C++ compiler, and the cache of its results
launch     one launch, in a process of its own
"""
