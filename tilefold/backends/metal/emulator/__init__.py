"""Metal's own part played on the CPU, under a C++ compiler.

fault      what a faulty kernel raises
signature  a kernel's parameters, read from its source
arguments  arrays to pointers
toolchain  the C++ compiler, and what it compiled before
launch     threadgroups, run
"""
