"""Attention as Metal Shading Language, written at run time for Apple GPUs."""
