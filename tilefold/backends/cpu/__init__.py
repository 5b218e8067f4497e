"""The CPU backend: LLVM text, compiled by llvmlite for the features of this machine."""
