"""Prices the instructions of a compiled program: seconds of work, by the chip that runs them.

On TPU an instruction takes the cycles that the compiler estimates. On GPU, where it estimates none,
a bound: the longer of its matmuls at the peak and of its operands and results at the memory's
bandwidth. On TPU the kernels of attention have no estimate: their matmuls, of scores the causal
half, count at `KERNEL_EFFICIENCY` of the peak. Other kernels without an estimate count nothing;
`Cost.unpriced` is their number.
"""

import dataclasses
import math
import re

from machine.chips import Chip
from planning.hlo import Instruction, Program, array_bytes, dimensions

KERNEL_EFFICIENCY = 0.35  # of the peak, for the matmuls of attention kernels on TPU

# Instructions that take no time on a GPU.
FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'partition-id', 'replica-id',
    'after-all', 'iota',
)  # fmt: skip

# Instructions that write only a part of their first operand, in place: which of the operands
# holds it. Those, and others that read only a part.
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}
_SLICES = ('slice', 'dynamic-slice', 'gather', *_UPDATES)

_NO_ESTIMATE = 2**63 - 1  # the cycles that the TPU compiler notes for work on a SparseCore
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


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
    if i.op in FREE or i.op.endswith(('-start', '-done')):
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
