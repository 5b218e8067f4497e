"""PyTorch tensors: calls with autograd, operators for compilers, and transforms.

tensors      calls of kernels below autograd, and the checks of tensors
observed     who observes operations on tensors
autocast     the types of autocast
batched      functions of autograd in the old `vmap`, which maps gradients
outside      functions that a compiler runs outside of its graphs
spelled      requests spelled in plain constants, for `torch.compile`
operators    the operators that compilers, tracers and subclasses see
derivatives  second derivatives and forward mode
joined       results over disjoint keys, joined by PyTorch's operations
transforms   tensors in the transforms of `torch.func`, and dual numbers
extended     tensors beside q, k and v
parts        tensors that lie in parts on several processes
calls        the frontend: which of these ways a call takes
recognised   masks in memory that are rules
masked       requests of calls whose masks are tensors
sdpa         scaled_dot_product_attention, with torch's meaning
flash        the functions of the package flash_attn
flex         FlexAttention: functions of scalar tensors, traced to rules and scores
direct       repeated calls of plain tensors by the shortest way
overrides    tilefold in the place of torch's own attention
"""
