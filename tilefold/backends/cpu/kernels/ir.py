"""LLVM IR as text: values with types, named instructions, counted loops, and nothing more.

A generator reads like the loop nest it writes. State that changes lives in a `Variable` (an alloca
in the entry block); LLVM's SROA turns it into registers, so no generator writes a phi. The source
is indented by loop depth and carries the generator's comments: it is what `tilefold inspect` shows.

Reference: LLVM Language Reference Manual, https://llvm.org/docs/LangRef.html.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """An operand: its text (`%s.3`, `42`) and its LLVM type (`i64`, `<16 x float>`)."""

    text: str
    type: str

    @property
    def typed(self) -> str:
        """The operand with its type in front, as instructions want their first operand."""
        return f"{self.type} {self.text}"

    @property
    def lanes(self) -> int:
        """How many elements a vector has; 1 for a scalar."""
        match = re.match(r"<(\d+) x ", self.type)
        return int(match[1]) if match else 1

    @property
    def element(self) -> str:
        """The type of one element."""
        return self.type.split(" x ", 1)[1][:-1] if self.type.startswith("<") else self.type


Operand = Value | int


def vector(lanes: int, element: str) -> str:
    """The type of `lanes` elements; the element itself when there is one lane."""
    return element if lanes == 1 else f"<{lanes} x {element}>"


def overload(type_: str) -> str:
    """The suffix of an intrinsic for a type: `v16f32`, `i64`, `v8p0`."""
    short = {"float": "f32", "double": "f64", "half": "f16", "bfloat": "bf16", "ptr": "p0"}
    value = Value("", type_)
    element = short.get(value.element, value.element)
    return f"v{value.lanes}{element}" if value.lanes > 1 else element


@dataclass(frozen=True)
class Variable:
    """A place that holds one value of `type`; read and written through its body."""

    address: str
    type: str


def _uncounted(name: str) -> None:
    """The stages of kernels that do not count leave no trace in the source."""


class Body:
    """The body of one function while it is written."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._lines: list[str] = []
        self._allocas: list[str] = []
        self._depth = 1
        self._names: dict[str, int] = {}
        self.stage: Callable[[str], None] = _uncounted
        """Says which stage of the work begins, in a kernel that counts: see `stages`."""

    def text(self) -> str:
        """All lines, the allocas of the variables first."""
        return "\n".join(["entry:", *self._allocas, *self._lines])

    # Names, lines, comments -----------------------------------------------------------------------

    def name(self, hint: str) -> str:
        """A fresh name that starts with `hint`."""
        self._names[hint] = self._names.get(hint, -1) + 1
        return f"{hint}.{self._names[hint]}" if self._names[hint] else hint

    def line(self, text: str) -> None:
        """One instruction."""
        self._lines.append("  " * self._depth + text)

    def comment(self, text: str) -> None:
        """A line that a reader of the kernel sees."""
        self.line(f"; {text}")

    def label(self, name: str) -> None:
        """Begin a block."""
        self._lines.append("  " * (self._depth - 1) + f"{name}:")

    def result(self, hint: str, type_: str, text: str) -> Value:
        """One instruction with a result."""
        value = Value(f"%{self.name(hint)}", type_)
        self.line(f"{value.text} = {text}")
        return value

    # Constants ------------------------------------------------------------------------------------

    def operand(self, value: Operand, type_: str = "i64") -> Value:
        """A Python integer as a constant of `type_`; a Value as it is."""
        return value if isinstance(value, Value) else Value(str(value), type_)

    def constant(self, number: float, type_: str) -> Value:
        """A number as a constant of a scalar or vector type, exact to the last bit."""
        scalar = Value("", type_).element
        floating = scalar in ("float", "double")
        text = float_text(number, scalar) if floating else str(int(number))
        lanes = Value("", type_).lanes
        return Value(text if lanes == 1 else f"splat ({scalar} {text})", type_)

    # Arithmetic -----------------------------------------------------------------------------------

    def binary(self, opcode: str, left: Operand, right: Operand, hint: str = "t") -> Value:
        """`opcode left, right`; a Python integer takes the type of the other side."""
        if isinstance(left, Value):
            right = self.operand(right, left.type) if left.lanes == 1 else self._like(right, left)
        else:
            right = self.operand(right)
            left = self.operand(left, right.type) if right.lanes == 1 else self._like(left, right)
        assert left.type == right.type, (opcode, left, right)
        return self.result(hint, left.type, f"{opcode} {left.typed}, {right.text}")

    def _like(self, value: Operand, model: Value) -> Value:
        return value if isinstance(value, Value) else self.constant(value, model.type)

    def add(self, left: Operand, right: Operand, hint: str = "t") -> Value:
        """Integer sum; folds constants."""
        if isinstance(left, int) and isinstance(right, int):
            return Value(str(left + right), "i64")
        if right == 0 and isinstance(left, Value):
            return left
        return self.binary("add", left, right, hint)

    def sub(self, left: Operand, right: Operand, hint: str = "t") -> Value:
        """Integer difference."""
        return self.binary("sub", left, right, hint)

    def mul(self, left: Operand, right: Operand, hint: str = "t") -> Value:
        """Integer product."""
        return self.binary("mul", left, right, hint)

    def minimum(self, left: Operand, right: Operand, hint: str = "t") -> Value:
        """Smaller of two signed integers."""
        a = left if isinstance(left, Value) else self.operand(left)
        b = right if isinstance(right, Value) else self._like(right, a)
        return self.call(f"llvm.smin.{overload(a.type)}", a.type, [a, b], hint)

    def multiply_add(self, left: Value, right: Value, addend: Value, hint: str = "t") -> Value:
        """left * right + addend, fused where the machine fuses."""
        arguments = [left, right, addend]
        return self.call(f"llvm.fmuladd.{overload(left.type)}", left.type, arguments, hint)

    def compare(self, condition: str, left: Value, right: Value, hint: str = "is") -> Value:
        """`icmp` for integers and pointers, `fcmp` for floats, by the condition's name."""
        opcode = "fcmp" if left.element in ("float", "double") else "icmp"
        type_ = vector(left.lanes, "i1")
        return self.result(hint, type_, f"{opcode} {condition} {left.typed}, {right.text}")

    def given(self, pointer: Value) -> Value:
        """True unless a pointer is null."""
        return self.compare("ne", pointer, Value("null", "ptr"), "given")

    def select(self, condition: Value, yes: Value, no: Value, hint: str = "t") -> Value:
        """`yes` where the condition holds, else `no`."""
        assert yes.type == no.type, (yes, no)
        return self.result(hint, yes.type, f"select {condition.typed}, {yes.typed}, {no.typed}")

    def larger(self, left: Value, right: Value, hint: str = "m") -> Value:
        """The larger of two floats; `right` when either is NaN (one instruction on x86)."""
        return self.select(self.compare("ogt", left, right), left, right, hint)

    def cast(self, opcode: str, value: Value, type_: str, hint: str = "t") -> Value:
        """`bitcast`, `sext`, `zext`, `trunc`, `sitofp`, `fptrunc` ... to a type."""
        if value.type == type_:
            return value
        return self.result(hint, type_, f"{opcode} {value.typed} to {type_}")

    def splat(self, value: Value, lanes: int, hint: str = "v") -> Value:
        """A vector with the scalar in every lane."""
        if lanes == 1:
            return value
        type_ = vector(lanes, value.type)
        first = self.result(hint, type_, f"insertelement {type_} poison, {value.typed}, i64 0")
        zeros = f"<{lanes} x i32> zeroinitializer"
        return self.result(hint, type_, f"shufflevector {first.typed}, {type_} poison, {zeros}")

    def shuffle(self, left: Value, right: Value, mask: Sequence[int], hint: str = "x") -> Value:
        """Lanes picked from two vectors laid end to end."""
        type_ = vector(len(mask), left.element)
        picks = ", ".join(f"i32 {index}" for index in mask)
        lanes = f"<{len(mask)} x i32> <{picks}>"
        return self.result(hint, type_, f"shufflevector {left.typed}, {right.typed}, {lanes}")

    def lane(self, value: Value, lane: int, hint: str = "lane") -> Value:
        """One element of a vector."""
        return self.result(hint, value.element, f"extractelement {value.typed}, i64 {lane}")

    def call(self, name: str, type_: str, arguments: Sequence[Value], hint: str = "t") -> Value:
        """A call with a result; an intrinsic is declared on first use."""
        self.module.declare(name, type_, [argument.type for argument in arguments])
        inside = ", ".join(argument.typed for argument in arguments)
        return self.result(hint, type_, f"call {type_} @{name}({inside})")

    def invoke(self, name: str, arguments: Sequence[Value]) -> None:
        """A call without a result."""
        self.line(f"call void @{name}({', '.join(argument.typed for argument in arguments)})")

    # Memory ---------------------------------------------------------------------------------------

    def offset(self, base: Value, element: str, index: Operand, hint: str = "p") -> Value:
        """The address of `base[index]`; a vector of indices gives a vector of addresses."""
        position = self.operand(index)
        if position.text == "0" and position.lanes == 1:
            return base
        type_ = vector(position.lanes, "ptr")
        return self.result(hint, type_, f"getelementptr {element}, {base.typed}, {position.typed}")

    def load(self, pointer: Value, type_: str, hint: str = "x", align: int | None = None) -> Value:
        """A load aligned to the element, or to `align` bytes where the address is known to be."""
        suffix = f", align {align or alignment(type_)}"
        return self.result(hint, type_, f"load {type_}, {pointer.typed}{suffix}")

    def store(self, value: Value, pointer: Value, align: int | None = None) -> None:
        """A store aligned like `load`."""
        self.line(f"store {value.typed}, {pointer.typed}, align {align or alignment(value.type)}")

    def variable(self, type_: str, initial: Value | None = None, hint: str = "var") -> Variable:
        """A new variable; written with `initial` here and now if given."""
        place = Variable(f"%{self.name(hint)}", type_)
        self._allocas.append(f"  {place.address} = alloca {type_}")
        if initial is not None:
            self.write(place, initial)
        return place

    def read(self, place: Variable, hint: str = "x") -> Value:
        """The value that a variable holds."""
        return self.result(hint, place.type, f"load {place.type}, ptr {place.address}")

    def write(self, place: Variable, value: Value) -> None:
        """Give a variable a value."""
        assert place.type == value.type, (place, value)
        self.line(f"store {value.typed}, ptr {place.address}")

    # Control --------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, hint: str, start: Operand, stop: Operand, step: Operand = 1) -> Iterator[Value]:
        """`for index in range(start, stop, step)`; the test is at the bottom, after one guard."""
        first, last = self.operand(start), self.operand(stop)
        counter = self.variable("i64", first, f"{hint}.at")
        body, end = self.name(f"{hint}.body"), self.name(f"{hint}.end")
        guard = self.compare("slt", first, last)
        self.line(f"br {guard.typed}, label %{body}, label %{end}")
        self.label(body)
        self._depth += 1
        index = self.read(counter, hint)
        yield index
        following = self.result(
            f"{hint}.next", "i64", f"add nsw {index.typed}, {self.operand(step).text}"
        )
        self.write(counter, following)
        more = self.compare("slt", following, last)
        self.line(f"br {more.typed}, label %{body}, label %{end}")
        self._depth -= 1
        self.label(end)

    @contextmanager
    def forever(self, hint: str) -> Iterator[str]:
        """An endless loop; branch to the label that it yields to leave it."""
        body, end = self.name(f"{hint}.body"), self.name(f"{hint}.end")
        self.line(f"br label %{body}")
        self.label(body)
        self._depth += 1
        yield end
        self.line(f"br label %{body}")
        self._depth -= 1
        self.label(end)

    def leave_unless(self, condition: Value, end: str, hint: str = "go") -> None:
        """Branch to `end` unless the condition holds."""
        on = self.name(hint)
        self.line(f"br {condition.typed}, label %{on}, label %{end}")
        self.label(on)

    @contextmanager
    def when(self, condition: Value, hint: str = "then") -> Iterator[None]:
        """A block whose code runs only where the condition holds."""
        then, end = self.name(hint), self.name(f"{hint}.end")
        self.line(f"br {condition.typed}, label %{then}, label %{end}")
        self.label(then)
        self._depth += 1
        yield
        self._depth -= 1
        self.line(f"br label %{end}")
        self.label(end)

    @contextmanager
    def choose(self, condition: Value, hint: str = "if") -> Iterator[Otherwise]:
        """A block whose code runs where it holds; after `.otherwise()`, where it does not."""
        branch = Otherwise(self, self.name(f"{hint}.no"), self.name(f"{hint}.end"))
        yes = self.name(f"{hint}.yes")
        self.line(f"br {condition.typed}, label %{yes}, label %{branch.no}")
        self.label(yes)
        self._depth += 1
        yield branch
        assert branch.turned, "choose() needs otherwise(); use when()"
        self._depth -= 1
        self.line(f"br label %{branch.end}")
        self.label(branch.end)


