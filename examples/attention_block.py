"""A block of attention in three calls, and the same in plain NumPy.

    python examples/attention_block.py

    X (batch, N, features)
    -> a product for each of q, k, v and each head: (batch, 3, H, D, N), channels before tokens
    -> attention, which takes this layout as it is
    -> a product with its bias and activation: Y (batch, N, outputs)

No array is transposed, copied or split: the heads of one batch of products are the heads of
attention, and its result is read as the transposed left operand of the last product.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import tilefold

Array = NDArray[Any]


class Weights(NamedTuple):
    """Weights of a block, arrays or tensors.

    Those of q, k and v are (3, H, D, features), and their biases (3, H, D, 1). `out` is
    (H D, outputs), and its bias (outputs,).
    """

    qkv: Any
    qkv_bias: Any
    out: Any
    out_bias: Any

    @classmethod
    def random(cls, features: int, heads: int, dim: int, outputs: int, seed: int = 0) -> Weights:
        """Weights of a new block, float32."""
        rng = np.random.default_rng(seed)
        shapes = (3, heads, dim, features), (3, heads, dim, 1), (heads * dim, outputs), (outputs,)
        sizes = features**-0.5, 0.1, (heads * dim) ** -0.5, 0.1
        drawn = [
            rng.normal(size=shape).astype(np.float32) * np.float32(size)
            for shape, size in zip(shapes, sizes, strict=True)
        ]
        return cls(*drawn)


def block(x: Any, weights: Weights, *, mask: Any = None, activation: str = "gelu") -> Any:
    """The block by tilefold: x is (batch, N, features), an array of NumPy or a tensor of torch."""
    qkv = tilefold.gemm(weights.qkv, x[:, None, None], transpose_b=True, bias=weights.qkv_bias)
    q, k, v = (qkv[:, part] for part in range(3))  # (batch, H, D, N) each
    o = tilefold.attention(q, k, v, mask=mask, layout="bhdn")
    joined = o.reshape(o.shape[0], -1, o.shape[-1])  # (batch, H D, N): a view
    return tilefold.gemm(
        joined, weights.out, transpose_a=True, bias=weights.out_bias, activation=activation
    )


def plain(x: Array, weights: Weights, *, visible: Array | bool = True) -> Array:
    """The same layer with gelu in NumPy, in float64."""
    qkv, qkv_bias, out, out_bias = (np.asarray(array, np.float64) for array in weights)
    batch, tokens, features = x.shape
    pairs = zip(qkv.reshape(3, -1, features), qkv_bias.reshape(3, -1), strict=True)
    q, k, v = (x.astype(np.float64) @ w.T + b for w, b in pairs)
    heads, dim = qkv.shape[1:3]
    q, k, v = (y.reshape(batch, tokens, heads, dim).swapaxes(1, 2) for y in (q, k, v))
    s = np.where(visible, q @ k.swapaxes(2, 3) / np.sqrt(dim), -np.inf)
    p = np.exp(s - s.max(axis=3, keepdims=True))
    o = (p / p.sum(axis=3, keepdims=True)) @ v
    z = o.swapaxes(1, 2).reshape(batch, tokens, -1) @ out + out_bias
    return np.array(z * 0.5 * (1 + np.vectorize(math.erf, otypes=["d"])(z / np.sqrt(2))))


def main() -> None:
    """Run both, and print how far they are apart."""
    x = np.random.default_rng(1).normal(size=(2, 100, 96)).astype(np.float32)
    weights = Weights.random(features=96, heads=6, dim=16, outputs=128)
    y = block(x, weights, mask=tilefold.causal())
    want = plain(x, weights, visible=np.tri(100, dtype=bool))
    print(f"Y is {y.shape}, and differs from NumPy's by at most {abs(y - want).max():.1e}")


if __name__ == "__main__":
    main()
