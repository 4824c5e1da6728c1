"""Compiles a training step for chips that need not be there, and reads the program's cost.

The compilers schedule the whole program, which makes their text the nearest thing to a measurement
that can be had without the chips:

    compute   seconds of work: on TPU the compiler's estimates, on GPU a bound (planning/prices.py)
    network   the bytes that a device sends in each collective, by kind and by mesh axes
    exposed   the seconds of network that are waited for: all of a synchronous collective; of an
              asynchronous one what exceeds the work scheduled between its start and its done

All three count once per trip of the loops around them; of a conditional the costliest branch
counts. A SparseCore works beside the rest: its bytes count at the memory's bandwidth, and only what
is waited for. Raises UnknownFormError for a form that would count as nothing otherwise. The figures
serve to compare two programs that were compiled alike.
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
from planning.hlo import Instruction, Program, array_bytes, device_groups, parse
from planning.prices import FREE, Cost, Traffic, gpu_price, tpu_price
from planning.topology import compiler_versions, topology_devices
from train_step import lower_train_step, setup

COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip

# Asynchronous instructions that move data within a device, beside its work: they count nothing.
_MOVES = ('copy', 'slice', 'dynamic-slice', 'dynamic-update-slice')

_GROUPS = re.compile(r', (?:replica_groups|source_target_pairs)=')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r'constant\((-?\d+)\)')


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
            inside = [i for i in self.program.instructions(called) if i.op not in FREE]
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
# Compiling
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's answer about a training step. Bytes are of one device."""

    topology: str
    seconds: float  # of compiling
    arguments: float  # bytes of state and batch
    temporary: float  # bytes
    reserved: float  # bytes of both, and of results that do not take the arguments' place
    peak: float  # bytes of the arrays that live at once, which is all that a full memory takes
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
    reserved = arguments + temporary + new
    # With memory to spare libtpu packs arrays loosely: a step that reserves 10 GB of 100 takes 8.5
    # if there are no more, and 6.8 live at once either way. Elsewhere both are the same.
    peak = memory.peak_memory_in_bytes if chip.platform == 'tpu' else reserved
    versions = compiler_versions(chip.platform)
    return Compiled(topology, seconds, arguments, temporary, reserved, peak, cost, why, versions)