@dataclass
class Otherwise:
    """The second half of `Body.choose`."""

    body: Body
    no: str
    end: str
    turned: bool = False

    def otherwise(self) -> None:
        """From here on, write what runs where the condition does not hold."""
        self.turned = True
        self.body.line(f"br label %{self.end}")
        self.body.label(self.no)


class Module:
    """Functions and the declarations that they need."""

    def __init__(self, title: str, vector_bits: int) -> None:
        self._title = title
        self._vector_bits = vector_bits
        self._declared: dict[str, str] = {}
        self._constants: dict[str, str] = {}
        self._functions: list[str] = []
        self._defined: set[str] = set()

    def defines(self, name: str) -> bool:
        """True if a function of that name is there, or being written."""
        return name in self._defined

    def declare(self, name: str, type_: str, arguments: Sequence[str]) -> None:
        """An intrinsic that some body calls."""
        if name not in self._defined:
            self._declared[name] = f"declare {type_} @{name}({', '.join(arguments)})"

    def constant(self, name: str, content: bytes, align: int) -> Value:
        """The address of constant bytes."""
        text = "".join(f"\\{byte:02X}" for byte in content)
        kind = f"private unnamed_addr constant [{len(content)} x i8]"
        self._constants[name] = f'@{name} = {kind} c"{text}", align {align}'
        return Value(f"@{name}", "ptr")

    @contextmanager
    def function(
        self, name: str, parameters: Sequence[Value], *, internal: bool = False
    ) -> Iterator[Body]:
        """A function without a result, while its body is written."""
        body = Body(self)
        self._defined.add(name)
        yield body
        head = ", ".join(parameter.typed for parameter in parameters)
        kind = "define internal" if internal else "define"
        attributes = "#1" if internal else "#0"
        body.line("ret void")
        self._functions.append(f"{kind} void @{name}({head}) {attributes} {{\n{body.text()}\n}}")

    def text(self) -> str:
        """The module. Without the two width attributes LLVM may split vectors in halves."""
        title = "\n".join(f"; {line}" for line in self._title.splitlines())
        width = (
            f'"min-legal-vector-width"="{self._vector_bits}" '
            f'"prefer-vector-width"="{self._vector_bits}"'
        )
        attributes = [
            f"attributes #0 = {{ nounwind {width} }}",
            f"attributes #1 = {{ nounwind noinline {width} }}",
        ]
        declared = [self._declared[name] for name in sorted(self._declared)]
        head = [*self._constants.values(), *declared]
        parts = [title, "\n".join(head), *self._functions, "\n".join(attributes)]
        return "\n\n".join(parts) + "\n"


def alignment(type_: str) -> int:
    """Bytes of one element of a type."""
    element = Value("", type_).element
    known = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
    return known.get(element) or max(1, int(element[1:]) // 8)


def float_text(number: float, scalar: str) -> str:
    """A float constant as LLVM wants it: the bits of a double, rounded to `scalar` before."""
    if scalar == "float":
        number = struct.unpack("<f", struct.pack("<f", number))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"
