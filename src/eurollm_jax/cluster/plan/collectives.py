"""What a compiled step sends: each collective, the mesh axes that it runs along, and the bytes of each device.

Bytes are those of the algorithms that send least (Thakur et al. 2005, doi.org/10.1177/1094342005051521): of n devices
each sends (n-1)/n of the whole result in a gather, of the whole operand in a reduce-scatter or an all-to-all, and both
in an all-reduce. A group that spans k nodes moves as much between nodes as if each node were one device.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from eurollm_jax.cluster.plan.hlo import Array, Computation, Executed, Instruction, Module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
_MOVES = ("bitcast", "convert", "copy", "reshape", "transpose")  # change how an array is written, not what is in it


type Callers = tuple[tuple[Computation, Instruction], ...]  # fusions around a computation, the innermost first


@dataclass(frozen=True)
class Collective:
    """One collective of a step, or several alike; all figures are of one device."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which it runs
    devices: int  # of a group
    nodes: int  # that a group spans
    dtype: str
    operand: float  # bytes that go in, each time
    times: int  # a step
    certain: bool = True  # False where it stands in a loop whose length depends on data, counted once
    pairs: float = 1.0  # of a permutation, the share of the devices that send

    @property
    def each(self) -> float:
        """Bytes that a device sends each time."""
        return self._sent(self.devices)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return self.times * self.each

    @property
    def per_node(self) -> int:
        """Devices of a group that stand in one node."""
        return 1 if self.kind == "collective-permute" else -(-self.devices // self.nodes)

    @property
    def sent_between_nodes(self) -> float:
        """Bytes that the devices of a group in one node together send to other nodes in a step."""
        if self.nodes == 1:
            return 0.0
        if self.kind == "collective-permute":
            return self.sent
        together = self.per_node if self.kind == "all-to-all" else 1
        return self.times * together * self._whole * _share(self.kind, self.nodes)

    @property
    def sent_within_node(self) -> float:
        """Bytes that a device sends to others of its node in a step, where a node's devices share what they fetch."""
        if self.kind == "collective-permute":
            return self.sent if self.nodes == 1 else 0.0
        of_all = self.per_node / self.devices if self.kind == "all-to-all" else 1.0
        return self.times * of_all * self._whole * _share(self.kind, self.per_node)

    @property
    def _whole(self) -> float:
        """Bytes of the whole: a gather's result, or any other's operand."""
        return self.operand * (self.devices if self.kind == "all-gather" else 1)

    def _sent(self, devices: int) -> float:
        if self.kind == "collective-permute":
            return self.operand * self.pairs
        return self._whole * _share(self.kind, devices)


def _share(kind: str, parts: int) -> float:
    return (2 if kind == "all-reduce" else 1) * (parts - 1) / parts


@dataclass(frozen=True)
class Machine:
    """How the devices of a program stand: along the axes of its mesh, the last one fastest, and in nodes."""

    mesh: Mapping[str, int]
    devices_per_node: int

    @cached_property
    def places(self) -> np.ndarray:
        """[devices, axes]"""
        shape = tuple(self.mesh.values())
        return np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), -1)

    def axes(self, groups: np.ndarray) -> tuple[str, ...]:
        """Along which the members of a group, [groups, members], differ."""
        places = self.places[groups]
        differs = (places != places[:, :1]).any((0, 1))
        return tuple(name for name, along in zip(self.mesh, differs, strict=True) if along)

    def nodes(self, groups: np.ndarray) -> int:
        """That a group spans at most."""
        return max(len(np.unique(group)) for group in groups // self.devices_per_node)


def collectives(module: Module, machine: Machine, *, for_gpu: bool) -> tuple[Collective, ...]:
    """All collectives of a step that send something, those alike added up, the largest first.

    With `for_gpu`, what XLA does for CPUs alone is undone: what was bfloat16 before it was widened to be sent counts as
    bfloat16, and an all-reduce of which each device uses its own part alone as the reduce-scatter that it is on GPUs.
    """
    found: dict[Collective, int] = {}
    for executed in module.executed():
        for collective in _of(module, executed, machine, for_gpu=for_gpu):
            alike = replace(collective, times=0)
            found[alike] = found.get(alike, 0) + collective.times
    counted = [replace(alike, times=times) for alike, times in found.items() if alike.devices > 1]
    return tuple(sorted(counted, key=lambda one: (-one.sent, one.kind, one.axes)))


def _of(module: Module, executed: Executed, machine: Machine, *, for_gpu: bool) -> list[Collective]:
    instruction, computation = executed.instruction, executed.computation
    kind = instruction.operation.removesuffix("-start")
    if kind not in KINDS:
        return []
    operands = computation.operand_types(instruction)
    if for_gpu and len(operands) == len(instruction.operands):
        named = zip(instruction.operands, operands, strict=True)
        operands = tuple(_stated(module, computation, name, array) for name, array in named)
    if kind == "collective-permute":
        return [one for array in operands for one in _permutation(instruction, array, executed, machine)]
    groups = replica_groups(instruction.attribute("replica_groups") or "{}", machine)
    parts = [0] * len(operands)
    if for_gpu and kind == "all-reduce":
        parts = _used_parts(module, computation, instruction, len(operands))
    axes, nodes, size = machine.axes(groups), machine.nodes(groups), groups.shape[1]
    return [
        Collective(
            "reduce-scatter" if 0 < part * size <= array.size else kind,
            axes,
            size,
            nodes,
            array.dtype,
            array.bytes,
            executed.times,
            executed.certain,
        )
        for array, part in zip(operands, parts, strict=True)
    ]


def _permutation(instruction: Instruction, array: Array, executed: Executed, machine: Machine) -> list[Collective]:
    """Its pairs within a node and those between nodes, each by itself."""
    listed = re.findall(r"\d+", instruction.attribute("source_target_pairs") or "")
    pairs = np.array(listed, int).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    node = pairs // machine.devices_per_node
    found = []
    for nodes, some in ((1, pairs[node[:, 0] == node[:, 1]]), (2, pairs[node[:, 0] != node[:, 1]])):
        if len(some):
            share = len(some) / len(machine.places)
            how = (2, nodes, array.dtype, array.bytes, executed.times, executed.certain, share)
            found.append(Collective("collective-permute", machine.axes(some), *how))
    return found


def replica_groups(text: str, machine: Machine) -> np.ndarray:
    """[groups, members]: of a list, `{{0,1},{2,3}}`, of the short form `[2,2]<=[4]`, with `T(1,0)` where axes are
    turned, or `mesh['a'=2,'b'=2] {'b'}`, the axes along which members differ; `'b':(2)4` is the part of `b` of size 4
    that has 2 before it."""
    if named := re.match(r"mesh\[(.*?)\]\s*\{(.*?)\}", text):
        return _along_axes(dict(re.findall(r"'([^']+)'=(\d+)", named[1])), named[2])
    if short := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, of, turned = ([int(n) for n in part.split(",")] if part else None for part in short.groups())
        order = np.arange(math.prod(of or ())).reshape(of or ())
        return (order if turned is None else order.transpose(turned)).reshape(shape or ())
    listed = [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(listed) if listed else np.arange(len(machine.places))[None]


def _along_axes(sizes: Mapping[str, str], chosen: str) -> np.ndarray:
    shape: list[int] = []
    along: list[int] = []
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(chosen)}
    for name, text in sizes.items():
        size = int(text)
        before, own = parts.get(name, (size, 1))
        own = own or size
        shape += [before, own, size // before // own]
        if name in parts:
            along.append(len(shape) - 2)
    order = np.arange(math.prod(shape)).reshape(shape)
    members = math.prod(shape[axis] for axis in along)
    return np.moveaxis(order, along, range(-len(along), 0)).reshape(-1, members)


def _used_parts(module: Module, computation: Computation, instruction: Instruction, count: int) -> list[int]:
    """Of each result of an instruction, the elements of the slices that are all that is used of it; 0 where it is used
    otherwise."""
    if count == 1:
        return [_used_part(module, computation, instruction.name)]
    used = [0] * count
    for user in computation.users.get(instruction.name, ()):
        if user.operation != "get-tuple-element":
            return [0] * count
        used[int(user.attribute("index") or 0)] = _used_part(module, computation, user.name)
    return used


def _used_part(module: Module, computation: Computation, name: str, callers: Callers = ()) -> int:
    """The elements of the largest slice that is taken of a value at a place of the device's own; 0 where the value is
    used in another way, too."""
    if computation.by_name[name].root:
        return _used_part(module, *_outside(callers)) if callers else 0
    largest = 0
    for user in computation.users.get(name, ()):
        if user.operation == "dynamic-slice" and user.operands[0] == name:
            part = user.results[0].size
        elif user.operation in (*_MOVES, "all-reduce-done"):
            part = _used_part(module, computation, user.name, callers)
        elif user.operation == "fusion" and user.operands.count(name) == 1:
            inside = module.inside(user)
            inner = inside.parameter(user.operands.index(name))
            part = _used_part(module, inside, inner.name, ((computation, user), *callers))
        else:
            return 0
        if not part:
            return 0
        largest = max(largest, part)
    return largest


def _outside(callers: Callers) -> tuple[Computation, str, Callers]:
    (computation, fusion), *others = callers
    return computation, fusion.name, tuple(others)


def _stated(module: Module, computation: Computation, name: str, array: Array) -> Array:
    """The array in the type that the program states: XLA for CPUs widens bfloat16 just before it is sent."""
    callers: Callers = ()
    while True:
        found = computation.by_name[name]
        if found.operation == "fusion" and len(found.results) == 1:
            callers = ((computation, found), *callers)
            computation = module.inside(found)
            name = next(inner.name for inner in computation.instructions if inner.root)
        elif found.operation in _MOVES:
            name = found.operands[0]
            (before,) = computation.by_name[name].results
            if found.operation == "convert" and before.dtype in ("bf16", "f16") and array.dtype == "f32":
                return replace(array, dtype=before.dtype)
        elif found.operation == "parameter" and callers:
            (computation, fusion), *others = callers
            name, callers = fusion.operands[int(found.operands[0])], tuple(others)
        else:
            return array


def total(found: Sequence[Collective]) -> float:
    """Bytes that a device sends in a step."""
    return math.fsum(one.sent for one in found)
