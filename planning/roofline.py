"""Bounds the time of a training step on chips that are not there: a roofline, from the config.

For each part of the step, the FLOPs of its matmuls at the chip's peak and the bytes it reads and
writes at the memory's bandwidth, whichever takes longer; the pipeline's bubble from its schedule;
and the bytes that a device sends along each mesh axis at the bandwidth of one dimension of the
network. No program reaches the peaks: this is a bound, which shows the limit of a config and the
better of two configs (Williams et al. 2009).

FLOPs: a matmul is 2·m·k·n; causal attention counts half of T². `useful` are 6 per weight that a
token meets plus attention (model.flops_per_token), `computed` include all that is computed again,
without Newton-Schulz, whose FLOPs do not grow with the tokens.
"""

import dataclasses
import functools
import itertools
import math

from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT, COMPUTE, EXPERTS, FP8, RESIDUAL, ModelConfig, of_layer
from layers.attention_kernels import ATTENTION_KERNELS
from layers.delta_attention import state_params
from layers.dense import NEVER
from machine.chips import Chip, check_matmul_type
from model import layer_kinds
from parallel import AXES, CP, EP, FSDP, PP, TP, spec_axes
from planning.footprint import FLOAT32, Memory, kept_of_layer, layer_values, memory
from planning.muon import Shape
from planning.part import (
    Group,
    Mesh,
    Microbatch,
    Part,
    gathered,
    group,
    layer,
    part_of,
    shards,
    useful_flops,
)

# Arrays that a scan over layers keeps for its backward pass move so many times more: the stack is
# filled with zeros, a layer's part copied into it, and out of it again. This is why computing again
# is often faster on a chip with much compute beside its memory.
STACKING = 5

