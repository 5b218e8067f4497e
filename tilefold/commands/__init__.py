"""The command line, one file a command.

terminal       tables, colours and progress
specification  shapes and masks as options
minilm         the sentence encoder of the main job
main_job       real text through a real transformer
kernel_source  a kernel's source, printed
run            `tilefold run`
bench          `tilefold bench`
tune_gpu       `tilefold tune --device cuda`
tune           `tilefold tune`
inspect        `tilefold inspect`
mask           `tilefold mask`
metal          `tilefold metal`
doctor         `tilefold doctor`
"""
