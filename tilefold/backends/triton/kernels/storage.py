"""Storage of elements: how they lie in memory, and how kernels read, compute with and write them.

    type       memory     statistics and sums   products ask for
    float32    float32    float32               a precision
    float64    float64    float64               the type of the result
    float16    float16    float32               nothing
    bfloat16   bfloat16   float32               nothing

Tiles are loaded as they lie and multiplied in their own type; what else is done with elements is
done in the type of the statistics. One row of `_ROWS` is all that a kernel knows of a type; a new
way to keep elements is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """Elements of one type.

    `compute`: the type of statistics and sums. `lowest`: where a running maximum starts, finite, so
    that no difference of two of them is NaN. `far`: from there on numbers of the statistics are
    more than 1 apart. `product`: the last arguments of `tl.dot`, with the precision as `{mode}`.
    `by_bits`: a number of this type is given to a kernel by its bits, since Triton passes float32
    alone.
    """

    memory: str
    compute: str = "float32"
    lowest: str = "-3e38"
    far: str = "16777216.0"
    product: str = ""
    by_bits: bool = False

    def read(self, value: str) -> str:
        """Loaded elements in the type of the statistics."""
        return f"{value}.to(tl.{self.compute})"

    def write(self, value: str) -> str:
        """Computed elements, rounded to the type of memory."""
        return f"{value}.to(tl.{self.memory})"

    def negated(self, tile: str) -> str:
        """A tile with the other sign; half types are computed with in float32."""
        return f"-{tile}" if self.memory == self.compute else self.write(f"(-{self.read(tile)})")


_ROWS = {
    row.memory: row
    for row in (
        Storage("float32", product=', input_precision="{mode}"'),
        Storage(
            *("float64", "float64", "-1e308", "9007199254740992.0"),
            product=", out_dtype=tl.float64",
            by_bits=True,
        ),
        Storage("float16"),
        Storage("bfloat16"),
    )
}


def storage(dtype: str) -> Storage:
    """The storage of a tensor's type.

    >>> storage("float16").negated("q_0")
    '(-q_0.to(tl.float32)).to(tl.float16)'
    """
    return _ROWS[dtype]