NEWTON_SCHULZ = 'Newton-Schulz'  # the part of the work of Muon's matrices


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device in a step for a part of the model."""

    part: str
    flops: float
    bytes: float  # read and written in its memory
    attention: float = 0.0  # FLOPs of `flops` in attention kernels
    experts: float = 0.0  # and in matmuls of rows that are grouped by expert
    narrow: float = 0.0  # FLOPs of each matmul over the smallest of its dimensions
    fp8: float = 0.0  # FLOPs of `flops` in matmuls of numbers in 8 bits
    stacked: float = 0.0  # bytes that a scan over layers keeps; `bytes` has them STACKING times

    def seconds(self, chip: Chip) -> float:
        return max(self.matmul_seconds(chip), self.bytes / chip.bandwidth)

    def matmul_seconds(self, chip: Chip) -> float:
        faster = self.fp8 if chip.flops_fp8 else 0.0
        return (self.flops - faster) / chip.flops + faster / (chip.flops_fp8 or chip.flops)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """The bytes that one device sends along a mesh axis in a step, for one purpose."""

    axis: str
    purpose: str
    bytes: float


# ---------------------------------------------------------------------------------------------
# FLOPs and memory traffic
# ---------------------------------------------------------------------------------------------


def forward_passes(s: Part) -> int:
    """Counts the whole forward passes of a microbatch: B of a pipeline runs the stage once more."""
    return 1 if s.schedule is None else 2


@functools.cache
def attention_flops(s: Microbatch, kind: str) -> tuple[float, float]:
    """Returns the FLOPs of one layer's attention for a microbatch, forward and backward: two
    matmuls and five; of a linear layer those of its state."""
    sizes = s.of_layer(kind)
    if sizes.state:  # backward computes each block again, and two products for each
        work = sizes.work + (s.mesh[CP] > 1) * sizes.work_before
        once = s.tokens * work / s.mesh[TP]
        return once, 3 * once
    each = 2 * s.tokens * s.keys_seen(kind) * s.cfg.n_heads / s.mesh[TP]
    return each * (sizes.key + sizes.value), each * (3 * sizes.key + 2 * sizes.value)


def expansion_flops(s: Microbatch, kind: str) -> float:
    """Returns the FLOPs of one pass that makes keys and values of the other cp devices' positions,
    which each device does for itself."""
    return 2.0 * (s.mesh[CP] - 1) * s.tokens * s.of_layer(kind).expansion / s.mesh[TP]


def streamed_flops(s: Microbatch, kind: str) -> float:
    """Returns the FLOPs of one pass over the matrices that a linear layer uses block by block."""
    weights = [p for p in layer(s.cfg, kind).params if p.kept_by == ATTENTION_OUTPUT]
    return flops_of(Group(tuple(weights)), s.local, ())


def matmul_flops(s: Microbatch, kind: str, again: bool = False) -> float:
    """Returns the FLOPs of one pass over a layer's matrices, for a microbatch on a device: 2 per
    weight and token. With `again` only those that remat computes again."""
    kept = (*s.cfg.spared_names, NEVER) if again else ()
    return flops_of(layer(s.cfg, kind), s.local, kept)


@functools.cache
def flops_of(params: Group, tokens: int, without: tuple[str, ...]) -> float:
    """Returns the FLOPs of one pass of so many tokens over the matrices that are not kept by one
    of these names."""
    return sum(
        2 * math.prod(p.shape) * p.use * tokens * p.work
        for p in params.params
        if p.matrix and p.kept_by not in without
    )


@functools.cache
def layer_flops(s: Microbatch, kind: str, passes: int) -> tuple[float, float, float]:
    """Returns the FLOPs of a layer for a microbatch, which passes forward so many times: of its
    matmuls with weights, of attention, and of keys and values made again where cp cuts."""
    attend, attend_back = attention_flops(s, kind)
    matmuls, attends = (passes + 2) * matmul_flops(s, kind), passes * attend + attend_back
    if s.is_linear(kind):  # backward makes them again
        again = s.cfg.remat != 'none' and ATTENTION_OUTPUT not in s.cfg.spared_names
        if again:
            attends += attend
        if s.cfg.remat != 'none':
            matmuls += matmul_flops(s, kind, again=True)
        streamed = streamed_flops(s, kind)
        if s.mesh[CP] > 1:  # a pass before says what the parts do to a state
            of_state = group(state_params(of_layer(s.cfg, kind)))
            streamed += (passes + 3 + again) * flops_of(of_state, s.local, ())
        return matmuls, attends, streamed
    expanded = passes + 2 + s.in_ring  # backward makes them again
    if s.cfg.remat != 'none':
        matmuls += matmul_flops(s, kind, again=True)
        attends += attend * (ATTENTION_OUTPUT not in s.cfg.spared_names)
        expanded += not s.in_ring or ATTENTION_OUTPUT not in s.cfg.spared_names
    return matmuls, attends, expanded * expansion_flops(s, kind)


@functools.cache
def layer_traffic(s: Microbatch, kind: str, passes: int) -> float:
    """Returns the bytes of activations that a layer reads and writes for a microbatch."""
    # Forward writes and reads each array once, backward twice that.
    times = passes + (s.cfg.remat != 'none') + 2
    moved = times * 2 * sum(v.bytes for v in layer_values(s, kind))
    moved += STACKING * kept_of_layer(s, kind)
    if ATTENTION_KERNELS[s.cfg.attention_kernel].scores and not s.is_linear(kind):
        moved += times * score_bytes(s, kind)
    return moved


@functools.cache
def weight_traffic(
    params: Group, mesh: Mesh, width: int, times: int, matmul_type: str = COMPUTE
) -> float:
    """Returns the bytes that a layer's weights and gradients take in memory for a microbatch."""
    # Each gradient is written, and added to a sum that is read and written.
    gradients = 4 * FLOAT32 * shards(params, mesh)
    return times * 2 * gathered(params, mesh, width, matmul_type) + gradients


