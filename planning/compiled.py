"""Compiles a training step for chips that need not be there, and reads the program's cost.

The compilers schedule the whole program, which makes their text the nearest thing to a measurement
that can be had without the chips:

    compute   seconds of work. On TPU the cycles that the compiler estimates for each instruction.
              On GPU, where the compiler estimates none, a bound: for each kernel the longer of its
              matmuls at the peak and of its operands and results at the memory's bandwidth
    network   the bytes that a device sends in each collective, by kind and by mesh axes
    exposed   the seconds of network that are waited for: all of a synchronous collective; of an
              asynchronous one what exceeds the work scheduled between its start and its done

All three count once per trip of the loops around them; of a conditional the costliest branch
counts. On TPU the kernels of attention have no estimate: their matmuls, of scores the causal half,
count at `KERNEL_EFFICIENCY` of the peak. Other kernels without an estimate count nothing;
`Cost.unpriced` is their number. A SparseCore works beside the rest: its bytes count at the memory's
bandwidth, and only what is waited for. Raises UnknownFormError for a form that would count as
nothing otherwise. The figures serve to compare two programs that were compiled alike.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from config import ConfigError
from machine.chips import Chip
from machine.memory import out_of_memory_explained
from parallel import AXES, make_mesh
from planning import hlo
from planning.hlo import Instruction, Program, array_bytes, device_groups, dimensions, parse
from planning.topology import compiler_versions, topology_devices
from train_step import lower_train_step, setup

KERNEL_EFFICIENCY = 0.35  # of the peak, for the matmuls of attention kernels on TPU

COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip

# Instructions that take no time on a GPU.
_FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'partition-id', 'replica-id',
    'after-all', 'iota',
)  # fmt: skip

# Instructions that write only a part of their first operand, in place: which of the operands
# holds it. Those, and others that read only a part.
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}
_SLICES = ('slice', 'dynamic-slice', 'gather', *_UPDATES)

# Asynchronous instructions that move data within a device, beside its work: they count nothing.
_MOVES = ('copy', 'slice', 'dynamic-slice', 'dynamic-update-slice')

_NO_ESTIMATE = 2**63 - 1  # the cycles that the TPU compiler notes for work on a SparseCore
_GROUPS = re.compile(r', (?:replica_groups|source_target_pairs)=')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r'constant\((-?\d+)\)')


# ---------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Traffic:
    """The traffic of one device per step in collectives of one kind over the same mesh axes."""

    count: float = 0.0
    bytes: float = 0.0  # sent
    seconds: float = 0.0  # of sending, at the bandwidth of the axis
    exposed: float = 0.0  # of those, the seconds in which nothing is computed

    def add(self, other: 'Traffic', times: float) -> None:
        self.count += times * other.count
        self.bytes += times * other.bytes
        self.seconds += times * other.seconds
        self.exposed += times * other.exposed


@dataclasses.dataclass
class Cost:
    """The cost of a program, or of a part of it, on one device."""

    seconds: float = 0.0  # of computing; on TPU of one core, or of two that act as one
    kernel_seconds: float = 0.0  # of those, attention kernels', by KERNEL_EFFICIENCY
    aside: float = 0.0  # of SparseCores and the like beside those, which hold what is waited for
    flops: float = 0.0  # of matmuls; counted on GPU only
    unpriced: float = 0.0  # calls of kernels that count nothing
    traffic: dict[tuple[str, str], Traffic] = dataclasses.field(default_factory=dict)

    def add(self, other: 'Cost', times: float = 1.0) -> None:
        self.seconds += times * other.seconds
        self.kernel_seconds += times * other.kernel_seconds
        self.aside += times * other.aside
        self.flops += times * other.flops
        self.unpriced += times * other.unpriced
        for key, traffic in other.traffic.items():
            self.traffic.setdefault(key, Traffic()).add(traffic, times)

    def total(self) -> Traffic:
        """Returns the traffic of all collectives."""
        total = Traffic()
        for traffic in self.traffic.values():
            total.add(traffic, 1)
        return total


# ---------------------------------------------------------------------------------------------
# The walk over a program
# ---------------------------------------------------------------------------------------------

# (instruction, program, chip) -> the cost of an instruction that is no loop, conditional or call;
# its traffic is not part of it.
Price = Callable[[Instruction, Program, Chip], Cost]


def read_cost(text: str, mesh: Mesh, chip: Chip) -> Cost:
    """Returns the cost of one step from the text of its compiled program (HLO)."""
    program = parse(text)
    price = gpu_price if chip.platform == 'gpu' else tpu_price
    return Walk(program, mesh, chip, price).cost(program.entry)


class Walk:
    """A walk over a program that adds up its cost, computation by computation."""

    def __init__(self, program: Program, mesh: Mesh, chip: Chip, price: Price):
        self.program, self.mesh, self.chip, self.price = program, mesh, chip, price
        self.known: dict[str, Cost] = {}  # of the computations visited so far

    def cost(self, computation: str) -> Cost:
        """Returns the cost of a computation and of all that it calls."""
        if computation in self.known:
            return self.known[computation]
        self.known[computation] = total = Cost()
        # Asynchronous starts by their names, or those of their updates, and the work before each.
        begun: dict[str, tuple[Instruction, float]] = {}
        for i in self.program.instructions(computation):
            total.add(self.work(i))
            if i.stage == 'start':
                begun[i.name] = i, total.seconds
                continue
            hidden = math.inf if is_async_fusion(i) else 0.0
            if not i.stage:
                for kind, found in collectives(i, self.program):
                    total.add(self.transfer(kind, found, found.shape, hidden))
                continue
            if i.operands[0] not in begun:
                raise hlo.UnknownFormError(f'{i.op} without its start beside it ({i.name})')
            start, before = begun[i.operands[0]]
            if i.stage == 'update':  # it may bring the operands, without which nothing begins
                begun[i.name] = start, before if start.operands else total.seconds
            else:
                total.add(self.finished(start, i, total.seconds - before))
        return total

    def work(self, i: Instruction) -> Cost:
        """Returns the cost of an instruction and of what it calls, without its own traffic. What is
        asynchronous and calls counts when it is done."""
        total = Cost()
        if i.op == 'while':
            total.add(self.cost(i.computation('body')), trips(i, self.program))
        elif i.op == 'conditional':
            total.add(max((self.cost(branch) for branch in branches(i)), key=weight))
        elif i.op == 'call':
            total.add(self.cost(i.computation('to_apply')))
        elif i.stage and i.kind in ('async', 'call', 'fusion', 'custom-call'):
            pass
        else:
            check_known(i, self.program)
            total.add(self.price(i, self.program, self.chip))
        return total

    def finished(self, start: Instruction, done: Instruction, hidden: float) -> Cost:
        """Returns the cost of an asynchronous instruction, beside which `hidden` seconds of work
        were placed. Raises UnknownFormError if its kind is none that is known here."""
        hidden = 0.0 if '"is_sync":true' in start.text else hidden
        kind = start.kind
        if kind in COLLECTIVES:
            # The shape of a start includes its operands, that of its done does not.
            return self.transfer(kind, start, done.shape, hidden)
        if kind in ('async', 'call'):
            (called,) = start.called
            inside = [i for i in self.program.instructions(called) if i.op not in _FREE]
            if len(inside) == 1 and inside[0].op in COLLECTIVES:
                return self.transfer(inside[0].op, inside[0], inside[0].shape, hidden)
            return beside(self.cost(called), hidden)
        if kind in ('fusion', 'custom-call'):
            text = start.text.replace(start.op, kind, 1)
            whole = Instruction(start.name, done.shape, kind, text)
            cost = self.work(whole)
            for inner, found in collectives(whole, self.program):
                cost.add(self.transfer(inner, found, found.shape, 0.0))
            return beside(cost, hidden)
        if kind not in _MOVES:
            raise hlo.UnknownFormError(f'the asynchronous instruction {start.op} ({start.name})')
        return Cost()

    def transfer(self, kind: str, i: Instruction, shape: str, hidden: float) -> Cost:
        """Returns the traffic of a collective with a result of this shape, of which `hidden`
        seconds pass behind other work."""
        groups = device_groups(i.text)
        if 'replica_groups={}' in i.text:  # one group of all
            groups = [list(range(self.mesh.devices.size))]
        first = groups[0] if groups else [0, 1]
        sent = bytes_sent(kind, shape, len(first))
        seconds = sent / self.chip.axis_bandwidth(max(first) - min(first) + 1)
        one = Traffic(1, sent, seconds, max(seconds - hidden, 0.0))
        return Cost(traffic={(kind, mesh_axes(groups, self.mesh)): one})


def beside(inner: Cost, hidden: float) -> Cost:
    """Returns what is waited for of a computation that runs beside `hidden` seconds of other work:
    first its own work hides behind that, then what it exposes of its traffic."""
    total = Cost(
        seconds=max(inner.seconds - hidden, 0.0), aside=max(inner.seconds, inner.aside),
        kernel_seconds=inner.kernel_seconds, flops=inner.flops, unpriced=inner.unpriced,
    )  # fmt: skip
    hidden = max(hidden - inner.seconds, 0.0)
    for key, traffic in inner.traffic.items():
        covered = min(traffic.exposed, hidden)
        hidden -= covered
        total.traffic[key] = dataclasses.replace(traffic, exposed=traffic.exposed - covered)
    return total


def check_known(i: Instruction, program: Program) -> None:
    """Raises UnknownFormError if an instruction that is no known way to call is a collective of an
    unknown kind, or calls a collective."""
    if i.kind not in COLLECTIVES and _GROUPS.search(i.text.partition('metadata=')[0]):
        raise hlo.UnknownFormError(f'the collective {i.op} ({i.name})')
    if i.op == 'fusion' or i.kind in COLLECTIVES:
        return
    for called in i.called:
        for j in program.all_instructions(called):
            if j.kind in COLLECTIVES:
                raise hlo.UnknownFormError(f'{j.op} within {i.op} ({i.name})')


def trips(loop: Instruction, program: Program) -> int:
    """Returns the trip count that the compiler notes; without one, the largest constant in the
    loop's condition, which is one too many if the compiler peeled off a first trip."""
    noted = _TRIPS.search(loop.text)
    if noted:
        return int(noted.group(1))
    constants = []
    for i in program.instructions(loop.computation('condition')):
        inner = [j for called in i.called for j in program.instructions(called)]
        for j in (i, *inner):
            found = _CONSTANT.search(j.text) if j.op == 'constant' else None
            constants += [int(found.group(1))] if found else []
    return max(constants, default=1)


