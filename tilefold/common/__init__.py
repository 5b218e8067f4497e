"""Rooms that every other room may use; none of them knows anything of attention.

settings       every environment variable, declared once
check          checks of single arguments
foreign_arrays  arrays of frameworks that are not imported
copies         copies of frozen values
imports        why an optional package cannot be imported
computed       properties that are computed once
first_use      work of a first call that neither fork nor signal cuts in two
ending         visits from threads of other libraries, and the end of the interpreter
files          files that are written whole or not at all
lru            a store that keeps the newest values
single_flight  values that are made once, however many threads ask
generation     how often the choices of planners changed in this process
reproducible   how far results are the same bits
array_files    arrays in files
disk_cache     compiled kernels on disk, and which files are trusted
tuned_store    block sizes tuned on this machine, in a file beside the kernels
"""
