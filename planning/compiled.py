"""Compiles a training step for chips that are not there, and reads what the compiler made of it.

Both compilers schedule the whole program. Nothing nearer to a measurement can be had without the
chips:

    compute   on TPU the cycles that the compiler expects an instruction to take; on GPU, where it
              notes none, the longer of each kernel's matmuls at the peak and of its operands and
              results at the memory's bandwidth, which is a bound
    network   the bytes that a device sends for each collective, by kind and by mesh axes
    exposed   the part of them that is waited for: all of a synchronous one, and of an asynchronous
              one what takes longer than the work scheduled between its start and its done

each times the trips of the loops around it. Of a conditional, the costliest branch counts. The
kernels of splash attention carry no estimate: their causal matmuls count at `KERNEL_EFFICIENCY` of
the peak; other kernels of TPUs without one count nothing, and their number is said. Good for
comparing two programs that were compiled alike.
"""

import dataclasses
import math
import re
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from machine.chips import Chip
from machine.memory import out_of_memory_explained
from parallel import AXES, make_mesh
from planning.hlo import Instruction, array_bytes, dimensions, groups, parse
from planning.topology import topology_devices
from train_step import lower_train_step

KERNEL_EFFICIENCY = 0.35  # of splash attention's causal matmuls


KINDS = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip

_CALLED = re.compile(r'(?:calls|to_apply)=(%[\w.\-]+)')


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


_CONSTANT = re.compile(r'constant\((-?\d+)\)')


# What takes no time on a GPU, and what reads or writes a part of its first operand.
_FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'partition-id', 'replica-id',
    'after-all', 'iota',
)  # fmt: skip


_SLICES = ('slice', 'dynamic-slice', 'gather', 'dynamic-update-slice')

# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------


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
    seconds: float = 0.0  # at the bandwidth of the axis
    exposed: float = 0.0  # of those seconds, the ones in which nothing is computed

    def add(self, other: 'Traffic', times: float) -> None:
        self.count += times * other.count
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        self.exposed += times * other.exposed


def bytes_sent(kind: str, shape: str, size: int) -> float:
    """What one device sends in a ring of `size` for a result of this shape."""
    out, others = array_bytes(shape), size - 1
    if kind == 'collective-permute':
        return out
    if kind == 'all-reduce':
        return 2 * out * others / size
    return out * others if kind == 'reduce-scatter' else out * others / size


