"""What is timed, against whom, how, and which blocks are the fastest.

environment        machine, versions and commit of a measurement
workload           what is timed
baselines          the libraries that are measured beside tilefold
agreement          how far apart all implementations are
timing             turn by turn in one process
tuning             the fastest blocks of this machine
metal_selftest     every kernel tested on a Mac
metal_utilisation  every kernel measured on a Mac
"""