@functools.cache
def matmul_kinds(s: Microbatch, kind: str) -> tuple[float, float, float]:
    """Returns, of a layer's matmuls by their FLOPs, the part that experts do, the mean of one over
    the smallest dimension that a device has of each, and the part in model.matmul_type."""
    total = experts = narrow = multiplied = 0.0
    for p in layer(s.cfg, kind).params:
        if not p.matrix:
            continue
        shard = [
            n // math.prod(s.mesh[axis] for axis in spec_axes(P(dim)) if axis != FSDP)
            for n, dim in itertools.zip_longest(p.shape, p.spec)
        ]
        takes, gives = (p.inputs, p.outputs) if p.inputs else (1, 1)
        rows = s.tokens * p.use * (s.mesh[EP] if EP in spec_axes(p.spec) else 1)
        least = min(rows, math.prod(shard[-gives:]), math.prod(shard[-takes - gives : -gives]))
        flops = math.prod(p.shape) * p.use * p.work
        total += flops
        experts += flops * (p.use < 1)
        narrow += flops / max(least, 1)
        multiplied += flops * p.multiplied
    return experts / total, narrow / total, multiplied / total


def layers_work(s: Part, part: str, kinds: tuple[str, ...], n: int) -> Work:
    """Returns the work of `n` times layers of these kinds, for all microbatches of a step."""
    passes = forward_passes(s)
    times = passes + (s.cfg.remat != 'none') + 2
    flops = moved = attention = experts = narrow = fp8 = stacked = 0.0
    for kind in kinds:
        matmuls, attends, expanded = layer_flops(s.micro, kind, passes)
        of_experts, over, eighth = matmul_kinds(s.micro, kind)
        flops += matmuls + attends + expanded
        attention, experts = attention + attends, experts + matmuls * of_experts
        narrow += matmuls * over
        moved += layer_traffic(s.micro, kind, passes)
        moved += weight_traffic(s.declared.layer(kind), s.sizes, s.width, times, s.cfg.matmul_type)
        fp8 += matmuls * eighth * (s.cfg.matmul_type == FP8)
        stacked += kept_of_layer(s.micro, kind)
    each = (flops, moved, attention, experts, narrow, fp8, stacked)
    return Work(part, *(s.microbatches * n * x for x in each))


def score_bytes(s: Microbatch, kind: str) -> float:
    """Returns the bytes of attention scores, written and read in float32 and the compute type."""
    scores = s.tokens * s.keys_seen(kind) * s.cfg.n_heads / s.mesh[TP]
    return 2 * scores * (FLOAT32 + s.width)


def head_work(s: Part) -> Work:
    """Returns the work of the head: three matmuls with the vocabulary; logits written and read,
    their gradient read twice."""
    cfg, tokens = s.cfg, s.head_tokens * s.mesh[TP]
    rows = cfg.vocab_size / s.mesh[TP]
    matrix, logits = rows * cfg.d_model, tokens * rows
    chunks = tokens // s.loss_tokens
    moved = logits * (2 * FLOAT32 + 3 * s.width) + matrix * (3 * s.width + 2 * FLOAT32 * chunks)
    flops = s.microbatches * 6 * tokens * matrix
    narrow = flops / min(s.loss_tokens, rows, cfg.d_model)
    return Work('head', flops, s.microbatches * moved, narrow=narrow)


def optimizer_work(s: Part) -> Work:
    """Returns the work of the update: gradients read twice, for the norm and the update; parameters
    and slots read and written."""
    n, slots = (shards(params, s.sizes) for params in (s.declared.all, s.declared.slots))
    return Work('optimizer', 12.0 * n, FLOAT32 * (4 * n + 2 * slots))


def newton_schulz_work(s: Part) -> Work:
    """Returns the work on Muon's whole matrices, beyond that of any update."""
    flops, moved = (sum(getattr(x, name) for x in s.of_muon) for name in ('flops', 'bytes'))
    return Work(NEWTON_SCHULZ, flops, moved)


