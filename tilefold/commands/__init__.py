"""The command line: one file for each command, and the parts that commands share.

terminal         tables, colours and progress
specification    the options that describe a problem
product_options  the options that describe a product
minilm           the sentence encoder of the main job
main_job         real text through a real transformer
kernel_source    a kernel's source, printed
run              `tilefold run`
saved            the files of a benchmark
bench_product    products measured beside peers
bench            `tilefold bench`
tune_table       what `tilefold tune` measured, as a table
tune_product     `tilefold tune --operation gemm`
tune_gpu         `tilefold tune --device cuda`
tune             `tilefold tune`
product_source   a product's source for GPUs, printed
inspect_product  the plan and the kernels of a product
inspect_stages   where the time of a call goes
inspect          `tilefold inspect`
mask             `tilefold mask`
metal            `tilefold metal`
doctor           `tilefold doctor`
"""
