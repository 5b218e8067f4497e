"""Metal kernels on the CPU: the parts of `tilefold.backends.metal.emulate`."""
