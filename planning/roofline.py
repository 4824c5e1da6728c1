"""The time of a training step on chips that are not there: a roofline, from the config alone.

For each part of the step, the FLOPs of its matmuls at the chip's peak and the bytes it reads and
writes at the memory's bandwidth, whichever takes longer; the pipeline's bubble from its schedule;
and the bytes that a device sends along each mesh axis at the bandwidth of one dimension of the
network. No program reaches the peaks: this is a bound, which says what limits a config and which of
two configs is better (Williams et al. 2009).

FLOPs: a matmul is 2·m·k·n; of causal attention half of T² counts. `useful` are 6 a weight that a
token meets plus attention (model.flops_per_token), `computed` those with what is computed again.
"""

import dataclasses
import functools
import math

from ml_collections import ConfigDict

from config import ModelConfig
from machine.chips import Chip
from model import flops_per_token
from parallel import AXES, EP, FSDP, PP, TP, Param, Tree, count, free_axes
from pipeline.schedules import ideal, lock_step
from planning.footprint import (
    FLOAT32,
    Memory,
    Share,
    declarations,
    gathered,
    kept_of_layer,
    layer_declaration,
    layer_values,
    leaves,
    memory,
    shard_size,
    share,
)
from train_step import pipeline_costs

useful_flops = functools.cache(flops_per_token)


@functools.cache
def counted(cfg: ModelConfig, chunks: int, active: bool) -> int:
    return count(declarations(cfg, chunks), active)


# Which name in model.remat_keep spares computing a weight's matmul again.
KEPT_BY = {
    'w_q': 'qkv', 'w_k': 'qkv', 'w_v': 'qkv', 'w_q_up': 'qkv', 'w_k_up': 'qkv', 'w_v_up': 'qkv',
    'w_o': 'residual', 'w_gate': 'hidden', 'w_up': 'hidden', 'w_down': 'hidden',
}  # fmt: skip


# What a scan over layers keeps for its backward pass moves so many times more: the stack is filled
# with zeros, a layer's part copied into it, and out of it again. This is why computing again is
# often faster on a chip with much compute beside its memory.
STACKING = 5


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a step for a part of the model."""

    part: str
    flops: float
    bytes: float  # read and written in its memory

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Transfer:
    """What one device sends along a mesh axis in a step, for one purpose."""

    axis: str
    purpose: str
    bytes: float


# ---------------------------------------------------------------------------------------------
# FLOPs and memory traffic
# ---------------------------------------------------------------------------------------------


def forward_passes(s: Share) -> int:
    """Forward passes of a microbatch that run whole: B of a pipeline runs the stage once more."""
    return 1 if s.schedule is None else 2


def attention_flops(s: Share) -> tuple[float, float]:
    """Forward and backward of one layer's attention for a microbatch: two matmuls and five."""
    cfg = s.cfg
    if cfg.attention == 'mla':
        key, value = cfg.nope_dim + cfg.rope_dim, cfg.v_dim
    else:
        key = value = cfg.head_dim
    each = s.tokens * s.T * cfg.n_heads / s.mesh[TP]  # 2·T²/2
    return each * (key + value), each * (3 * key + 2 * value)


def matmul_flops(s: Share, kind: str, again: bool = False) -> float:
    """One pass over a layer's matrices, for a microbatch on a device: 2 a weight and token. With
    `again` only those that remat computes again; a layer's last matmul is not needed."""
    cfg = s.cfg

    def walk(tree: Tree, name: str = '') -> float:
        if not isinstance(tree, Param):
            return sum(walk(child, key) for key, child in tree.items())
        unneeded = KEPT_BY.get(name) in cfg.kept_names or (name == 'w_down' and tree.use == 1)
        if not tree.matrix or (again and unneeded):
            return 0.0
        flops = 2 * math.prod(tree.shape) * tree.use * s.local
        if name == 'w_k_up':  # hands the rotary key to all heads as well
            flops *= (1 + cfg.rope_dim / cfg.kv_rank) * (1 + cfg.rope_dim / cfg.nope_dim)
        return flops

    return walk(layer_declaration(cfg, kind))


def layers_work(s: Share, part: str, kinds: tuple[str, ...], n: int) -> Work:
    """`n` times layers of these kinds, for all microbatches of a step."""
    passes, remat = forward_passes(s), s.cfg.remat != 'none'
    attend, attend_back = attention_flops(s)
    flops = moved = 0.0
    for kind in kinds:
        flops += (passes + 2) * matmul_flops(s, kind) + passes * attend + attend_back
        if remat:
            flops += matmul_flops(s, kind, again=True)
            flops += attend * ('attention' not in s.cfg.kept_names)
        values = sum(v.bytes for v in layer_values(s, kind))
        weights = gathered(layer_declaration(s.cfg, kind), s)
        # Forward writes and reads each array once, backward twice that.
        moved += (passes + remat + 2) * 2 * (values + weights)
        moved += STACKING * kept_of_layer(s, kind)
        if s.cfg.attention_kernel == 'blockwise':
            moved += (passes + remat + 2) * score_bytes(s)
        # Each gradient is written, and added to a sum that is read and written.
        shards = [shard_size(p, s.mesh) for p in leaves(layer_declaration(s.cfg, kind))]
        moved += 4 * FLOAT32 * sum(shards)
    return Work(part, s.microbatches * n * flops, s.microbatches * n * moved)