def all_work(s: Part) -> list[Work]:
    """Lists the work of a step, part by part."""
    cfg = s.cfg
    parts = [layers_work(s, 'blocks', tuple(cfg.block), s.blocks)]
    if cfg.first_dense:
        parts.append(layers_work(s, 'first layers', (cfg.first_kind,), cfg.first_dense))
    parts += [head_work(s), optimizer_work(s)]
    return [*parts, newton_schulz_work(s)] if s.of_muon else parts


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------


def part_sent(n: int) -> float:
    """Returns the part of a whole array that a device sends to gather or scatter it."""
    return (n - 1) / n


def weight_transfers(s: Part) -> list[Transfer]:
    """Lists the gathers of weights over fsdp and the way back of their gradients."""
    once, M = s.gather == 'step', s.microbatches
    blocks, first, embed = (
        gathered(s.declared.of(x), s.sizes, s.width) for x in ('blocks', 'first', 'embed')
    )
    vocabulary = 2 * M * embed  # as embedding and as head
    of_blocks, of_first = (
        gathered(s.declared.of(x), s.sizes, s.width, s.cfg.matmul_type) for x in ('blocks', 'first')
    )
    # In forward, and in backward, which does not keep them; in a pipeline also in B's forward.
    times = M * (forward_passes(s) + 1)
    weights = (blocks if once else times * of_blocks) + times * of_first + vocabulary
    gradients = (FLOAT32 / s.width if once else M) * blocks + M * first + vocabulary
    part = part_sent(s.mesh[FSDP])
    return [
        Transfer(FSDP, 'weights, gathered', part * weights),
        Transfer(FSDP, 'gradients, scattered', part * gradients),
    ]


def routed(cfg: ModelConfig, kind: str) -> bool:
    """Returns whether a layer of this kind has experts."""
    return layer_kinds(cfg, kind)[1].routed


def activations_sent(s: Microbatch, kind: str) -> tuple[list[float], list[float]]:
    """Returns the bytes that a layer gathers and scatters over tp in forward, each for attention
    and feed-forward."""
    cfg, c, t = s.cfg, s.width, s.tokens
    x = t * cfg.d_model * c
    attention = t * s.of_layer(kind).gathered * c
    choices = t * cfg.experts_per_token * 8 if routed(cfg, kind) else 0
    return [attention, x + choices], [x, x]


@functools.cache
def layer_activations_sent(s: Microbatch, kind: str, passes: int) -> float:
    """Returns the bytes that a layer gathers and scatters over tp in all its passes."""
    gathers, scatters = activations_sent(s, kind)
    sent = (passes + 1) * sum(gathers + scatters)
    if routed(s.cfg, kind):
        sent -= 4 * s.tokens * s.cfg.experts_per_token  # numbers of experts: no gradient
    if s.cfg.remat != 'none':  # what the feed-forward scatters is not needed again
        sent += sum(gathers) + scatters[0] * (RESIDUAL not in s.cfg.spared_names)
    return sent


def activation_transfers(s: Part) -> list[Transfer]:
    """Lists what moves over tp: the residual stream, gathered and scattered by both parts of each
    layer."""
    passes, x = forward_passes(s), s.tokens * s.cfg.d_model * s.width
    sent = sum(n * layer_activations_sent(s.micro, kind, passes) for kind, n in s.layers.items())
    sent += 2 * x  # the embedding's
    sent += s.head_tokens * s.mesh[TP] * (2 * s.cfg.d_model * s.width + 28)  # and loss statistics
    sent *= part_sent(s.mesh[TP]) * s.microbatches
    return [Transfer(TP, 'activations, gathered and scattered', sent)]


