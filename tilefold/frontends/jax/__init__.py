"""JAX arrays: primitives whose kernels XLA calls without Python, with all derivatives and `vmap`.

varying      the mesh axes over which arrays vary, in `jax.shard_map`
scores       modified scores, masks and dropout of some pairs, in operations of JAX
tiles        the tiles of a call, and sums over them
formulas     the derivatives that no kernel computes, as such sums
handler      the registration of what XLA calls
lowering     how a pass becomes a part of a compiled program
batching     `jax.vmap`: the mapped axis joins the batch
joined       results over disjoint keys, joined: of `merge`, and with sinks
primitives   attention, its backward pass and its forward mode as primitives of JAX
calls        calls of `tilefold.attention` on JAX arrays
nn           attention with the meaning of `jax.nn.dot_product_attention`
"""
