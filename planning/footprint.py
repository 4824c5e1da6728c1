"""The memory of one device in training, by part, from the config alone.

Parameters, moments and gradients follow from the declarations and are exact. The rest is what the
step must hold at its two peaks: in the head, where the logits of a chunk exist, and in the backward
pass of a layer. Activations are listed array by array (`layer_values`), as XLA keeps them: an
elementwise chain fused, and each input of a matmul once. tests/test_plan.py compares the sum with
what XLA says of the compiled step.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from config import ModelConfig
from model import layer_params, model_config, model_params
from parallel import BATCH, EP, FSDP, PP, TP, Param, Tree, is_param, spec_axes
from pipeline.schedules import Schedule
from train_step import train_schedule

FLOAT32 = 4  # bytes of a master parameter, a moment, an accumulated gradient


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device has of a config: its mesh, and the sizes of its part of a microbatch."""

    cfg: ModelConfig
    platform: str  # of jax
    mesh: dict[str, int]
    microbatches: int
    T: int  # positions of a sequence
    rows: int  # sequences of a microbatch on a device
    chunks: int  # virtual stages of a pipeline stage
    gather: str  # config.fsdp_gather
    schedule: Schedule | None  # None: no pipeline

    @property
    def declared(self) -> Tree:
        """Every parameter."""
        return declarations(self.cfg, self.chunks)

    @property
    def tokens(self) -> int:
        """Of a microbatch, all positions: what heads, feed-forward and experts work on."""
        return self.rows * self.T

    @property
    def step_tokens(self) -> int:
        """Of a step, over all devices."""
        return self.tokens * self.microbatches * math.prod(self.mesh[axis] for axis in BATCH)

    @property
    def local(self) -> int:
        """Of a microbatch, the positions of this tp device: the residual stream."""
        return self.tokens // self.mesh['tp']

    @property
    def width(self) -> int:
        """Bytes of a number in the compute type."""
        return jnp.dtype(self.cfg.compute_dtype).itemsize

    @property
    def blocks(self) -> int:
        """Blocks of a device."""
        return self.cfg.n_blocks // self.mesh['pp']

    @property
    def assignments(self) -> int:
        """Rows that a device's tokens are to its experts: choices, and room for the uneven."""
        cfg, ep = self.cfg, self.mesh['ep']
        rows = self.tokens * cfg.experts_per_token
        full = not cfg.buffer_factor or cfg.buffer_factor >= ep
        slots = rows if full else math.ceil(cfg.buffer_factor * rows / ep)
        return rows if ep == 1 else ep * slots

    @property
    def head_tokens(self) -> int:
        """Tokens of a microbatch whose loss this device computes: stages share the head."""
        return self.local // self.mesh['pp']

    @property
    def chunk(self) -> int:
        """Positions whose logits exist at a time, as `cross_entropy` cuts them."""
        n = -(-self.head_tokens // self.cfg.loss_chunk)
        while self.head_tokens % n:
            n += 1
        return self.head_tokens // n * self.mesh['tp']


@functools.cache
def declarations(cfg: ModelConfig, chunks: int) -> Tree:
    return model_params(cfg, chunks)


@functools.cache
def layer_declaration(cfg: ModelConfig, kind: str) -> Tree:
    return layer_params(cfg, kind)


def share(config: ConfigDict, platform: str) -> Share:
    mesh = dict(config.mesh)
    over = config.microbatches * mesh['dp'] * mesh['fsdp'] * mesh['ep']
    return Share(
        cfg=model_config(config, platform),
        platform=platform,
        mesh=mesh,
        microbatches=config.microbatches,
        T=config.seq_len,
        rows=config.batch_size // over,
        chunks=config.pipeline.chunks,
        gather=config.fsdp_gather,
        schedule=train_schedule(config) if mesh[PP] > 1 else None,
    )


def shard_size(p: Param, mesh: dict[str, int], whole: str | None = None) -> int:
    """Numbers of a parameter on one device; `whole`: after a gather over that axis."""
    axes = [axis for axis in spec_axes(p.spec) if axis != whole]
    return math.prod(p.shape) // math.prod(mesh[axis] for axis in axes)


def leaves(tree: Tree) -> list[Param]:
    return jax.tree.leaves(tree, is_leaf=is_param)


def gathered(tree: Tree, s: Share) -> float:
    """Bytes of a tree's matrices as the matmuls want them: whole over fsdp, in the compute type."""
    return sum(shard_size(p, s.mesh, FSDP) * s.width for p in leaves(tree) if p.matrix)


# ---------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Value:
    """An array that the forward pass of a layer makes and its backward pass reads; `group` is its
    name in layers.REMAT_NAMES, by which model.remat_keep and remat_offload keep it."""

    bytes: float
    group: str = ''


def attention_values(s: Share) -> list[Value]:
    cfg, c, tp, t = s.cfg, s.width, s.mesh[TP], s.tokens
    D, N = cfg.d_model, cfg.n_heads // tp
    if cfg.attention == 'mla':
        query, key = cfg.q_rank or D, cfg.nope_dim + cfg.rope_dim
        value, kv = cfg.v_dim, N
        latents = cfg.kv_rank + cfg.rope_dim
        inputs = [
            Value(s.local * (latents + cfg.q_rank) * c),  # before their norm
            Value(t * (latents + query) * c),  # gathered
            Value(t * (cfg.kv_rank + query) * c),  # and apart
        ]
    else:
        key = value = cfg.head_dim
        kv = max(cfg.n_kv_heads // tp, 1)
        inputs = [Value(t * D * c)]
    return [
        Value(s.local * D * c),  # normed
        *inputs,
        Value(t * (N * key + kv * (key + value)) * c, 'qkv'),
        Value(t * N * (2 * value * c + FLOAT32), 'attention'),  # twice: with heads last as well
        Value(s.local * D * c, 'residual'),
    ]


def feed_forward_values(s: Share, kind: str) -> list[Value]:
    cfg, c, tp, t = s.cfg, s.width, s.mesh[TP], s.tokens
    D = cfg.d_model
    values = [Value(s.local * D * c), Value(t * D * c)]  # normed, gathered
    if kind == 'dense':
        return [*values, *swiglu_values(t, cfg.d_ff // tp, c)]
    values += [
        Value(s.assignments * D * c),  # rows by expert
        *swiglu_values(s.assignments, cfg.d_expert // tp, c),
        Value(t * cfg.experts_per_token * D * c, 'hidden'),  # the output of each choice
        Value(s.local * (D + 2 * cfg.n_experts) * FLOAT32),  # the router's
    ]
    return values + swiglu_values(t, cfg.n_shared_experts * cfg.d_expert // tp, c)


def swiglu_values(rows: int, width: int, c: int) -> list[Value]:
    return [Value(2 * rows * width * c, 'hidden'), Value(rows * width * c)]


def layer_values(s: Share, kind: str) -> list[Value]:
    """What a layer of that kind keeps between forward and backward without rematerialization."""
    x = Value(s.local * s.cfg.d_model * s.width, 'residual')
    return [x, *attention_values(s), *feed_forward_values(s, kind)]


def kept_of_layer(s: Share, kind: str) -> float:
    """Bytes that a layer keeps from its forward to its backward pass, by model.remat: its input
    and what is kept by name."""
    values = layer_values(s, kind)
    if s.cfg.remat == 'none':
        return sum(v.bytes for v in values)
    keep = s.cfg.kept_names
    kept = sum(v.bytes for v in values if v.group in keep)
    return kept + ('residual' not in keep) * values[0].bytes


def recomputed_of_layer(s: Share, kind: str) -> float:
    """Bytes that the backward pass of a layer computes again, all of it before it begins."""
    return sum(v.bytes for v in layer_values(s, kind)) - kept_of_layer(s, kind)


def gradients_of_layer(s: Share, kind: str) -> float:
    """Bytes of the gradients of activations that are there at once in a layer's backward pass."""
    cfg, c, tp, t = s.cfg, s.width, s.mesh[TP], s.tokens
    if kind == 'dense':
        feed_forward = t * (2 * cfg.d_ff // tp + 2 * cfg.d_model) * c
    else:
        rows, width = s.assignments, cfg.d_expert // tp
        # The kernels leave both factors of a SwiGLU's product, and its gradient, in float32.
        feed_forward = rows * (3 * width * FLOAT32 + cfg.d_model * (FLOAT32 + c))
        if s.mesh[EP] > 1:
            feed_forward += 2 * rows * cfg.d_model * c  # as they come, and go back
    qkv = next(v.bytes for v in attention_values(s) if v.group == 'qkv')
    attention = qkv  # their gradients
    if cfg.attention_kernel == 'blockwise':
        block = min(cfg.attention_block, s.T)
        scores = s.rows * cfg.n_heads // tp * block**2
        attention = qkv * FLOAT32 / c + 3 * scores * FLOAT32 + scores * c
    return max(feed_forward, attention)


def linear_values(s: Share, kind: str) -> float:
    """Bytes of the inputs and output gradients of all `linear` of a layer: what W needs."""
    numbers = 0
    for p in leaves(layer_declaration(s.cfg, kind)):
        if not p.linear:
            continue
        tp = s.mesh[TP] if TP in spec_axes(p.spec) else 1
        tokens = s.tokens if TP in spec_axes(p.spec) else s.local
        if p.spec[0] == TP:  # tp shards what goes in
            inputs, outputs = math.prod(p.shape[:-1]) // tp, p.shape[-1]
        else:
            inputs, outputs = p.shape[0], math.prod(p.shape[1:]) // tp
        numbers += tokens * (inputs + outputs)
    return numbers * s.width


def pipeline_stash(s: Share) -> float:
    """Bytes of inputs, output gradients and what W needs, in flight between stages."""
    if s.schedule is None:
        return 0.0
    x = s.local * s.cfg.d_model * s.width
    stash = (s.schedule.x_depth + s.schedule.g_depth + 2) * x  # and the two that arrive
    if s.schedule.split:
        block = sum(linear_values(s, kind) for kind in s.cfg.block)
        stash += s.schedule.s_depth * s.blocks * block
    return stash


def head_parts(s: Share) -> tuple[float, float]:
    """Bytes of a chunk's logits, float32 and their gradient in the compute type; and of the head's
    weight, gathered, with its gradient where that adds up over chunks."""
    matrix = s.cfg.vocab_size // s.mesh[TP] * s.cfg.d_model
    logits = s.chunk * s.cfg.vocab_size // s.mesh[TP] * (FLOAT32 + s.width)
    several = s.chunk < s.head_tokens * s.mesh[TP]
    if s.platform == 'gpu':  # a matmul does not add to a sum, and its operands are laid out anew
        return logits, matrix * (3 * s.width + 2 * several * FLOAT32)
    return logits, matrix * (s.width + several * FLOAT32)


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, the fullest one, by part. Not all are there at once: see `peak`."""

    parameters: float  # float32, the master copy
    moments: float  # float32, Adam's two
    gradients: float  # float32, added up over microbatches
    microbatch_gradients: float  # float32, of one microbatch, before they are added
    stash: float  # what is in flight between pipeline stages
    activations: float  # kept from forward to backward
    recomputed: float  # in the backward pass of one layer
    gathered: float  # weights in the compute type: of one layer, or of all
    layer_gradients: float  # of activations, within a layer
    logits: float  # of a chunk, with their gradient
    head: float  # the head's weight, and its gradient over chunks
    ahead: bool  # whether all weights are gathered, for the whole step

    @property
    def state(self) -> float:
        return self.parameters + self.moments

    @property
    def always(self) -> float:
        """From the first microbatch to the last."""
        return self.state + self.gradients + self.stash + self.ahead * self.gathered

    @property
    def in_backward(self) -> float:
        """Besides, in the backward pass of the last layer."""
        weights = 0 if self.ahead else self.gathered
        within = self.recomputed + weights + self.layer_gradients
        return self.activations + self.microbatch_gradients + within

    @property
    def in_head(self) -> float:
        """Besides, in the head; a pipeline keeps no activations between forward and backward."""
        return self.logits + self.head + (0 if self.stash else self.activations)

    @property
    def peak(self) -> float:
        return self.always + max(self.in_backward, self.in_head)


def memory(s: Share) -> Memory:
    kinds, blocks = tuple(s.cfg.block), s.declared['blocks']
    count = sum(shard_size(p, s.mesh) for p in leaves(s.declared))
    in_blocks = sum(shard_size(p, s.mesh) for p in leaves(blocks))
    ahead = s.gather == 'step'
    summed = count
    if ahead:
        summed -= in_blocks
        in_blocks = sum(shard_size(p, s.mesh, FSDP) for p in leaves(blocks))
        summed += in_blocks
    kept = s.blocks // s.chunks * sum(kept_of_layer(s, kind) for kind in kinds)
    if s.schedule is None:
        kept += s.cfg.first_dense * kept_of_layer(s, 'dense')
    layers = max(gathered(layer_declaration(s.cfg, kind), s) for kind in kinds)
    logits, head = head_parts(s)
    return Memory(
        parameters=FLOAT32 * count,
        moments=2 * FLOAT32 * count,
        gradients=FLOAT32 * summed * (s.schedule is not None or s.microbatches > 1),
        microbatch_gradients=FLOAT32 * in_blocks / s.chunks,
        stash=pipeline_stash(s),
        activations=kept,
        recomputed=max(recomputed_of_layer(s, kind) for kind in kinds),
        gathered=gathered(blocks, s) if ahead else layers,
        layer_gradients=max(gradients_of_layer(s, kind) for kind in kinds),
        logits=logits,
        head=head,
        ahead=ahead,
    )
