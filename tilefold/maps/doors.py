"""The public functions of attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from tilefold.frontends import registry
from tilefold.maps.region import Asked
from tilefold.masks.position_rules import Rule
from tilefold.problems.keywords import refusal, without_unknown
from tilefold.scores.score import Score


@without_unknown
def key_mass(
    q: Any,
    k: Any,
    lse: Any = None,
    *,
    mask: Rule | None = None,
    scale: float | None = None,
    score: Score | Sequence[Score] | None = None,
    sinks: Any = None,
    layout: str = "bhnd",
    precision: str = "highest",
    **unknown: NoReturn,
) -> Any:
    """The attention mass of each key: the sum of its weights over all queries.

    >>> import numpy as np
    >>> import tilefold
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 2, 5, 8))
    >>> o, lse = tilefold.attention(q, k, v, return_lse=True)
    >>> mass = tilefold.key_mass(q, k, lse)
    >>> mass.shape, bool(np.allclose(mass.sum(axis=2), 5))  # the weights of each query sum to 1
    ((1, 2, 5), True)

    Keys of little mass can leave a cache (Zhang et al., 2023, "H2O", arXiv:2306.14048). The weights
    are made again from lse, tile by tile, so memory grows with the lengths and not with their
    product. On GPUs they are made by torch's operations, some rows after others.

    Arguments:
        q: queries, (batch, heads_q, len_q, dim)
        k: keys, (batch, heads_kv, len_k, dim)
        lse: (batch, heads_q, len_q), of `attention(..., return_lse=True)`; None: it is computed
        mask, scale, score, sinks, layout, precision: as for `attention`. Sinks are a part of lse:
            they are read only where lse is computed

    Returns:
        mass: (batch, heads_q, len_k) in every layout, of the type of lse. Hidden pairs add nothing

    There is no dropout: the mass is that of all weights, as lse is, in calls with dropout too.

    Raises:
        The errors of `attention`; NotImplementedError where autograd would record the call, and in
        transforms of torch.func, since the mass has no derivatives
    """
    if unknown:
        raise refusal(key_mass, unknown)
    frontend = _frontend(q, k, lse)
    asked = Asked.of(frontend.request_of(mask, scale, layout, precision), score, sinks)
    return _maps(frontend).key_mass(q, k, lse, asked)


@without_unknown
def weights(
    q: Any,
    k: Any,
    lse: Any = None,
    *,
    rows: Any = slice(None),
    columns: Any = slice(None),
    mask: Rule | None = None,
    scale: float | None = None,
    score: Score | Sequence[Score] | None = None,
    sinks: Any = None,
    layout: str = "bhnd",
    precision: str = "highest",
    **unknown: NoReturn,
) -> Any:
    """The attention weights of some queries and some keys: a region of softmax(scale * q k^T).

    >>> import numpy as np
    >>> import tilefold
    >>> q, k = np.random.default_rng(0).normal(size=(2, 1, 2, 100, 8))
    >>> p = tilefold.weights(q, k, rows=slice(90, 100), columns=[0, 1, 2], mask=tilefold.causal())
    >>> p.shape
    (1, 2, 10, 3)

    Memory grows with the region. Attention itself is computed only where lse is not given, by its
    forward pass.

    Arguments:
        q: queries, (batch, heads_q, len_q, dim)
        k: keys, (batch, heads_kv, len_k, dim)
        lse: (batch, heads_q, len_q), of `attention(..., return_lse=True)`; None: it is computed
        rows, columns: the queries and the keys, each a slice or whole numbers; the default is all
        mask, scale, score, sinks, layout, precision: as for `attention`. Sinks are a part of lse:
            they are read only where lse is computed

    Returns:
        weights: (batch, heads_q, rows, columns) in every layout, of the type of lse. Those of
            hidden pairs are 0. On torch tensors they are differentiable, any number of times and
            in forward mode

    There is no dropout: these are the weights before it, and lse is that of all weights. Those of a
    call with dropout=p are weights * kept / (1 - p), where `dropout_mask` makes kept.

    Raises:
        The errors of `attention`; TypeError or IndexError for rows or columns that are none
    """
    if unknown:
        raise refusal(weights, unknown)
    frontend = _frontend(q, k, lse)
    asked = Asked.of(frontend.request_of(mask, scale, layout, precision), score, sinks)
    return _maps(frontend).weights(q, k, lse, rows, columns, asked)


def _frontend(q: Any, k: Any, lse: Any) -> Any:
    """The frontend of the arrays that are given."""
    given = {"q": q, "k": k, "lse": lse}
    return registry.find(**{name: array for name, array in given.items() if array is not None})


def _maps(frontend: Any) -> Any:
    """The maps of the arrays of a frontend."""
    return import_module(f"tilefold.maps.{frontend.__name__.split('.')[2]}")
