"""The text of a compiled program (HLO), taken apart."""

import dataclasses
import math
import re

import numpy as np

BITS = {
    'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 'f8e4m3fn': 8, 'f8e5m2': 8, 's16': 16,
    'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64,
    'f64': 64,
}  # fmt: skip

_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')


_HEADER = re.compile(r'(ENTRY )?(%[\w.\-]+) \(.*->.*\{$')


_NAME = re.compile(r'\s+(?:ROOT )?(%[\w.\-]+) = (.*)$', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # of the result
    op: str
    text: str  # all after the shape

    def named(self, attribute: str) -> str:
        """The computation that an attribute names."""
        return re.search(attribute + r'=(%[\w.\-]+)', self.text).group(1)

    @property
    def operands(self) -> list[str]:
        """Their names."""
        arguments = self.text[len(self.op) :]
        return re.findall(r'%[\w.\-]+', arguments[: _closing(arguments)])


Program = dict[str, list[Instruction]]  # instructions of each computation


def parse(text: str) -> tuple[Program, str]:
    """The computations of an HLO module's text, and the name of the entry."""
    program: Program = {}
    entry, computation, pending = '', None, ''

    def finish() -> None:
        instruction = _instruction(pending) if pending else None
        if instruction and computation is not None:
            computation.append(instruction)

    for line in text.splitlines():
        header = _HEADER.match(line.rstrip())
        if header:
            computation, pending = program.setdefault(header.group(2), []), ''
            entry = header.group(2) if header.group(1) else entry
        elif line.rstrip() == '}':
            finish()
            computation, pending = None, ''
        elif line.startswith('  ') and ' = ' in line:
            finish()
            pending = line
        else:  # the metadata of a kernel may hold line breaks
            pending += line
    if not entry:
        raise ValueError('no ENTRY computation: this is not the text of an HLO module')
    return program, entry


def _instruction(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest) + 1 if rest.startswith('(') else rest.find(' ')
    shape, rest = rest[:end], rest[end:].strip()
    op = re.match(r'[\w\-]+(?=\()', rest)
    return Instruction(name, shape, op.group(), rest) if op else None


def _closing(text: str) -> int:
    """Where the bracket that the text starts with closes."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == '(') - (c == ')')
        if depth == 0:
            return i
    return len(text) - 1


def dimensions(shape: str) -> list[int]:
    """Of the first array of a shape."""
    return [int(d) for d in _ARRAY.search(shape)[2].split(',') if d]


def array_bytes(shape: str) -> float:
    """Bytes of all arrays in a shape."""
    return sum(
        math.prod(int(d) for d in dims.split(',') if d) * BITS[kind] / 8
        for kind, dims in _ARRAY.findall(shape)
        if kind in BITS
    )


def groups(text: str) -> list[list[int]]:
    """The device groups of a collective, or the pairs of a permute; [] if it names none.

    HLO writes groups out, {{0,1},{2,3}}, or as [groups,size]<=[dims]T(order): the devices' numbers
    as an array of dims, transposed, and cut into groups.
    """
    listed = re.search(r'(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}', text)
    if listed:
        return [[int(i) for i in g.split(',')] for g in re.findall(r'\{([\d,]+)\}', listed[1])]
    iota = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
    if not iota:
        return []
    shape, dims, order = ([int(i) for i in g.split(',')] if g else None for g in iota.groups())
    devices = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return devices.reshape(shape).tolist()