def score_bytes(s: Share) -> float:
    """Scores of blockwise attention, written and read in float32 and in the compute type."""
    scores = s.tokens * s.T / 2 * s.cfg.n_heads / s.mesh[TP]
    return 2 * scores * (FLOAT32 + s.width)


def head_work(s: Share) -> Work:
    """Three matmuls with the vocabulary; logits written and read, their gradient read twice."""
    cfg, tokens = s.cfg, s.head_tokens * s.mesh[TP]
    rows = cfg.vocab_size / s.mesh[TP]
    matrix, logits = rows * cfg.d_model, tokens * rows
    chunks = tokens // s.chunk
    moved = logits * (2 * FLOAT32 + 3 * s.width) + matrix * (3 * s.width + 2 * FLOAT32 * chunks)
    return Work('head', s.microbatches * 6 * tokens * matrix, s.microbatches * moved)


def optimizer_work(s: Share) -> Work:
    """Gradients read twice, for the norm and the update; parameters and moments read, written."""
    n = sum(shard_size(p, s.mesh) for p in leaves(s.declared))
    return Work('optimizer', 12.0 * n, 8 * FLOAT32 * n)


def all_work(s: Share) -> list[Work]:
    cfg = s.cfg
    parts = [layers_work(s, 'blocks', tuple(cfg.block), s.blocks)]
    if cfg.first_dense:
        parts.append(layers_work(s, 'first layers', ('dense',), cfg.first_dense))
    return [*parts, head_work(s), optimizer_work(s)]


# ---------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------


def part_sent(n: int) -> float:
    """Of what an all-gather, reduce-scatter or all-to-all gathers, the part that a device sends."""
    return (n - 1) / n


def weight_transfers(s: Share) -> list[Transfer]:
    """Gathers of weights over fsdp and the way back of their gradients."""
    declared, once, M = s.declared, s.gather == 'step', s.microbatches
    blocks = gathered(declared['blocks'], s)
    first = gathered(declared['first'], s) if 'first' in declared else 0.0
    vocabulary = 2 * M * gathered(declared['embed'], s)  # as embedding and as head
    # In forward, and in backward, which does not keep them; in a pipeline also in B's forward.
    times = M * (forward_passes(s) + 1)
    weights = (1 if once else times) * blocks + times * first + vocabulary
    gradients = (FLOAT32 / s.width if once else M) * blocks + M * first + vocabulary
    part = part_sent(s.mesh[FSDP])
    return [
        Transfer(FSDP, 'weights, gathered', part * weights),
        Transfer(FSDP, 'gradients, scattered', part * gradients),
    ]


def activations_sent(s: Share, kind: str) -> tuple[list[float], list[float]]:
    """Bytes that a layer gathers and scatters over tp in forward, (attention, feed-forward)."""
    cfg, c, t = s.cfg, s.width, s.tokens
    x = t * cfg.d_model * c
    if cfg.attention == 'mla':
        attention = t * (cfg.kv_rank + cfg.rope_dim + (cfg.q_rank or cfg.d_model)) * c
    else:
        attention = x + (2 * t * cfg.head_dim * c if cfg.n_kv_heads == 1 else 0)
    choices = t * cfg.experts_per_token * 8 if kind == 'moe' else 0
    return [attention, x + choices], [x, x]


def activation_transfers(s: Share) -> list[Transfer]:
    """Over tp: the residual stream, gathered and scattered by both parts of each layer."""
    cfg, passes, remat = s.cfg, forward_passes(s), s.cfg.remat != 'none'
    x = s.tokens * cfg.d_model * s.width

    def layer(kind: str) -> float:
        gathers, scatters = activations_sent(s, kind)
        sent = (passes + 1) * sum(gathers + scatters)
        if kind == 'moe':
            sent -= 4 * s.tokens * cfg.experts_per_token  # numbers of experts: no gradient
        if remat:  # what the feed-forward scatters is not needed again
            sent += sum(gathers) + scatters[0] * ('residual' not in cfg.kept_names)
        return sent

    sent = s.blocks * sum(layer(kind) for kind in cfg.block)
    sent += cfg.first_dense * layer('dense')
    sent += 2 * x  # the embedding's
    sent += s.head_tokens * s.mesh[TP] * (2 * cfg.d_model * s.width + 28)  # and loss statistics
    sent *= part_sent(s.mesh[TP]) * s.microbatches
    return [Transfer(TP, 'activations, gathered and scattered', sent)]