def context_transfers(s: Part) -> list[Transfer]:
    """Lists what moves over cp: what keys and values are made of, and its gradients.

    A ring passes on n - 1 times, and gradients, in float32, n times; `gather` sends as many bytes
    at once, and gradients in the compute type. Remat does it again: a ring but for the first time,
    which backward shares, and not at all where its results are kept.
    """
    n, cfg = s.mesh[CP], s.cfg
    hop = sum(layers * s.travels(kind) for kind, layers in s.layers.items())
    once, again = (n - 1) * hop * s.width, 0
    if cfg.remat != 'none' and not (s.in_ring and ATTENTION_OUTPUT in cfg.spared_names):
        again = once - hop * s.width if s.in_ring else once
    forward = forward_passes(s) * once + again
    backward = once + n * hop * FLOAT32 if s.in_ring else once
    sent = s.microbatches * (forward + backward) if n > 1 else 0
    found = [Transfer(CP, f'keys and values, by {cfg.cp_style}', sent)]
    moved = sum(layers * changes_sent(s, kind) for kind, layers in s.layers.items())
    times = forward_passes(s) + 1 + (cfg.remat != 'none')
    return [*found, Transfer(CP, 'what parts do to states', s.microbatches * times * moved)]


def changes_sent(s: Microbatch, kind: str) -> float:
    """Returns the bytes that a linear layer gathers over cp in a pass: of each of a device's two
    parts what it does to a state, float32, and the inputs that convolutions reach over to."""
    sizes, cfg = s.of_layer(kind), s.cfg
    if not sizes.state:
        return 0.0
    change = s.state_numbers(kind) * (sizes.key + sizes.value) / sizes.value * FLOAT32
    reached = min(cfg.delta_conv - 1, s.T // (2 * s.mesh[CP]))
    inputs = s.rows * reached * cfg.d_model * s.width
    return 2 * (s.mesh[CP] - 1) * (change + inputs)


def expert_transfers(s: Part) -> list[Transfer]:
    """Lists what moves over ep: rows to their experts and back, and their gradients; again, by
    remat, those that are not kept."""
    cfg = s.cfg
    layers = s.blocks * sum(routed(cfg, kind) for kind in cfg.block)
    rows = s.tokens * cfg.experts_per_token * cfg.d_model * s.width
    times = 2 * (forward_passes(s) + 1)
    if cfg.remat != 'none':
        times += 1 + (EXPERTS not in cfg.spared_names)
    sent = part_sent(s.mesh[EP]) * s.microbatches * layers * rows * times
    return [Transfer(EP, 'rows to their experts and back', sent)] if layers else []


def pipeline_transfers(s: Part) -> list[Transfer]:
    """Lists what moves over pp: activations between stages, and the shared head."""
    if s.schedule is None:
        return []
    x = s.local * s.cfg.d_model * s.width
    heads = s.microbatches * 2 * x * part_sent(s.mesh[PP])
    return [
        Transfer(PP, 'activations and their gradients, each tick', 2 * s.schedule.ticks * x),
        Transfer(PP, 'the head, shared by the stages', heads),
    ]


@functools.cache
def gradient_transfers(params: Group, mesh: Mesh) -> list[Transfer]:
    """Lists the sums of gradients, once per step, over the axes that do not shard their parameter:
    as a hierarchy, scattered over the innermost axis first."""
    sent, sizes = dict.fromkeys(AXES, 0.0), dict(mesh)
    for axes, _, n in params.by_axes:
        part = 2.0 * FLOAT32 * (n // math.prod(sizes[axis] for axis in axes))
        for axis in reversed(AXES):
            if axis not in axes:
                sent[axis] += part * part_sent(sizes[axis])
                part /= sizes[axis]
    return [Transfer(axis, 'gradients, summed', n) for axis, n in sent.items() if n]


@functools.cache
def muon_transfers(matrices: tuple[Shape, ...]) -> list[Transfer]:
    """Lists what moves so that each matrix is whole on its home, and its update on all devices."""
    sent = dict.fromkeys(AXES, 0.0)
    for axis, n in (pair for shape in matrices for pair in shape.sent):
        sent[axis] += n
    return [Transfer(axis, 'matrices to their homes and back', n) for axis, n in sent.items() if n]


def all_transfers(s: Part) -> list[Transfer]:
    """Lists all that a device sends in a step."""
    found = [
        *weight_transfers(s),
        *activation_transfers(s),
        *context_transfers(s),
        *expert_transfers(s),
        *pipeline_transfers(s),
        *gradient_transfers(s.declared.all, s.sizes),
        *muon_transfers(s.of_muon),
    ]
    return [t for t in found if t.bytes > 0]


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


def bubble(s: Part) -> float:
    """Returns the part of the blocks' time that a stage idles, the ticks being in lock step."""
    if s.schedule is None:
        return 0.0
    return s.schedule.bubble


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a step of a config on so many of a chip: seconds; bytes and FLOPs per device."""

    chip: Chip
    devices: int
    tokens: int  # of a step, over all devices
    parameters: int
    active: int
    useful: float  # FLOPs per token, of the model
    computed: float  # FLOPs per token, with all that is computed again; all devices
    memory: Memory
    work: list[Work]
    transfers: list[Transfer]
    of_muon: tuple[Shape, ...]  # the matrices that Muon updates, the costliest shape first
    bubble: float
    spans: dict[str, int]  # devices, numbered in a row, that an axis' groups reach over

    @property
    def matmul_seconds(self) -> float:
        return sum(w.matmul_seconds(self.chip) for w in self.work)

    @property
    def memory_seconds(self) -> float:
        return sum(w.bytes for w in self.work) / self.chip.bandwidth

    @property
    def bubble_seconds(self) -> float:
        return self.work[0].seconds(self.chip) * self.bubble / (1 - self.bubble)

    @property
    def compute_seconds(self) -> float:
        """Seconds of each part by the longer of matmuls and memory, and the bubble."""
        return sum(w.seconds(self.chip) for w in self.work) + self.bubble_seconds

    @functools.cached_property
    def axis_bytes(self) -> dict[str, float]:
        sent = {axis: sum(t.bytes for t in self.transfers if t.axis == axis) for axis in AXES}
        return {axis: n for axis, n in sent.items() if n}

    @property
    def axis_seconds(self) -> dict[str, float]:
        return {
            axis: n / self.chip.axis_bandwidth(self.spans[axis])
            for axis, n in self.axis_bytes.items()
        }

    @property
    def seconds(self) -> float:
        """Seconds with every collective waited for, as XLA:TPU does by default."""
        return self.compute_seconds + sum(self.axis_seconds.values())

    @property
    def overlapped_seconds(self) -> float:
        """Seconds with every collective behind compute: the other end."""
        return max(self.compute_seconds, *self.axis_seconds.values(), 0.0)

    def mfu(self, seconds: float) -> float:
        return self.useful * self.tokens / (seconds * self.devices * self.chip.flops)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.chip.memory


def estimate(config: ConfigDict, chip: Chip) -> Estimate:
    """Estimates a config that `validate` accepts, on devices of that chip.

    Raises ConfigError if the chip lacks the config's type of matmuls.
    """
    check_matmul_type(config, chip)
    return estimate_part(part_of(config, chip.platform), chip)


def estimate_part(s: Part, chip: Chip, used: Memory | None = None) -> Estimate:
    """Estimates one device's part, which its share describes; `used`: its memory, if known."""
    work, sizes = all_work(s), [s.mesh[axis] for axis in AXES]
    of_model = sum(w.flops for w in work if w.part != NEWTON_SCHULZ)
    return Estimate(
        chip=chip,
        devices=math.prod(sizes),
        tokens=s.step_tokens,
        parameters=s.declared.parameters,
        active=s.declared.active,
        useful=useful_flops(s.cfg, s.T),
        computed=of_model * math.prod(sizes) / s.step_tokens,
        memory=used or memory(s),
        work=work,
        transfers=all_transfers(s),
        of_muon=s.of_muon,
        bubble=bubble(s),
        spans={axis: math.prod(sizes[i:]) for i, axis in enumerate(AXES)},
    )
