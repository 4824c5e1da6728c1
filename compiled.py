"""Compiles a training step for chips that are not there, and reads what the compiler made of it.

The TPU compiler schedules the whole program and notes what it expects each instruction to take
(`estimated_cycles`). Nothing nearer to a measurement can be had without the chips:

    compute   those cycles, each times the trips of the loops around it
    network   the bytes that a device sends for each collective, by kind and by mesh axes
    exposed   the part of them that no asynchronous pair of instructions lets overlap with compute

Of a conditional, the costliest branch counts. The kernels of splash attention carry no estimate:
their causal matmuls count at `KERNEL_EFFICIENCY` of the peak; other kernels without one count
nothing, and their number is said. Good for comparing two programs that were compiled alike.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from chips import Chip
from memory import out_of_memory_explained
from parallel import AXES, make_mesh
from steps import lower_train_step

KERNEL_EFFICIENCY = 0.35  # of splash attention's causal matmuls
KINDS = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
BITS = {
    'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 'f8e4m3fn': 8, 'f8e5m2': 8, 's16': 16,
    'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32, 'u32': 32, 'f32': 32, 's64': 64, 'u64': 64,
    'f64': 64,
}  # fmt: skip

_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]')
_HEADER = re.compile(r'(ENTRY )?(%[\w.\-]+) \(.*->.*\{$')
_NAME = re.compile(r'\s+(?:ROOT )?(%[\w.\-]+) = (.*)$', re.DOTALL)
_CALLED = re.compile(r'(?:calls|to_apply)=(%[\w.\-]+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CONSTANT = re.compile(r'constant\((-?\d+)\)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # of the result
    op: str
    text: str  # all after the shape

    def named(self, attribute: str) -> str:
        """The computation that an attribute names."""
        return re.search(attribute + r'=(%[\w.\-]+)', self.text).group(1)


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


def array_bytes(shape: str) -> float:
    """Bytes of all arrays in an HLO shape."""
    return sum(
        math.prod(int(d) for d in dims.split(',') if d) * BITS[kind] / 8
        for kind, dims in _ARRAY.findall(shape)
        if kind in BITS
    )


# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------


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


def mesh_axes(groups: Iterable[list[int]], mesh: Mesh) -> str:
    """The mesh axes that the devices of a group differ in, as 'fsdp' or 'dp+fsdp'."""
    first = np.array(list(groups) or [[0]])
    places = np.stack(np.unravel_index(first, mesh.devices.shape), axis=-1)
    moved = (places != places[:, :1]).any(axis=(0, 1))
    return '+'.join(name for name, m in zip(mesh.axis_names, moved, strict=True) if m) or 'none'


@dataclasses.dataclass
class Traffic:
    """What one device sends for the collectives of one kind over the same axes, in a step."""

    count: float = 0.0
    bytes: float = 0.0
    exposed: float = 0.0  # bytes of those that are not asynchronous

    def add(self, other: 'Traffic', times: float) -> None:
        self.count += times * other.count
        self.bytes += times * other.bytes
        self.exposed += times * other.exposed


def bytes_sent(kind: str, shape: str, size: int, asynchronous: bool) -> float:
    """What one device sends in a ring of `size`; the shape of the start of an asynchronous pair
    holds the input as well as the output."""
    out, others = array_bytes(shape), size - 1
    if kind == 'collective-permute':
        return out / 2 if asynchronous else out
    if kind == 'all-reduce':
        return 2 * out * others / size
    if kind == 'reduce-scatter':
        return out * others
    if kind == 'all-gather' and asynchronous:
        return out * others / (size + 1)
    return out * others / size


# ---------------------------------------------------------------------------------------------
# The cost of a program
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cost:
    cycles: float = 0.0  # of one core or of the two that act as one
    kernel_cycles: float = (
        0.0  # of those, splash attention's, which are ours and not the compiler's
    )
    unpriced: float = 0.0  # kernels without an estimate
    traffic: dict[tuple[str, str], Traffic] = dataclasses.field(default_factory=dict)

    def add(self, other: 'Cost', times: float = 1.0) -> None:
        self.cycles += times * other.cycles
        self.kernel_cycles += times * other.kernel_cycles
        self.unpriced += times * other.unpriced
        for key, traffic in other.traffic.items():
            self.traffic.setdefault(key, Traffic()).add(traffic, times)

    def total(self) -> Traffic:
        total = Traffic()
        for traffic in self.traffic.values():
            total.add(traffic, 1)
        return total


class Reader:
    """Adds up a program's cost, computation by computation."""

    def __init__(self, text: str, mesh: Mesh, flops_per_cycle: float):
        self.program, self.entry = parse(text)
        self.mesh, self.flops_per_cycle = mesh, flops_per_cycle
        self.known: dict[str, Cost] = {}

    def cost(self, computation: str = '') -> Cost:
        """Of one computation and all that it calls; by default of the program."""
        name = computation or self.entry
        if name not in self.known:
            self.known[name] = total = Cost()
            for instruction in self.program.get(name, []):
                self._add(instruction, total)
        return self.known[name]

    def _add(self, i: Instruction, total: Cost) -> None:
        if i.op == 'while':
            total.add(self.cost(i.named('body')), self.trips(i.named('condition')))
        elif i.op == 'conditional':
            total.add(max((self.cost(b) for b in _branches(i)), key=_weight))
        elif i.op == 'call':
            total.add(self.cost(i.named('to_apply')))
        else:
            cycles = _CYCLES.search(i.text)
            if cycles:
                total.cycles += int(cycles.group(1))
            elif i.op == 'custom-call' and '"tpu_custom_call"' in i.text:
                kernel = attention_flops(i) / (self.flops_per_cycle * KERNEL_EFFICIENCY)
                total.cycles += kernel
                total.kernel_cycles += kernel
                total.unpriced += kernel == 0
            for kind, found, asynchronous in self.collectives(i):
                self._add_traffic(total, kind, found, asynchronous)

    def _add_traffic(self, total: Cost, kind: str, i: Instruction, asynchronous: bool) -> None:
        members = groups(i.text)
        size = len(members[0]) if members else 2
        sent = bytes_sent(kind, i.shape, size, asynchronous)
        key = (kind, mesh_axes(members, self.mesh))
        one = Traffic(1, sent, 0 if asynchronous else sent)
        total.traffic.setdefault(key, Traffic()).add(one, 1)

    def trips(self, condition: str) -> int:
        """Of a loop, from the largest constant that its condition compares with."""
        constants = []
        for i in self.program.get(condition, []):
            inner = [j for c in _CALLED.findall(i.text) for j in self.program.get(c, [])]
            constants += [
                int(_CONSTANT.search(j.text).group(1))
                for j in (i, *inner)
                if j.op == 'constant' and _CONSTANT.search(j.text)
            ]
        return max(constants, default=1)

    def collectives(self, i: Instruction) -> Iterator[tuple[str, Instruction, bool]]:
        """(kind, instruction, whether it overlaps): this one, or those within a fusion."""
        kind = i.op.removesuffix('-start')
        if kind in KINDS:
            yield kind, i, i.op.endswith('-start')
        elif i.op in ('fusion', 'async-start'):
            for called in _CALLED.findall(i.text):
                overlaps = i.op == 'async-start' or 'async' in i.name or 'async' in called
                for inner in self._within(called):
                    kind = inner.op.removesuffix('-start')
                    if kind in KINDS:
                        yield kind, inner, overlaps

    def _within(self, computation: str) -> Iterator[Instruction]:
        for i in self.program.get(computation, []):
            yield i
            for called in _CALLED.findall(i.text):
                yield from self._within(called)


