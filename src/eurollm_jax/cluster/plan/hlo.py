"""Reads the text of a compiled program: its instructions, and how often each is executed.

XLA states a program as computations of typed instructions. Loops name their bodies, and conditionals their branches, so
the times that an instruction runs are the product of the loops around it.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
NARROW = 1  # bytes of the 8-bit floats, whose names all begin with f8

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(\(.*->.*)?\{\s*$")
_START = re.compile(r"^\s+(ROOT\s+)?%?([\w.\-]+) = ")
_CALLED = {
    "fusion": ("calls",),
    "call": ("to_apply",),
    "async-start": ("calls",),
}


@dataclass(frozen=True)
class Array:
    """The type of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return self.size * WIDTHS.get(self.dtype, NARROW)


@dataclass(frozen=True)
class Instruction:
    name: str
    operation: str
    results: tuple[Array, ...]  # of a tuple, all that is in it
    operands: tuple[str, ...]  # names; of a constant or a parameter, what stands in its brackets
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """What stands after `name=`, up to the next attribute."""
        found = re.search(rf"(?:^|[\s,]){name}=", self.attributes)
        return None if found is None else _first(self.attributes[found.end() :])


@dataclass(frozen=True)
class Computation:
    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {found.name: found for found in self.instructions}

    @cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        users: dict[str, list[Instruction]] = {}
        for found in self.instructions:
            for operand in dict.fromkeys(found.operands):
                users.setdefault(operand, []).append(found)
        return {name: tuple(found) for name, found in users.items()}

    def parameter(self, place: int) -> Instruction:
        return next(one for one in self.instructions if one.operation == "parameter" and one.operands == (str(place),))

    def operand_types(self, instruction: Instruction) -> tuple[Array, ...]:
        return tuple(array for name in instruction.operands for array in self.by_name[name].results)


@dataclass(frozen=True)
class Executed:
    """An instruction, where it stands, and how often a run of the program executes it."""

    computation: Computation
    instruction: Instruction
    times: int
    certain: bool  # False inside a loop whose length depends on data, which is counted as one round


@dataclass(frozen=True)
class Module:
    entry: str
    computations: Mapping[str, Computation]

    def inside(self, fusion: Instruction) -> Computation:
        return self.computations[_name(fusion.attribute("calls"))]

    def executed(self) -> Iterator[Executed]:
        """All that runs, the insides of fusions too; of a conditional the branch with most instructions, which in a
        train step is the one that takes the step."""
        return self._executed(self.entry, 1, True)

    def _executed(self, name: str, times: int, certain: bool) -> Iterator[Executed]:
        computation = self.computations[name]
        for found in computation.instructions:
            yield Executed(computation, found, times, certain)
            if found.operation == "while":
                rounds = self.rounds(found)
                body = _name(found.attribute("body"))
                yield from self._executed(body, times * (rounds or 1), certain and rounds is not None)
            elif found.operation == "conditional":
                yield from self._executed(max(_branches(found), key=self._length), times, certain)
            else:
                for attribute in _CALLED.get(found.operation, ()):
                    yield from self._executed(_name(found.attribute(attribute)), times, certain)

    def rounds(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body; None where it depends on data."""
        known = re.search(r'"known_trip_count":\s*\{"n":\s*"?(\d+)"?', loop.attributes)
        return int(known[1]) if known else self._rounds_of(_name(loop.attribute("condition")))

    def _rounds_of(self, condition: str) -> int | None:
        """Of a loop that counts from 0 up to a constant, as those of scans do."""
        computation = self.computations[condition]
        root = next(found for found in computation.instructions if found.root)
        if root.operation != "compare" or root.attribute("direction") != "LT":
            return None
        limit = computation.by_name[root.operands[-1]]
        return int(limit.operands[0]) if limit.operation == "constant" else None

    def _length(self, name: str) -> int:
        """Instructions of a computation and of all that it calls."""
        length = 0
        for found in self.computations[name].instructions:
            called = [_name(found.attribute(attribute)) for attribute in _CALLED.get(found.operation, ())]
            if found.operation == "while":
                called = [_name(found.attribute("body"))]
            elif found.operation == "conditional":
                called = list(_branches(found))
            length += 1 + sum(map(self._length, called))
        return length


def parse(text: str) -> Module:
    """The module that XLA printed; ValueError where there is no entry."""
    computations: dict[str, Computation] = {}
    entry, name, found = None, None, list[Instruction]()
    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header and not line.startswith("HloModule"):
                name, found = header[2], []
                entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(found))
            name = None
        elif start := _START.match(line):
            found.append(_instruction(start[2], line[start.end() :], root=bool(start[1])))
    if entry is None:
        raise ValueError("the text holds no ENTRY computation")
    return Module(entry, computations)


def product_flops(module: Module) -> float:
    """Floating-point operations of the products that the program states, loops included."""
    return sum(found.times * _product(found) for found in module.executed() if found.instruction.operation == "dot")


def _product(found: Executed) -> float:
    left = found.computation.by_name[found.instruction.operands[0]].results[0]
    contracted = found.instruction.attribute("lhs_contracting_dims") or "{}"
    inner = math.prod(left.shape[int(axis)] for axis in re.findall(r"\d+", contracted))
    return 2.0 * found.instruction.results[0].size * inner


def _instruction(name: str, rest: str, *, root: bool) -> Instruction:
    kind = _first(rest, " ")
    rest = rest[len(kind) :].lstrip()
    operation = rest[: rest.index("(")]
    inside = _bracket(rest[len(operation) :])
    operands = _parts(inside)
    if operation not in ("constant", "parameter"):
        operands = [operand.split()[-1].lstrip("%") for operand in operands]
    attributes = rest[len(operation) + len(inside) + 2 :].lstrip(", ")
    results = tuple(Array(dtype, _sizes(sizes)) for dtype, sizes in _ARRAY.findall(kind))
    return Instruction(name, operation, results, tuple(operands), attributes, root)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


_OPEN, _CLOSE = "([{", ")]}"


def _first(text: str, end: str = ",") -> str:
    """`text` up to the first `end` outside brackets; comments in types do not count."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth < 0 or (depth == 0 and letter == end):
            return text[:at].strip()
    return text.strip()


def _bracket(text: str) -> str:
    """What stands in the bracket that `text` begins with."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _CLOSE)
        if depth == 0:
            return text[1:at]
    raise ValueError(f"a bracket is not closed: {text[:80]}")


def _parts(text: str) -> list[str]:
    parts = []
    while text:
        part = _first(text)
        parts.append(re.sub(r"/\*.*?\*/", "", part).strip())
        text = text[text.index(part) + len(part) :].lstrip().removeprefix(",").lstrip()
        if not part:
            break
    return [part for part in parts if part]


def _name(value: str | None) -> str:
    assert value is not None
    return value.strip().lstrip("%")


def _branches(conditional: Instruction) -> tuple[str, ...]:
    named = conditional.attribute("branch_computations")
    if named is not None:
        return tuple(_name(branch) for branch in named.strip("{}").split(","))
    return tuple(_name(conditional.attribute(f"{side}_computation")) for side in ("true", "false"))
