"""FlexAttention's language: functions of scalar tensors, traced to rules and scores.

symbols      scalar tensors that stand for the score and the indices of a pair
entries      entries of tensors at symbols, and tables of what PyTorch computes
arithmetic   operators between symbols
functions    what PyTorch's functions make of symbols, by their names
tracing      from functions to a rule, a score, and the tensors that they read
requests     from these to requests of kernels, which are kept
block_mask   masks made of functions, and PyTorch's own
attention    `flex_attention`
"""
