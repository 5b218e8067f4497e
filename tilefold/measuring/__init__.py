"""Measurements: workloads, baselines, timing, tuning, and tests of Metal kernels on a Mac.

environment        machine, versions and commit of a measurement
workload           the cases that are timed, and their arrays
products           products as cases, and their lower bounds
openvino_model     models of one operator that OpenVINO runs
baselines          the libraries that are measured beside tilefold
roofline_share     how near a result comes to the measured roofline
agreement          the differences between all implementations
timing             times of implementations, turn by turn in one process
apart              times of implementations in processes of their own, warm and cold
stages             where the time of a call goes
product_timing     times of products, turn by turn
tuning             the fastest block sizes of this machine
product_tuning     the fastest blocks of products on this machine
metal_selftest     every kernel tested on a Mac
metal_utilisation  every kernel measured on a Mac
"""
