"""Keras: layers, and the exchange of the function that Keras' own layers call.

tensors     tensors of Keras' backend, given to `tilefold.attention`
exchange    Keras' own function, exchanged for one that calls tilefold
settings    rules and scores as strings, for `get_config`
attention   attention of queries, keys and values
multi_head  attention with projections, as Keras' layer of the same name
"""