def expert_transfers(s: Share) -> list[Transfer]:
    """Rows to their experts and back, and their gradients; again, by remat, what is not kept."""
    cfg = s.cfg
    layers = s.blocks * cfg.block.count('moe')
    rows = s.tokens * cfg.experts_per_token * cfg.d_model * s.width
    times = 2 * (forward_passes(s) + 1)
    if cfg.remat != 'none':
        times += 1 + ('hidden' not in cfg.kept_names)
    sent = part_sent(s.mesh[EP]) * s.microbatches * layers * rows * times
    return [Transfer(EP, 'rows to their experts and back', sent)] if layers else []


def pipeline_transfers(s: Share) -> list[Transfer]:
    if s.schedule is None:
        return []
    x = s.local * s.cfg.d_model * s.width
    heads = s.microbatches * 2 * x * part_sent(s.mesh[PP])
    return [
        Transfer(PP, 'activations and their gradients, each tick', 2 * s.schedule.ticks * x),
        Transfer(PP, 'the head, shared by the stages', heads),
    ]


def gradient_transfers(s: Share) -> list[Transfer]:
    """Each gradient, summed over the axes that do not shard its parameter, once a step: as a
    hierarchy, scattered over the innermost axis first."""
    sent = dict.fromkeys(AXES, 0.0)
    for p in leaves(s.declared):
        part = 2.0 * FLOAT32 * shard_size(p, s.mesh)
        for axis in reversed(free_axes(p.spec)):
            sent[axis] += part * part_sent(s.mesh[axis])
            part /= s.mesh[axis]
    return [Transfer(axis, 'gradients, summed', n) for axis, n in sent.items()]


def all_transfers(s: Share) -> list[Transfer]:
    found = [
        *weight_transfers(s),
        *activation_transfers(s),
        *expert_transfers(s),
        *pipeline_transfers(s),
        *gradient_transfers(s),
    ]
    return [t for t in found if t.bytes > 0]


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


def bubble(s: Share) -> float:
    """The part of the blocks' time that a stage idles, the ticks being in lock step."""
    if s.schedule is None:
        return 0.0
    costs = pipeline_costs(s.cfg.remat)
    return 1 - ideal(s.schedule, costs) / lock_step(s.schedule, costs)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step of a config takes on so many of a chip. Seconds; bytes and FLOPs of a device."""

    chip: Chip
    devices: int
    tokens: int  # of a step, over all devices
    parameters: int
    active: int
    useful: float  # FLOPs a token, of the model
    computed: float  # FLOPs a token, with what is computed again; all devices
    memory: Memory
    work: list[Work]
    transfers: list[Transfer]
    bubble: float
    spans: dict[str, int]  # devices, numbered in a row, that an axis' groups reach over

    @property
    def matmul_seconds(self) -> float:
        return sum(w.flops for w in self.work) / self.chip.flops

    @property
    def memory_seconds(self) -> float:
        return sum(w.bytes for w in self.work) / self.chip.bandwidth

    @property
    def bubble_seconds(self) -> float:
        return self.work[0].seconds(self.chip) * self.bubble / (1 - self.bubble)

    @property
    def compute_seconds(self) -> float:
        """Each part by the longer of matmuls and memory, and the bubble."""
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
        """With every collective waited for, as XLA:TPU does by default."""
        return self.compute_seconds + sum(self.axis_seconds.values())

    @property
    def overlapped_seconds(self) -> float:
        """With every collective behind compute: the other end."""
        return max(self.compute_seconds, *self.axis_seconds.values(), 0.0)

    def mfu(self, seconds: float) -> float:
        return self.useful * self.tokens / (seconds * self.devices * self.chip.flops)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.chip.memory


def estimate(config: ConfigDict, chip: Chip) -> Estimate:
    """The plan of a config that `validate` accepts, on devices of that chip."""
    return estimate_share(share(config, chip.platform), chip)


def estimate_share(s: Share, chip: Chip) -> Estimate:
    work, sizes = all_work(s), [s.mesh[axis] for axis in AXES]
    return Estimate(
        chip=chip,
        devices=math.prod(sizes),
        tokens=s.step_tokens,
        parameters=counted(s.cfg, s.chunks, active=False),
        active=counted(s.cfg, s.chunks, active=True),
        useful=useful_flops(s.cfg, s.T),
        computed=sum(w.flops for w in work) * math.prod(sizes) / s.step_tokens,
        memory=memory(s),
        work=work,
        transfers=all_transfers(s),
        bubble=bubble(s),
        spans={axis: math.prod(sizes[i:]) for i, axis in enumerate(AXES)},
    )
