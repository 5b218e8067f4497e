"""The question without the way to its answer: shapes, types, scale and mask.

dropout    which pairs fall out: the definition
request    the options of a call: mask, scale, layout, precision
keywords   what arguments of other libraries are called here
attention  one call without its arrays; all checks of shapes
matmul     products of matrices and softmax of rows; all checks of their shapes
buffer     where elements lie, without the framework that owns them
reference  attention and its gradients in plain NumPy: the definition
"""