def _weight(cost: Cost) -> float:
    return cost.cycles + cost.total().bytes


def _branches(i: Instruction) -> list[str]:
    listed = re.search(r'branch_computations=\{([^}]*)\}', i.text)
    if listed:
        return listed.group(1).split(', ')
    return re.findall(r'(?:true|false)_computation=(%[\w.\-]+)', i.text)


def attention_flops(i: Instruction) -> float:
    """FLOPs of a kernel of splash attention, causal, from its name and its largest bfloat16 array
    of heads [(B,) N, T, H]; 0 for any other kernel."""
    matmuls = {'mha_fwd': 2, 'mha_dkv': 4, 'mha_dq': 3}
    n = next((n for part, n in matmuls.items() if part in i.name), 0)
    if 'mha_dkv' in i.name and re.search(r'fused_bwd_kernel\\*": true', i.text):
        n = 5
    arrays = re.findall(r'bf16\[((?:\d+,)?\d+,\d+,\d+)\]', i.shape + i.text)
    if not n or not arrays:
        return 0.0
    *front, T, H = max(
        ([int(d) for d in a.split(',')] for a in arrays),
        key=lambda d: math.prod(d) // d[-2],
    )
    return n * 2 * math.prod(front) * T * T * H / 2


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a training step. Bytes and cycles of one device."""

    topology: str
    seconds: float  # to compile
    arguments: float  # state and batch
    temporary: float
    peak: float  # both, and results that do not take the arguments' place
    cost: Cost | None  # None: the program's text is not to be had
    why: str = ''  # it is not


def topology_devices(name: str) -> list[jax.Device]:
    """The chips of a topology such as 'v4:2x4x4', which need not be there.

    Raises ValueError if libtpu is missing or knows no such topology.
    """
    # Nothing is loaded onto a TPU: a training run on the same machine may go on.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no questions to a metadata server
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError('--compile takes libtpu: pip install -r requirements-tpu.txt')
    from jax.experimental import topologies

    # v4 by default gives each core of a chip as a device.
    megacore = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **megacore).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f'libtpu has no topology {name!r} ({str(error).splitlines()[0]}); use one as v4:2x4x4, '
            f'v5e:4x4, v5p:2x2x4 or v6e:4x4'
        ) from error


def compile_step(config: ConfigDict, topology: str, chip: Chip) -> Compiled:
    """Compiles the training step of a config for the first devices of a topology.

    Raises ValueError if the topology has too few, OutOfMemoryError if the program does not fit.
    """
    devices = topology_devices(topology)
    needed = math.prod(config.mesh[axis] for axis in AXES)
    if needed > len(devices):
        raise ValueError(
            f'the mesh takes {needed} devices and {topology} has {len(devices)}; use a smaller '
            f'mesh or a larger topology'
        )
    mesh = make_mesh(config.mesh, devices[:needed])
    start = time.perf_counter()
    lowered = lower_train_step(config, mesh)
    with out_of_memory_explained(config):
        step = lowered.compile()
    seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost, why = None, ''
    try:
        text = step.as_text()
    except jax.errors.JaxRuntimeError as error:  # seen with asynchronous instructions
        why = str(error).splitlines()[0]
    else:
        per_cycle = chip.flops / chip.clock if chip.clock else math.inf
        cost = Reader(text, mesh, per_cycle).cost()
    peak = arguments + temporary + new
    return Compiled(topology, seconds, arguments, temporary, peak, cost, why)