def branches(conditional: Instruction) -> list[str]:
    """Returns the names of the computations that a conditional chooses from."""
    listed = re.search(r'branch_computations=\{([^}]*)\}', conditional.text)
    if listed:
        return listed.group(1).split(', ')
    return re.findall(r'(?:true|false)_computation=(%[\w.\-]+)', conditional.text)


def weight(cost: Cost) -> float:
    """Returns the seconds by which the branches of a conditional are compared."""
    return cost.seconds + cost.total().seconds


# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------


def collectives(i: Instruction, program: Program) -> Iterator[tuple[str, Instruction]]:
    """Yields (kind, instruction) of the collectives that an instruction is or, if it is a fusion,
    contains."""
    inner = i.called if i.op == 'fusion' else []
    for j in (i, *(j for called in inner for j in program.all_instructions(called))):
        if j.kind in COLLECTIVES and j.stage in ('', 'start'):
            yield j.kind, j


def is_async_fusion(i: Instruction) -> bool:
    """Returns whether the TPU compiler fused the instruction from work and a collective that run
    side by side."""
    return i.op == 'fusion' and 'async' in i.name + i.text.partition('metadata=')[0]


def mesh_axes(groups: Iterable[list[int]], mesh: Mesh) -> str:
    """Returns the mesh axes along which the devices of a group differ, as 'fsdp' or 'dp+fsdp'."""
    devices = np.array(list(groups) or [[0]])
    places = np.stack(np.unravel_index(devices, mesh.devices.shape), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return '+'.join(name for name, d in zip(mesh.axis_names, differ, strict=True) if d) or 'none'


def bytes_sent(kind: str, shape: str, size: int) -> float:
    """Returns the bytes that a device sends in a ring of `size` devices for a result of this
    shape."""
    result, others = array_bytes(shape), size - 1
    if kind == 'collective-permute':
        return result
    if kind == 'all-reduce':
        return 2 * result * others / size
    return result * others if kind == 'reduce-scatter' else result * others / size


# ---------------------------------------------------------------------------------------------
# Prices on TPU
# ---------------------------------------------------------------------------------------------


def tpu_price(i: Instruction, program: Program, chip: Chip) -> Cost:
    """Returns the compiler's estimate of an instruction, or for a kernel that of `splash_flops` or
    `latent_flops`. What a SparseCore does has none: its bytes count at the memory's bandwidth, a
    bound."""
    cycles = _CYCLES.search(i.text)
    if cycles and chip.clock and int(cycles.group(1)) == _NO_ESTIMATE:
        return Cost(seconds=bytes_touched(i, program) / chip.bandwidth)
    if cycles:
        return Cost(seconds=int(cycles.group(1)) / chip.clock if chip.clock else 0.0)
    if i.op != 'custom-call' or '"tpu_custom_call"' not in i.text:
        return Cost()
    seconds = (splash_flops(i) or latent_flops(i)) / (chip.flops * KERNEL_EFFICIENCY)
    return Cost(seconds=seconds, kernel_seconds=seconds, unpriced=float(seconds == 0))


def splash_flops(i: Instruction) -> float:
    """Returns the FLOPs of a kernel of splash attention, causal; 0 for any other kernel.

    Its first two arrays of floats are the queries [(B,) N, T, H] and the keys [(B,) K, S, H]; S is
    a multiple of T where each device has a part of the queries. Matmuls of values count as wide as
    those of keys. The backward pass is one kernel of 5 matmuls, which has partial gradients of the
    queries [(B,) key blocks, N, T, H] among its results, or one of 4 and one of 3. The text does
    not tell a window, so layers that have one count as if they saw all.
    """
    matmuls = {'mha_fwd': 2, 'mha_dkv': 4, 'mha_dq': 3}
    n = next((n for part, n in matmuls.items() if part in i.name), 0)
    shapes = re.findall(r'\b(?:bf16|f32)\[((?:\d+,)+\d+)\]', i.text)
    if not n or len(shapes) < 2:
        return 0.0
    (*front, T, H), (*_, S, _) = ([int(d) for d in shape.split(',')] for shape in shapes[:2])
    if n == 4:
        results = re.findall(r'\[((?:\d+,)+\d+)\]', i.shape)
        n += any(len(shape.split(',')) > len(front) + 2 for shape in results)
    return n * 2 * math.prod(front) * T * S * H / 2


def latent_flops(i: Instruction) -> float:
    """Returns the FLOPs of a kernel of layers/latent_kernel.py, from its arguments; 0 for another.

    The causal half of the matmuls of scores, each as wide as the wider head, which is how
    `splash_flops` counts them; and those that make heads of latents, which backward does again and
    differentiates for both of their sides.
    """
    scores, passes = (2, 1) if 'latent_attention_forward' in i.name else (5, 3)
    if 'latent_attention_' not in i.name:
        return 0.0
    arguments = i.text.partition('operand_layout_constraints=')[2]
    found = [[int(d) for d in a.split(',')] for a in re.findall(r'\w+\[([\d,]+)\]', arguments)]
    (B, T, _), (N, Rq, H), (_, R, V) = found[0], found[3], found[5]
    heads = B * T * N * (Rq * H + R * H + R * V)
    return 2 * (scores * B * N * T * T * max(H, V) / 2 + passes * heads)


# ---------------------------------------------------------------------------------------------
# Prices on GPU
# ---------------------------------------------------------------------------------------------


def gpu_price(i: Instruction, program: Program, chip: Chip) -> Cost:
    """Returns the longer of an instruction's matmuls at the chip's peak and of the bytes that it
    reads and writes at its memory's bandwidth."""
    flops = matmul_flops(i, program)
    return Cost(
        seconds=max(flops / chip.flops, bytes_touched(i, program) / chip.bandwidth),
        flops=flops,
        unpriced=float(i.op == 'custom-call' and flops == 0),
    )


def matmul_flops(i: Instruction, program: Program) -> float:
    """Returns the FLOPs of a matmul, of the matmuls in a fusion, or of a known kernel; else 0."""
    if i.op == 'dot':
        left = dimensions(program.shapes[i.operands[0]])
        contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.text)[1]
        size = math.prod(left[int(d)] for d in contracted.split(',') if d)
        return 2 * math.prod(dimensions(i.shape)) * size
    if i.op == 'fusion':
        inside = program.all_instructions(i.computation('calls'))
        return sum(matmul_flops(j, program) for j in inside)
    return (cudnn_flops(i) or expert_flops(i, program)) if i.op == 'custom-call' else 0.0


