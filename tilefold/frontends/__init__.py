"""One file per framework: arrays to Buffers and back."""