# ---------------------------------------------------------------------------------------------
# The cost of a program
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Cost:
    seconds: float = 0.0  # of computing; on TPU of one core or of the two that act as one
    kernel_seconds: float = 0.0  # of those, splash attention's, which the compiler does not know
    flops: float = 0.0  # of matmuls; counted on GPU only
    unpriced: float = 0.0  # kernels without an estimate
    traffic: dict[tuple[str, str], Traffic] = dataclasses.field(default_factory=dict)

    def add(self, other: 'Cost', times: float = 1.0) -> None:
        self.seconds += times * other.seconds
        self.kernel_seconds += times * other.kernel_seconds
        self.flops += times * other.flops
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

    def __init__(self, text: str, mesh: Mesh, chip: Chip):
        self.program, self.entry = parse(text)
        self.mesh, self.chip = mesh, chip
        self.shape = {i.name: i.shape for each in self.program.values() for i in each}
        self.known: dict[str, Cost] = {}

    def cost(self, computation: str = '') -> Cost:
        """Of one computation and all that it calls; by default of the program."""
        name = computation or self.entry
        if name not in self.known:
            self.known[name] = total = Cost()
            starts: dict[str, tuple[Instruction, float]] = {}  # by name, and the work before
            for i in self.program.get(name, []):
                total.add(self.work(i))
                if i.op.endswith('-start'):
                    starts[i.name] = i, total.seconds
                elif i.op.endswith('-done'):
                    start, before = starts[i.operands[0]]
                    hidden = 0.0 if '"is_sync":true' in start.text else total.seconds - before
                    for kind, found in self.collectives(start):
                        result = i if found is start else found  # a start's shape has more in it
                        self._add_traffic(total, kind, found, result.shape, hidden)
                else:
                    hidden = math.inf if _is_async(i) else 0.0
                    for kind, found in self.collectives(i):
                        self._add_traffic(total, kind, found, found.shape, hidden)
        return self.known[name]

    def work(self, i: Instruction) -> Cost:
        """Of an instruction and what it calls, but for its part in a collective."""
        total = Cost()
        if i.op == 'while':
            total.add(self.cost(i.named('body')), self.trips(i))
        elif i.op == 'conditional':
            total.add(max((self.cost(b) for b in _branches(i)), key=_weight))
        elif i.op == 'call':
            total.add(self.cost(i.named('to_apply')))
        elif self.chip.platform == 'gpu':
            total.flops = self.matmul_flops(i)
            total.seconds = max(
                total.flops / self.chip.flops, self.bytes_touched(i) / self.chip.bandwidth
            )
            total.unpriced = float(i.op == 'custom-call' and total.flops == 0)
        elif cycles := _CYCLES.search(i.text):
            total.seconds = int(cycles.group(1)) / self.chip.clock if self.chip.clock else 0.0
        elif i.op == 'custom-call' and '"tpu_custom_call"' in i.text:
            total.seconds = attention_flops(i) / (self.chip.flops * KERNEL_EFFICIENCY)
            total.kernel_seconds = total.seconds
            total.unpriced = float(total.seconds == 0)
        return total

    def matmul_flops(self, i: Instruction) -> float:
        """Of an instruction of a GPU's program: of a matmul, of those in a fusion, of a kernel."""
        if i.op == 'dot':
            left = dimensions(self.shape[i.operands[0]])
            contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.text)[1]
            size = math.prod(left[int(d)] for d in contracted.split(',') if d)
            return 2 * math.prod(dimensions(i.shape)) * size
        if i.op == 'fusion':
            return sum(self.matmul_flops(j) for j in self._within(i.named('calls')))
        return (cudnn_flops(i) or self.expert_flops(i)) if i.op == 'custom-call' else 0.0

    def expert_flops(self, i: Instruction) -> float:
        """FLOPs of a kernel of layers/expert_kernels.py, if each row has an expert: one of its arrays
        holds a matrix for each, two hold the rows. 0 for another kernel."""
        if '/grouped_matmul/' not in i.text and '/grouped_gradient/' not in i.text:
            return 0.0
        dims = [dimensions(shape) for shape in (i.shape, *(self.shape[n] for n in i.operands))]
        (_, D, F), rows = next(d for d in dims if len(d) == 3), next(d for d in dims if len(d) == 2)
        return 2 * rows[0] * D * F

    def bytes_touched(self, i: Instruction) -> float:
        """What an instruction of a GPU's program reads and writes, if each byte once. Of an operand
        that is only sliced, the slice; where one is updated in place, the update."""
        if i.op in _FREE or i.op.endswith(('-start', '-done')):
            return 0.0
        operands = sum(array_bytes(self.shape[name]) for name in i.operands)
        if i.op != 'fusion':
            return operands + array_bytes(i.shape)
        inside = self.program[i.named('calls')]
        # A bitcast is its operand by another name.
        alias = {j.name: j.operands[0] for j in inside if j.op == 'bitcast'}
        origin = lambda name: origin(alias[name]) if name in alias else name  # noqa: E731
        parameters = {j.name: j for j in inside if j.op == 'parameter'}
        read = {name: [] for name in parameters}  # (instruction, which operand) that reads it
        for j in inside:
            for position, name in enumerate(j.operands if j.op != 'bitcast' else ()):
                if origin(name) in read:
                    read[origin(name)].append((j, position))
        total = 0.0
        for name, readers in read.items():
            if all(j.op in _SLICES and position == 0 for j, position in readers):
                total += sum(
                    array_bytes(j.shape) for j, _ in readers if j.op != 'dynamic-update-slice'
                )
            else:
                total += array_bytes(parameters[name].shape)
        root = inside[-1]
        for name in root.operands if root.op == 'tuple' else [root.name]:
            j = next(j for j in inside if j.name == origin(name))
            updated = j.op == 'dynamic-update-slice'
            total += array_bytes(self.shape[j.operands[1]] if updated else j.shape)
        return total

    def _add_traffic(
        self, total: Cost, kind: str, i: Instruction, shape: str, hidden: float
    ) -> None:
        """Of a collective with a result of this shape and so many seconds of work beside it."""
        members = groups(i.text)
        first = members[0] if members else [0, 1]
        sent = bytes_sent(kind, shape, len(first))
        seconds = sent / self.chip.axis_bandwidth(max(first) - min(first) + 1)
        one = Traffic(1, sent, seconds, max(seconds - hidden, 0.0))
        total.traffic.setdefault((kind, mesh_axes(members, self.mesh)), Traffic()).add(one, 1)

    def trips(self, loop: Instruction) -> int:
        """As the compiler notes them; else the largest constant that the condition compares with,
        which counts a first trip that was peeled off once more."""
        noted = _TRIPS.search(loop.text)
        if noted:
            return int(noted.group(1))
        constants = []
        for i in self.program.get(loop.named('condition'), []):
            inner = [j for c in _CALLED.findall(i.text) for j in self.program.get(c, [])]
            constants += [
                int(_CONSTANT.search(j.text).group(1))
                for j in (i, *inner)
                if j.op == 'constant' and _CONSTANT.search(j.text)
            ]
        return max(constants, default=1)

    def collectives(self, i: Instruction) -> Iterator[tuple[str, Instruction]]:
        """(kind, instruction): this one, or those within a fusion or an asynchronous call."""
        for j in (i, *self._inside(i)):
            kind = j.op.removesuffix('-start')
            if kind in KINDS:
                yield kind, j

    def _inside(self, i: Instruction) -> Iterator[Instruction]:
        if i.op in ('fusion', 'async-start'):
            for called in _CALLED.findall(i.text):
                yield from self._within(called)

    def _within(self, computation: str) -> Iterator[Instruction]:
        for i in self.program.get(computation, []):
            yield i
            for called in _CALLED.findall(i.text):
                yield from self._within(called)


def _is_async(i: Instruction) -> bool:
    """Whether it is a fusion of the TPU compiler's that works beside a collective."""
    return i.op == 'fusion' and 'async' in i.name + i.text.partition('metadata=')[0]


def _weight(cost: Cost) -> float:
    return cost.seconds + cost.total().seconds


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


def cudnn_flops(i: Instruction) -> float:
    """FLOPs of cuDNN's attention, causal, from its queries [B, T, N, H]; 0 for another call."""
    if '"__cudnn$fmha' not in i.text:
        return 0.0
    B, T, N, H = dimensions(i.text.partition('operand_layout_constraints=')[2])
    matmuls = 5 if 'Backward' in i.text else 2
    return matmuls * 2 * B * N * T * T * H / 2


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a training step, of one device."""

    topology: str
    seconds: float  # to compile
    arguments: float  # state and batch
    temporary: float
    peak: float  # both, and results that do not take the arguments' place
    cost: Cost | None  # None: the program's text is not to be had
    why: str = ''  # it is not


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
        cost = Reader(text, mesh, chip).cost()
    peak = arguments + temporary + new
    return Compiled(topology, seconds, arguments, temporary, peak, cost, why)