def cudnn_flops(i: Instruction) -> float:
    """Returns the FLOPs of cuDNN's attention, causal and within its window, from its queries
    [B, T, N, H]; 0 for another call."""
    if '"__cudnn$fmha' not in i.text:
        return 0.0
    B, T, N, H = dimensions(i.text.partition('operand_layout_constraints=')[2])
    matmuls = 5 if 'Backward' in i.text else 2
    window = re.search(r'sliding_window_length\\*": *\\*"?(\d+)', i.text)
    W = min(int(window[1]) if window else 0, T) or T
    return matmuls * 2 * B * N * (T * W - W * W / 2) * H


def expert_flops(i: Instruction, program: Program) -> float:
    """Returns the FLOPs of a kernel of layers/expert_kernels.py, in which every row has an expert;
    0 for another kernel. One of its arrays is [E, D, F], two are [rows, D] and [rows, F]."""
    if '/grouped_matmul/' not in i.text and '/grouped_gradient/' not in i.text:
        return 0.0
    shapes = [i.shape, *(program.shapes[name] for name in i.operands)]
    dims = [dimensions(shape) for shape in shapes]
    (_, D, F), rows = next(d for d in dims if len(d) == 3), next(d for d in dims if len(d) == 2)
    return 2 * rows[0] * D * F


