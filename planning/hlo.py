"""Parses the text of a compiled program (HLO): instructions, shapes, device groups."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {
    'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 'f8e4m3fn': 8, 'f8e5m2': 8, 's16': 16,
    'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64,
    'f64': 64,
}  # fmt: skip

_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_HEADER = re.compile(r'(ENTRY )?(%[\w.\-]+) \(.*->.*\{$')
_END = re.compile(r'\}(?:, execution_thread="\w+")?')
_NAME = re.compile(r'\s+(?:ROOT )?(%[\w.\-]+) = (.*)$', re.DOTALL)
_CALLED = re.compile(r'(?:calls|to_apply)=(%[\w.\-]+)|called_computations=\{([^}]*)\}')
_STAGE = re.compile(r'(.+)-(start|update|done)')
_MESH = re.compile(
    r'replica_groups=mesh\[([^\]]*)\]'
    r'(?:, device_ids=\((?:\[([\d,]+)\]T\()?([\d,]+)\)?\))? \{([^}]*)\}'
)


class UnknownFormError(ValueError):
    """The text of a program holds what cannot be read here, and would count as nothing."""


# ---------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `name = shape op(operands), attributes`."""

    name: str
    shape: str  # of the result
    op: str
    text: str  # everything after the shape

    def computation(self, attribute: str) -> str:
        """Returns the name of the computation that an attribute refers to."""
        return re.search(attribute + r'=(%[\w.\-]+)', self.text).group(1)

    @property
    def called(self) -> list[str]:
        """The names of the computations that it calls or applies."""
        found = _CALLED.findall(self.text)
        return [name for one, several in found for name in (one or several).split(', ') if name]

    @property
    def kind(self) -> str:
        """Its operation; of an asynchronous one without its stage: 'call' of 'call-start'."""
        staged = _STAGE.fullmatch(self.op)
        return staged[1] if staged else self.op

    @property
    def stage(self) -> str:
        """'start', 'update' or 'done' of an asynchronous operation; '' of any other."""
        staged = _STAGE.fullmatch(self.op)
        return staged[2] if staged else ''

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        arguments = self.text[len(self.op) :]
        return re.findall(r'%[\w.\-]+', arguments[: _closing(arguments)])


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of an HLO module by name, each a list of instructions, and its entry."""

    computations: dict[str, list[Instruction]]
    entry: str

    @functools.cached_property
    def shapes(self) -> dict[str, str]:
        """The shape of each instruction's result, by the instruction's name."""
        return {i.name: i.shape for each in self.computations.values() for i in each}

    def instructions(self, computation: str) -> list[Instruction]:
        """Returns a computation's instructions; none if the text does not define it."""
        return self.computations.get(computation, [])

    def all_instructions(self, computation: str) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of all that it calls."""
        for i in self.instructions(computation):
            yield i
            for called in i.called:
                yield from self.all_instructions(called)


def parse(text: str) -> Program:
    """Parses the text of an HLO module. Raises ValueError if it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, computation, pending = '', None, ''

    def finish() -> None:
        instruction = _instruction(pending) if pending else None
        if instruction and computation is not None:
            computation.append(instruction)

    for line in text.splitlines():
        header = _HEADER.match(line.rstrip())
        if header:
            computation, pending = computations.setdefault(header.group(2), []), ''
            entry = header.group(2) if header.group(1) else entry
        elif _END.fullmatch(line.rstrip()):
            finish()
            computation, pending = None, ''
        elif line.startswith('  ') and ' = ' in line:
            finish()
            pending = line
        else:  # the metadata of a kernel may hold line breaks
            pending += line
    if not entry:
        raise ValueError('no ENTRY computation: this is not the text of an HLO module')
    return Program(computations, entry)


def _instruction(line: str) -> Instruction | None:
    """Parses one instruction; None if the line holds none."""
    match = _NAME.match(line)
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest) + 1 if rest.startswith('(') else rest.find(' ')
    shape, rest = rest[:end], rest[end:].strip()
    op = re.match(r'[\w\-]+(?=\()', rest)
    return Instruction(name, shape, op.group(), rest) if op else None


def _closing(text: str) -> int:
    """Returns the index at which the parenthesis that opens the text closes."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == '(') - (c == ')')
        if depth == 0:
            return i
    return len(text) - 1


# ---------------------------------------------------------------------------------------------
# Shapes and device groups
# ---------------------------------------------------------------------------------------------


def dimensions(shape: str) -> list[int]:
    """Returns the dimensions of the first array in a shape."""
    return [int(d) for d in _ARRAY.search(shape)[2].split(',') if d]


def array_bytes(shape: str) -> float:
    """Returns the bytes of all arrays in a shape."""
    return sum(
        math.prod(int(d) for d in dims.split(',') if d) * BITS[kind] / 8
        for kind, dims in _ARRAY.findall(shape)
        if kind in BITS
    )


def device_groups(text: str) -> list[list[int]]:
    """Returns the device groups of a collective, or the pairs of a permute; [] if it names none.

    HLO lists groups as {{0,1},{2,3}}, or as [groups,size]<=[dims]T(order): the device numbers in
    an array of shape dims, transposed, and reshaped to groups of that size; or as the axes of a
    mesh of its own along which the devices of a group lie (`mesh_groups`). Raises UnknownFormError
    if it names them in another way.
    """
    listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}', text)
    if listed:
        return [[int(i) for i in g.split(',')] for g in re.findall(r'\{([\d,]+)\}', listed[1])]
    named = _MESH.search(text)
    if named:
        return mesh_groups(*named.groups())
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if not iota:
        named = re.search(r'(?:replica_groups|source_target_pairs)=(?!\{\})\S.{,60}', text)
        if named:
            raise UnknownFormError(f'device groups written as {named[0]!r}')
        return []
    shape, dims, order = ([int(i) for i in g.split(',')] if g else None for g in iota.groups())
    devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return devices.reshape(shape).tolist()


def mesh_groups(mesh: str, dims: str | None, order: str | None, axes: str) -> list[list[int]]:
    """Returns the groups of mesh['a'=2,'b'=8], device_ids=([dims]T(order)) {'a','b':(2)4}.

    The partitioner writes them so. Devices are numbered in a row, unless device_ids gives their
    order: as numbers, or as an array of shape dims, transposed. 'b':(2)4 is a part of axis b: its
    numbers, split into [2, 4, ...], along the second dimension.
    """
    sizes = {name: int(size) for name, size in re.findall(r"([^,=']+)'?=(\d+)", mesh)}
    devices = np.arange(math.prod(sizes.values()))
    if order:
        numbers = [int(i) for i in order.split(',')]
        shape = [int(d) for d in dims.split(',')] if dims else []
        devices = devices.reshape(shape).transpose(numbers).ravel() if dims else np.array(numbers)
    shape = list(sizes.values())
    place = dict(zip(sizes, np.unravel_index(np.arange(len(devices)), shape), strict=True))
    within, members = np.zeros_like(devices), 1
    for name, before, size in re.findall(r"([^,:']+)'?(?::\((\d+)\)(\d+))?", axes):
        size = int(size or sizes[name])
        stride = sizes[name] // (int(before or 1) * size)
        along = place[name] // stride % size
        place[name] = place[name] - along * stride
        within, members = within * size + along, members * size
    group = np.ravel_multi_index(list(place.values()), shape)
    return devices[np.lexsort((within, group))].reshape(-1, members).tolist()
