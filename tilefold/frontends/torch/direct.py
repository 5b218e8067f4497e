"""Calls of plain tensors on the processor by the shortest way, with results that lie as asked.

Torch's own operators promise how their results lie in memory, and take 4 us for a small call. So a
call that was made before is found by its options and by how its tensors lie, and runs at once: one
that a single thread computes as a record, without the interpreter's part in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilefold.backends import calls
from tilefold.backends.arrays import torch as arrays
from tilefold.backends.cpu import native
from tilefold.backends.cpu.guard import APART, HERE, Guard, Operand
from tilefold.backends.protocols import BACKWARD, FORWARD, Pass, Placement
from tilefold.backends.registry import backend
from tilefold.common import generation
from tilefold.common.lru import LruCache
from tilefold.frontends.torch import tensors
from tilefold.frontends.torch.masked import Asked, plain_request
from tilefold.frontends.torch.tensors import LOWEST
from tilefold.problems.request import LAYOUTS, Request

Key = tuple[Any, ...]
Tensors = tuple[Tensor, ...]
Lie = tuple[Sequence[int], Sequence[int], torch.dtype]
"""The sizes, the strides and the type of a tensor."""


@dataclass(frozen=True, eq=False)
class Way:
    """A prepared call.

    Without `prepared` no query meets a key. `like`: whether the first result lies as q does. A
    small call has a guard, and writes lse that nobody asks for into `scratch`; several threads may.
    """

    results: tuple[Lie, ...]
    like: bool = False
    prepared: Any = None
    guard: Guard | None = None
    scratch: Tensor | None = None

    def run(self, *addresses: int) -> None:
        """Run the call on the addresses of its operands."""
        if self.guard is None or not self.guard.run(*addresses):
            self.prepared.run(*addresses)


_ways: LruCache[Way] = LruCache(most=128, most_bytes=2**28)
_newest: LruCache[Way] = LruCache(most=64, most_bytes=2**24)
"""The newest forward call of each kind, whatever its keys, as in `backends.calls`."""


def output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    grouped: bool,
    mask: Tensor | None = None,
) -> Tensor | None:
    """o of a small call that was made before, which lies as q does; None for other calls.

    `grouped`: whether heads of keys may be fewer. `mask` is an operand.
    """
    if mask is not None:
        return _small(_key(q, k, v, is_causal, scale, grouped, _lie(mask)), q, k, v, mask)
    return _small(_key(q, k, v, is_causal, scale, grouped), q, k, v)


def output_masked(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
    """o of a request, and of the array that it reads; it lies as q does."""
    request, array = asked
    o = _small(_key(q, k, v, request, _lie(array)), q, k, v, array)
    return forward_masked(q, k, v, asked)[0] if o is None else o


def _small(key: Key, q: Tensor, k: Tensor, v: Tensor, array: Tensor | None = None) -> Tensor | None:
    """o of a call that one thread computes and that was made before; None for another one."""
    way = _ways.get(key)
    if way is None or way.guard is None or way.scratch is None:
        return None
    a, b, c = q.data_ptr(), k.data_ptr(), v.data_ptr()
    if a < LOWEST or b < LOWEST or c < LOWEST:
        return None
    o = torch.empty_like(q) if way.like else _empty(way.results[0])
    if array is None:
        return o if way.guard.run(a, b, c, o.data_ptr(), way.scratch.data_ptr()) else None
    d = array.data_ptr()
    if d < LOWEST:
        return None
    return o if way.guard.run(a, b, c, d, o.data_ptr(), way.scratch.data_ptr()) else None


def _empty(lie: Lie) -> Tensor:
    sizes, steps, kind = lie
    return torch.empty_strided(sizes, steps, dtype=kind)


def _key(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Key:
    lie = q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()
    return (*lie, q.dtype, k.dtype, v.dtype, generation.number, *options)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_causal: bool,
    scale: float | None,
    grouped: bool = True,
) -> Tensors:
    """o, which lies as q does, and lse, in which the heads of a query lie side by side."""
    key = _key(q, k, v, is_causal, scale, grouped)
    way = _ways.get(key)
    if way is None:
        way = _new_forward(key, (q, k, v), plain_request(is_causal, scale))
    a, b, c = q.data_ptr(), k.data_ptr(), v.data_ptr()
    few = a < LOWEST or b < LOWEST or c < LOWEST
    if few or (a | b | c) & 7 or way.prepared is None:
        return _run(way, (q, k, v))
    o = torch.empty_like(q) if way.like else _empty(way.results[0])
    lse = _empty(way.results[1]) if way.scratch is None else torch.empty_like(way.scratch)
    way.run(a, b, c, o.data_ptr(), lse.data_ptr())
    return o, lse


def forward_masked(
    q: Tensor, k: Tensor, v: Tensor, asked: Asked, known_as: Key | None = None
) -> Tensors:
    """The same of a request, and of the array that it reads.

    `known_as` is what `output` is given beside q, k and v: it then finds a small call.
    """
    request, array = asked
    key = _key(q, k, v, request, _lie(array))
    given = (q, k, v) if array is None else (q, k, v, array)
    way = _ways.get(key)
    if way is None:
        way = _new_forward(key, given, request)
        if known_as is not None and array is not None and way.scratch is not None:
            *options, mask = known_as
            _ways.put(_key(q, k, v, *options, _lie(mask)), way, 0)
    return _run(way, given)


def backward(given: Tensors, asked: Asked) -> Tensors:
    """dq, dk and dv of do, q, k, v, o and lse; in them the heads of a position lie side by side."""
    request, array = asked
    if array is not None:
        given = (*given, array)
    key = request, generation.number, arrays.layout_key(given)
    way = _ways.get(key)
    if way is None:
        way = _new_backward(key, given, request)
    return _run(way, given)


def _lie(array: Tensor | None) -> Key | None:
    return None if array is None else (array.shape, array.stride(), array.dtype)


def _with(usual: Pass, given: Tensors) -> Pass:
    """The pass of tensors of which the last may be what a mask reads, or what scores add."""
    if len(given) == len(usual.given):
        return usual
    return usual.plus(("input0" if given[-1].is_floating_point() else "data0",))


def _run(way: Way, given: Tensors) -> Tensors:
    addresses = [x.data_ptr() for x in given]
    for address in addresses:
        if address & 7 or address < LOWEST:
            given = tuple([_readable(x) for x in given])
            addresses = [x.data_ptr() for x in given]
            break
    made = tuple([_empty(lie) for lie in way.results])
    if way.prepared is None:
        for x, number in zip(
            made, (0.0, -torch.inf) if len(made) == 2 else (0.0,) * 3, strict=True
        ):
            x.fill_(number)
    else:
        way.run(*addresses, *[x.data_ptr() for x in made])
    return made


def _readable(x: Tensor) -> Tensor:
    """The tensor, or a copy whose items are aligned. Raises ValueError if its memory was freed."""
    arrays.check_held("a tensor", x)
    return x if x.data_ptr() % x.itemsize == 0 else x.clone()


def _new_forward(key: Key, given: Tensors, request: Request) -> Way:
    """A way that was not gone before; from the one of fewer or more keys, if there is one."""
    q, k, v = given[:3]
    size = (*q.shape[:3], v.shape[3])
    o = torch.empty_like(q) if q.shape == size else q.new_empty(size)
    lse = q.new_empty((size[0], size[2], size[1]), dtype=tensors.statistics(q)).transpose(1, 2)
    rows = [(x.shape[:2], x.shape[3:], x.dtype) for x in (k, v)]
    kind = q.shape, q.stride(), q.dtype, *rows, request, generation.number, key[-1]
    before = _newest.get(kind)
    way = _way(_with(FORWARD, given), given, (o, lse), request, before and before.prepared)
    if way.prepared is None:
        return way
    _newest.put(kind, way, way.prepared.data_bytes)
    return _ways.put(key, way, way.prepared.data_bytes)


def _new_backward(key: Key, given: Tensors, request: Request) -> Way:
    results = [torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype) for x in given[1:4]]
    way = _way(_with(BACKWARD, given), given, tuple(results), request, None)
    return way if way.prepared is None else _ways.put(key, way, way.prepared.data_bytes)


def _way(wanted: Pass, given: Tensors, results: Tensors, request: Request, before: Any) -> Way:
    """The way of tensors that lie like these. Raises what `tilefold.attention` raises for them."""
    machine = tensors.machine_of(given[0])
    problem = calls.described(machine, wanted, request, arrays, given).problem
    lie = tuple([(x.shape, x.stride(), x.dtype) for x in results])
    if problem.empty:
        return Way(lie)
    every = zip(wanted.operands, (*given, *results), strict=True)
    strides = {name: x.stride() for name, x in every}
    prepared: Any = None
    if before is not None:
        prepared = before.with_keys(problem, {name: strides[name] for name in ("k", "v")})
    if prepared is None:
        placement = Placement(strides, 0, LAYOUTS[request.layout])
        prepared = backend(machine.backend).prepare(machine, problem, wanted, placement)
    like = given[0].shape == results[0].shape
    if not prepared.alone or not HERE:
        return Way(lie, like, prepared)
    # one thread computes it: as a record, with the interpreter's lock, for microseconds
    operands = [Operand(mask=x.itemsize - 1, role=APART) for x in (*given, *results)]
    made = native.native_call(prepared, len(operands))
    return Way(lie, like, prepared, Guard.of(made, operands, -1, alone=True), results[1])