def bytes_touched(i: Instruction, program: Program) -> float:
    """Returns the bytes that an instruction reads and writes, each counted once."""
    if i.op in _FREE or i.op.endswith(('-start', '-done')):
        return 0.0
    if i.op == 'fusion':
        return fusion_bytes(program.computations[i.computation('calls')], program)
    return sum(array_bytes(program.shapes[name]) for name in i.operands) + array_bytes(i.shape)


def fusion_bytes(inside: list[Instruction], program: Program) -> float:
    """Returns the bytes that a fusion of these instructions reads and writes: of a parameter that
    is only sliced, the slices; of one that is updated in place, the update."""
    by_name = {i.name: i for i in inside}

    def origin(name: str) -> str:
        """Returns the name of the array that a chain of bitcasts renames."""
        while name in by_name and by_name[name].op == 'bitcast':
            name = by_name[name].operands[0]
        return name

    # The instructions that read each parameter, and as which of their operands.
    readers = {i.name: [] for i in inside if i.op == 'parameter'}
    for i in inside:
        for position, name in enumerate(i.operands if i.op != 'bitcast' else ()):
            if origin(name) in readers:
                readers[origin(name)].append((i, position))
    total = 0.0
    for name, reads in readers.items():
        if all(i.op in _SLICES and position == 0 for i, position in reads):
            total += sum(array_bytes(i.shape) for i, _ in reads if i.op not in _UPDATES)
        else:
            total += array_bytes(by_name[name].shape)
    root = inside[-1]
    for name in root.operands if root.op == 'tuple' else [root.name]:
        result = by_name[origin(name)]
        update = result.operands[_UPDATES[result.op]] if result.op in _UPDATES else None
        total += array_bytes(program.shapes[update] if update else result.shape)
        total += array_bytes(program.shapes[update]) if result.op == 'scatter' else 0  # adds to it
    return total


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's answer about a training step. Bytes are of one device."""

    topology: str
    seconds: float  # of compiling
    arguments: float  # bytes of state and batch
    temporary: float  # bytes
    peak: float  # bytes of both, and of results that do not take the arguments' place
    cost: Cost | None  # None if the program cannot be printed or read
    why: str = ''  # the reason for cost=None
    compiler: dict[str, str] = dataclasses.field(default_factory=dict)  # versions, with jax's


