"""Models of Hugging Face transformers: their masks as rules, and their attention.

models       models that ask for their attention
closures     mask functions of transformers, as rules
sight        the mask that travels through a model in place of a tensor
packed       sequences that lie one behind the other, by their cumulative lengths
attention    the attention function of models
"""
