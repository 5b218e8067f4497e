"""What becomes of the sums of a tile: the result in its own type, by its own strides.

out = activation(alpha sums + beta c + bias)
out = activation(alpha sums + bias) alpha other        with a gate
"""

from __future__ import annotations

from tilefold.backends.cpu.kernels import masked
from tilefold.backends.cpu.kernels.ir import (
    Module,
    Operand,
    Value,
    vector,
)
from tilefold.backends.cpu.kernels.storage import Storage
from tilefold.backends.cpu.matmul import activation
from tilefold.backends.cpu.matmul.arguments import Arguments
from tilefold.backends.cpu.matmul.panels import SCALARS, factor
from tilefold.backends.cpu.matmul.spec import FMA, FewRowsSpec, GemmSpec, QuantizedSpec


def finish(module: Module, spec: GemmSpec | QuantizedSpec | FewRowsSpec) -> str:
    """The name of `(arguments, sums, other, rows, columns, out, c, bias)`.

    Sums lie in lines of `spec.width`. The last three are the addresses of the tile's first element.
    """
    if not module.defines("finish"):
        _Finish(module, spec)
    return "finish"


class _Finish:
    def __init__(self, module: Module, spec: GemmSpec | QuantizedSpec | FewRowsSpec) -> None:
        self.spec = spec
        pointers = ("arguments", "sums", "other", "out", "c", "bias")
        block, self.sums, self.other, self.out, self.c, self.bias = (
            Value(f"%at_{name}", "ptr") for name in pointers
        )
        self.rows, self.columns = Value("%rows", "i64"), Value("%columns", "i64")
        parameters = [block, self.sums, self.other, self.rows, self.columns]
        with module.function(
            "finish", [*parameters, self.out, self.c, self.bias], internal=True
        ) as body:
            self.body = body
            self.words = Arguments(body, spec, block)
            self.summed, self.scalar = SCALARS[spec.sums], SCALARS[spec.finished]
            self.type = vector(spec.lanes, self.scalar)
            self.alpha, self.beta = (self._factor(name) for name in ("alpha", "beta"))
            with (
                body.loop("i", 0, self.rows) as i,
                body.loop("j", 0, self.columns, spec.lanes) as j,
            ):
                self._vector(i, j)

    def _factor(self, name: str) -> Value:
        body = self.body
        number = body.cast("bitcast", self.words[name], "double")
        if self.scalar == "i32":
            return body.splat(body.cast("fptosi", number, "i32"), self.spec.lanes, name)
        if self.scalar != "double":
            number = body.cast("fptrunc", number, "float")
        return body.splat(number, self.spec.lanes, name)

    def _vector(self, i: Value, j: Value) -> None:
        """One vector of a row."""
        body, spec = self.body, self.spec
        place = body.add(body.mul(i, spec.width), j)
        x = self._times(self._sums(self.sums, place), self.alpha)
        left = body.sub(self.columns, j, "left")
        if spec.c:
            x = self._plus(x, self._times(self._read("c", self.c, spec.c, i, j, left), self.beta))
        if spec.bias:
            x = self._plus(x, self._read("bias", self.bias, spec.bias, i, j, left))
        x = activation.apply(body, spec.activation, x)
        if spec.gate:
            x = self._times(x, self._times(self._sums(self.other, place), self.alpha))
        self._write(x, i, j, left)

    def _sums(self, base: Value, place: Value) -> Value:
        body, type_ = self.body, vector(self.spec.lanes, self.summed)
        x = body.load(body.offset(base, self.summed, place), type_, "x")
        return body.cast("sitofp", x, self.type) if self.summed != self.scalar else x

    def _times(self, x: Value, y: Value) -> Value:
        return self.body.binary("mul" if self.scalar == "i32" else "fmul", x, y)

    def _plus(self, x: Value, y: Value) -> Value:
        return self.body.binary("add" if self.scalar == "i32" else "fadd", x, y)

    def _storage(self, dtype: str) -> Storage:
        return factor(dtype, FMA, self.spec.finished, self.spec.native_half)

    def _address(self, store: Storage, base: Value, name: str, i: Operand, j: Operand) -> Value:
        body, words = self.body, self.words
        index = body.add(body.mul(i, words[f"{name}_m"]), body.mul(j, words[f"{name}_n"]))
        return store.at(body, base, index)

    def _read(self, name: str, base: Value, dtype: str, i: Value, j: Value, left: Value) -> Value:
        """A vector of c or bias: neighbours, one number for all, or one by one."""
        body, words, store, lanes = self.body, self.words, self._storage(dtype), self.spec.lanes
        found = body.variable(self.type, body.constant(0.0, self.type), name)
        address = self._address(store, base, name, i, j)
        near = body.compare("eq", words[f"{name}_n"], Value("1", "i64"))
        with body.choose(near, "near") as branch:
            type_ = vector(lanes, _stored(store))
            bits = masked.load(body, address, type_, masked.first(body, left, lanes))
            bits = body.cast("bitcast", bits, vector(lanes, store.stored))
            body.write(found, store.widen(body, bits))
            branch.otherwise()
            same = body.compare("eq", words[f"{name}_n"], Value("0", "i64"))
            with body.choose(same, "same") as each:
                body.write(found, body.splat(store.load(body, address), lanes))
                each.otherwise()
                with body.loop("lane", 0, body.minimum(left, lanes)) as lane:
                    far = self._address(store, base, name, i, body.add(j, lane))
                    self._put(found, lane, store.load(body, far))
        return body.read(found)

    def _put(self, found: object, lane: Value, number: Value) -> None:
        body = self.body
        old = body.read(found)  # type: ignore[arg-type]
        new = body.result("v", old.type, f"insertelement {old.typed}, {number.typed}, {lane.typed}")
        body.write(found, new)  # type: ignore[arg-type]

    def _write(self, x: Value, i: Value, j: Value, left: Value) -> None:
        """A vector of the result: neighbours at once, others one by one."""
        body, words, lanes = self.body, self.words, self.spec.lanes
        store = self._storage(self.spec.out)
        bits = store.narrow(body, x)
        bits = body.cast("bitcast", bits, vector(lanes, _stored(store)))
        near = body.compare("eq", words["out_n"], Value("1", "i64"))
        with body.choose(near, "near") as branch:
            address = self._address(store, self.out, "out", i, j)
            masked.store(body, bits, address, masked.first(body, left, lanes))
            branch.otherwise()
            with body.loop("lane", 0, body.minimum(left, lanes)) as lane:
                far = self._address(store, self.out, "out", i, body.add(j, lane))
                number = body.result(
                    "x", bits.element, f"extractelement {bits.typed}, {lane.typed}"
                )
                body.store(number, far)


def _stored(store: Storage) -> str:
    """The type in memory, half types as integers, which masked accesses know."""
    return "i16" if store.stored == "half" else store.stored
