"""The command line, a file per command. Each has `register` (its options) and `main` (its work)."""