def check_devices(topology: str, needed: int) -> Sequence[jax.Device]:
    """Returns the devices of a topology. Raises ConfigError if it is unknown, has fewer than are
    needed, or its compiler is missing."""
    devices = topology_devices(topology)
    if needed > len(devices):
        raise ConfigError(
            f'the mesh takes {needed} devices and {topology} has {len(devices)}; use a smaller '
            f'mesh or a larger topology'
        )
    return devices


def compile_step(config: ConfigDict, topology: str, chip: Chip) -> Compiled:
    """Compiles the training step of a config for the first devices of a topology.

    Raises ConfigError if the topology is unknown, has too few devices or its compiler is missing,
    and OutOfMemoryError if the program does not fit into the devices' memory.
    """
    needed = math.prod(config.mesh[axis] for axis in AXES)
    mesh = make_mesh(config.mesh, check_devices(topology, needed)[:needed])
    start = time.perf_counter()
    lowered = lower_train_step(setup(config, mesh))
    with out_of_memory_explained(config):
        step = lowered.compile()
    seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    arguments = memory.argument_size_in_bytes
    temporary = memory.temp_size_in_bytes
    if chip.platform == 'tpu':  # there they include those in host memory, which are offloaded
        temporary -= memory.host_temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    cost, why = None, ''
    try:
        text = step.as_text()
    except jax.errors.JaxRuntimeError as error:  # seen with asynchronous instructions
        why = str(error).splitlines()[0]
    else:
        try:
            cost = read_cost(text, mesh, chip)
        except hlo.UnknownFormError as error:
            why = f'it has a form that is not known here: {error}'
    peak = arguments + temporary + new
    versions = compiler_versions(chip.platform)
    return Compiled(topology, seconds, arguments, temporary, peak, cost, why, versions)
