"""The text of a compiled program: its instructions, how often each runs, and what it moves through memory.

XLA's own cost analysis counts the body of a loop once; here a loop counts as often as it goes round. A compiled program
is that of one device, so every size is one device's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (2, 4, 8, 16, 32, 64)}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|body|true_computation|false_computation|called_computations|branch_computations)=")
_NAMES = re.compile(r"%([\w.\-]+)")
# What only names or regroups values that are there already, or is the sum of what it runs.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call", "conditional"),
    *("partition-id", "replica-id", "optimization-barrier", "send", "recv"),
}
_PASSED_ON = ("copy", "bitcast", "convert", "reshape")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a device.

    Attributes:
      dtype: by XLA's name, such as "bf16".
      shape: its dimensions.
      near: it lies beside the core (in a TPU's VMEM) and not in the device's main memory.
    """

    dtype: str
    shape: tuple[int, ...]
    near: bool = False

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype, 8)  # What is not in the table are the kinds of f8.
        return math.ceil(math.prod(self.shape) * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: of the instruction.
      results: the arrays it makes; of a tuple all, those of tuples inside too, in order.
      operands: names of instructions of the same computation.
      inside: the text between the parentheses: of a constant its value, of a parameter its number.
      attributes: the text behind them.
      root: it is the computation's result.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    @property
    def called(self) -> list[str]:
        """The computations it runs; not those that say how a reduction adds."""
        names: list[str] = []
        for match in _CALLED.finditer(self.attributes):
            rest = self.attributes[match.end() :]
            names += _NAMES.findall(rest[: rest.index("}")] if rest.startswith("{") else rest.split(",")[0])
        return names

    @property
    def origin(self) -> str:
        """What of the traced program it stems from, as jax names it; "" where that is not known."""
        return self.attribute(r'op_name="([^"]*)"')

    def attribute(self, pattern: str) -> str:
        """The first group of the pattern's first match in the attributes, or ""."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]
# What is known of a computation's parameters: of each a number or, of a tuple, the numbers in it; None is unknown.
_Value = int | None | tuple["_Value", ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the one that is the program.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def _walked(self) -> tuple[dict[str, int], list[str]]:
        counts, unknown = dict.fromkeys(self.computations, 0), []
        self._walk(self.entry, 1, (), counts, unknown)
        return counts, unknown

    @property
    def executions(self) -> dict[str, int]:
        """How often each computation runs; every branch of a conditional counts."""
        return self._walked[0]

    @property
    def unknown_loops(self) -> list[str]:
        """Loops that do not tell how often they go round; they count once."""
        return self._walked[1]

    def instructions(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that runs, with its computation and how often it does."""
        for name, count in self.executions.items():
            if count:
                yield from ((instruction, self.computations[name], count) for instruction in self._lines(name))

    def _lines(self, name: str) -> list[Instruction]:
        return list(self.computations[name].values())

    def _root(self, name: str) -> Instruction:
        return next(instruction for instruction in self._lines(name) if instruction.root)

    def _walk(self, name: str, times: int, known: tuple[_Value, ...], counts: dict[str, int], unknown: list) -> None:
        counts[name] += times
        computation = self.computations[name]
        for instruction in computation.values():
            called = instruction.called
            if not called:
                continue
            operands = tuple(self._value(computation, operand, known) for operand in instruction.operands)
            rounds = 1
            if instruction.opcode == "while":
                found = self._rounds(instruction, operands)
                rounds = 1 if found is None else found
                if found is None:
                    unknown.append(instruction.origin or instruction.name)
                operands = (self._invariants(called[0], operands[0]),)
            for callee in called:
                self._walk(callee, times * rounds, operands, counts, unknown)

    def _value(self, computation: Computation, name: str, known: tuple[_Value, ...]) -> _Value:
        """What an instruction is worth, where that is a number or numbers and plain to see."""
        instruction = computation[name]
        if instruction.opcode == "constant":
            return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None
        if instruction.opcode == "parameter":
            number = int(instruction.inside)
            return known[number] if number < len(known) else None
        if instruction.opcode == "tuple":
            return tuple(self._value(computation, operand, known) for operand in instruction.operands)
        if instruction.opcode == "get-tuple-element":
            whole = self._value(computation, instruction.operands[0], known)
            return whole[int(instruction.attribute(r"index=(\d+)"))] if isinstance(whole, tuple) else None
        if instruction.opcode in _PASSED_ON:
            return self._value(computation, instruction.operands[0], known)
        return None

    def _invariants(self, body: str, start: _Value) -> _Value:
        """Of what a loop starts from, what stays the same in every round."""
        root, computation = self._root(body), self.computations[body]
        if not isinstance(start, tuple) or root.opcode != "tuple":
            return None

        def same(index: int) -> bool:
            element = computation[root.operands[index]]
            return (
                element.opcode == "get-tuple-element"
                and computation[element.operands[0]].opcode == "parameter"
                and int(element.attribute(r"index=(\d+)")) == index
            )

        return tuple(value if same(index) else None for index, value in enumerate(start))

    def _rounds(self, loop: Instruction, start: tuple[_Value, ...]) -> int | None:
        """How often a loop goes round: as XLA says, or from its counter, which goes up by one until its limit."""
        stated = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if stated:
            return int(stated)
        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        compare, computation, known = self._root(condition), self.computations[condition], start
        if compare.opcode == "fusion":
            known = tuple(self._value(computation, operand, start) for operand in compare.operands)
            computation = self.computations[compare.called[0]]
            compare = self._root(compare.called[0])
        if compare.opcode != "compare" or compare.attribute(r"direction=(\w+)") != "LT":
            return None
        first, limit = (self._value(computation, operand, known) for operand in compare.operands)
        return limit - first if isinstance(first, int) and isinstance(limit, int) else None

    def traffic(self) -> int:
        """Bytes that all instructions read from the main memory and write to it.

        What a fusion keeps to itself moves nothing, and of an array that is only sliced, or updated in a slice, that
        slice counts.
        """
        fused = {name for item, _, _ in self.instructions() if item.opcode == "fusion" for name in item.called}
        return sum(
            count * sum(self._moved(instruction, self.computations[name]))
            for name, count in self.executions.items()
            if count and name not in fused
            for instruction in self._lines(name)
            if instruction.opcode not in _FREE and not instruction.opcode.endswith(("-done", "-update"))
        )

    def _moved(self, item: Instruction, computation: Computation) -> Iterator[int]:
        """Bytes of the main memory that an instruction reads and writes."""
        far = lambda arrays: sum(array.bytes for array in arrays if not array.near)
        read = [far(computation[operand].results) for operand in item.operands]
        written = [far([array]) for array in (item.results[:1] if item.opcode.endswith("-start") else item.results)]
        if item.opcode == "fusion":
            body, root = self.computations[item.called[0]], self._root(item.called[0])
            read = [min(size, self._sliced(body, number)) for number, size in enumerate(read)]
            for place, name in enumerate(root.operands if root.opcode == "tuple" else (root.name,)):
                updated = self._updated(body, name)
                if updated is not None:
                    read[updated[0]], written[place] = 0, min(written[place], updated[1])
        elif item.opcode in ("dynamic-slice", "slice", "gather"):
            read[0] = min(read[0], far(item.results))
        elif item.opcode == "dynamic-update-slice":
            read[0], written = 0, read[1:2]
        yield from (*read, *written)

    def _sliced(self, body: Computation, number: int) -> float:
        """Bytes that a fusion reads of a parameter of which it takes slices alone; infinite if it takes all of it."""
        names = [item.name for item in body.values() if item.opcode == "parameter" and int(item.inside) == number]
        size = 0.0
        for name in names:  # Grows by what only renames the parameter.
            for user in (item for item in body.values() if name in item.operands):
                if user.opcode in ("bitcast", "copy"):
                    names.append(user.name)
                elif user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
                    size += user.results[0].bytes
                elif user.opcode == "fusion":
                    size += self._sliced(self.computations[user.called[0]], user.operands.index(name))
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    return math.inf
        return size

    def _updated(self, body: Computation, name: str) -> tuple[int, int] | None:
        """Of a fusion's result that is a parameter with one slice replaced: its number, and bytes of the slice."""
        item = body[self._renamed(body, name)]
        if item.opcode == "fusion":
            inner = self._updated(self.computations[item.called[0]], self._root(item.called[0]).name)
            if inner is None:
                return None
            target, size = item.operands[inner[0]], inner[1]
        elif item.opcode == "dynamic-update-slice":
            target, size = item.operands[0], body[item.operands[1]].results[0].bytes
        else:
            return None
        parameter = body[self._renamed(body, target)]
        return (int(parameter.inside), size) if parameter.opcode == "parameter" else None

    def _renamed(self, body: Computation, name: str) -> str:
        """What a value was before it was only renamed."""
        while body[name].opcode in ("bitcast", "copy"):
            name = body[name].operands[0]
        return name


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return start + match.start()
    raise ValueError(f"unbalanced parentheses in the line {text[:200]!r} of a compiled program")


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(match[1], tuple(int(size) for size in match[2].split(",") if size), "S(1)" in (match[3] or ""))
        for match in _ARRAY.finditer(text)
    )


def _instruction(name: str, text: str, root: bool) -> Instruction:
    text = _COMMENT.sub("", text)
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=text[end:opening].strip(),
        results=_arrays(text[:end]),
        operands=tuple(_NAMES.findall(inside)),
        inside=inside.strip(),
        attributes=text[closing + 1 :],
        root=root,
    )


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` shows.

    Raises:
      ValueError: it is not the text of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(line)
        if found:
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError("no ENTRY computation in the text of the compiled program: expected compiled.as_text()")
    return Program(computations, entry)
