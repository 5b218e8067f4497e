"""TensorFlow's tensors: operators of our own in its graphs, whose kernels run without Python.

library      the C API that TensorFlow exports
states       calls that are prepared for shapes, in memory
compute      the kernel of all operators, as LLVM text
registering  operators in TensorFlow's registry
dropped      the factors of dropout, in operations of TensorFlow
pairs        attention of all pairs at once, in operations of TensorFlow
second       second derivatives, block by block
passes       from a pass to its gradients
operators    the operators of attention
outside      calls where TensorFlow takes no operator
compiled     passes in what XLA compiles
joined       results over disjoint keys
tensors      calls on tensors
sequences    attention between sequences of one or two dimensions, channels first
"""
