"""The sections of `benchmarks/gpu.py`: what each measures, and in which processes."""
