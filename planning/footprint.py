"""Estimates the memory of one device in training, by part, from the config alone.

Parameters, the optimizer's slots and gradients follow from the declarations and are exact. The rest
is what the step must hold at its peaks: in the head, where the logits of a chunk exist, in the
backward pass of a layer, and in the update, beside all gradients. Activations are listed array by
array (`layer_values`), as XLA keeps them: an elementwise chain fused, and each input of a matmul
once. tests/test_plan.py compares the sum with what XLA says of the compiled step.
"""

import dataclasses
import functools
import math

from config import ATTENTION_OUTPUT, EXPERTS, HIDDEN, QKV, RESIDUAL
from layers.attention_kernels import ATTENTION_KERNELS
from layers.delta_rule import chunk_size
from model import layer_kinds
from parallel import CP, EP, FSDP, TP, spec_axes
from planning.part import Microbatch, Part, gathered, gathered_within, layer, shards

FLOAT32 = 4  # bytes of a master parameter, a number of a slot, an accumulated gradient


# ---------------------------------------------------------------------------------------------
# Activations
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Value:
    """An array that the forward pass of a layer makes and its backward pass reads.

    `group` is its name in config.REMAT_NAMES, by which model.remat_keep and remat_offload keep it.
    """

    bytes: float
    group: str = ''


@functools.cache
def attention_values(s: Microbatch, kind: str) -> list[Value]:
    """Lists the arrays of a layer's attention, and the residual stream after it."""
    if s.is_linear(kind):
        return linear_attention_values(s, kind)
    cfg, c, tp, t = s.cfg, s.width, s.mesh[TP], s.tokens
    D, N, sizes = cfg.d_model, cfg.n_heads // tp, s.of_layer(kind)
    kv = max(sizes.kv_heads // tp, 1)
    # Gathered keys and values are those of all positions; a ring keeps what travels.
    keys = kv * (sizes.key + sizes.value) * (1 if s.in_ring else s.mesh[CP])
    latent = ATTENTION_KERNELS[cfg.attention_kernel].latent  # heads are its own
    qkv = 0 if latent else N * sizes.key + (s.travels(kind) // t if s.in_ring else keys)
    if cfg.attention_gate:
        qkv += N * sizes.value
    return [
        Value(s.local * D * c),  # normed
        Value(s.local * sizes.latents * c),  # before their norm
        *(Value(t * size * c) for size in sizes.inputs),
        Value(t * qkv * c, QKV),
        Value(t * N * (sizes.value * c + FLOAT32), ATTENTION_OUTPUT),
        Value((not latent) * t * N * sizes.value * c),  # heads last
        *([Value(t * N * sizes.value * FLOAT32)] if cfg.attention_gate else []),  # its sigmoid
        Value(s.local * D * c, RESIDUAL),
    ]


def state_block(s: Microbatch) -> int:
    """Returns the positions of a block of a linear layer."""
    own = s.T if s.mesh[CP] == 1 else s.T // (2 * s.mesh[CP])
    return min(s.cfg.attention_block, own)


def linear_attention_values(s: Microbatch, kind: str) -> list[Value]:
    """Lists the arrays of a linear layer, which computes all but its input again in backward, from
    the states before each block."""
    x, c, own = s.local * s.cfg.d_model, s.width, s.T // s.mesh[CP]
    states = s.state_numbers(kind) * own // state_block(s) * FLOAT32
    return [
        Value(x * c),  # normed
        Value(x * s.mesh[TP] * c),  # gathered
        Value(states + x * c, ATTENTION_OUTPUT),
        Value(x * c, RESIDUAL),
    ]


def block_bytes(s: Microbatch, kind: str) -> float:
    """Returns the bytes of the backward pass of a linear layer: a block's projections and what the
    rule makes of them, with gradients, all float32; gradients of the weights, added up and of a
    block; and of input and output."""
    cfg, sizes = s.cfg, s.of_layer(kind)
    heads = s.state_numbers(kind) // (s.rows * sizes.key * sizes.value)
    tokens = s.rows * (1 + (s.mesh[CP] > 1)) * state_block(s)
    numbers = 12 * (sizes.key + sizes.value) + 6 * chunk_size(state_block(s))
    weights = [p for p in layer(cfg, kind).params if p.kept_by == ATTENTION_OUTPUT]
    of_weights = 2 * FLOAT32 * sum(math.prod(p.shape) for p in weights) / s.mesh[TP]
    whole = 2 * s.tokens * cfg.d_model * s.width
    return tokens * heads * numbers * FLOAT32 + of_weights + whole


@functools.cache
def feed_forward_values(s: Microbatch, kind: str) -> list[Value]:
    """Lists the arrays of a layer's feed-forward."""
    cfg, c, tp, t = s.cfg, s.width, s.mesh[TP], s.tokens
    D, (_, feed_forward) = cfg.d_model, layer_kinds(cfg, kind)
    width = feed_forward.width(cfg)
    values = [Value(s.local * D * c), Value(t * D * c)]  # normed, gathered
    if not feed_forward.routed:
        return [*values, *swiglu_values(t, width // tp, c)]
    values += [
        Value(s.assignments * D * c),  # rows by expert
        *swiglu_values(s.assignments, width // tp, c),
        Value(t * cfg.experts_per_token * D * c, EXPERTS),  # the output of each choice
        Value(s.local * (D + 2 * cfg.n_experts) * FLOAT32),  # the router's
    ]
    shared = cfg.n_shared_experts * width // tp
    gated = [Value(t * shared * c)] if cfg.shared_gate else []  # the product times the gate
    return values + swiglu_values(t, shared, c) + gated


def swiglu_values(rows: int, width: int, c: int) -> list[Value]:
    """Lists both factors of the product, and the product."""
    return [Value(2 * rows * width * c, HIDDEN), Value(rows * width * c)]


@functools.cache
def layer_values(s: Microbatch, kind: str) -> list[Value]:
    """Lists all arrays that a layer keeps from forward to backward without rematerialization."""
    x = Value(s.local * s.cfg.d_model * s.width, RESIDUAL)
    return [x, *attention_values(s, kind), *feed_forward_values(s, kind)]


@functools.cache
def kept_of_layer(s: Microbatch, kind: str) -> float:
    """Returns the bytes that a layer keeps from forward to backward, by model.remat: its input and
    the arrays kept by name."""
    values = layer_values(s, kind)
    if s.cfg.remat == 'none':
        return sum(v.bytes for v in values)
    keep = s.cfg.kept_names
    kept = sum(v.bytes for v in values if v.group in keep)
    return kept + (RESIDUAL not in keep) * values[0].bytes


@functools.cache
def recomputed_of_layer(s: Microbatch, kind: str) -> float:
    """Returns the bytes that the backward pass of a layer computes again before it begins."""
    return sum(v.bytes for v in layer_values(s, kind)) - kept_of_layer(s, kind)


@functools.cache
def gradients_of_layer(s: Microbatch, kind: str) -> float:
    """Returns the bytes of the gradients of activations at once in a layer's backward pass."""
    cfg, c, tp, t = s.cfg, s.width, s.mesh[TP], s.tokens
    _, part = layer_kinds(cfg, kind)
    width = part.width(cfg)
    if not part.routed:
        feed_forward = t * (2 * width // tp + 2 * cfg.d_model) * c
    else:
        rows, width = s.assignments, width // tp
        # The kernels leave both factors of a SwiGLU's product, and its gradient, in float32.
        feed_forward = rows * (3 * width * FLOAT32 + cfg.d_model * (FLOAT32 + c))
        if s.mesh[EP] > 1:
            feed_forward += 2 * rows * cfg.d_model * c  # as they come, and go back
    if s.is_linear(kind):
        return max(feed_forward, block_bytes(s, kind))
    qkv = next(v.bytes for v in attention_values(s, kind) if v.group == QKV)
    attention = qkv  # their gradients
    kernel = ATTENTION_KERNELS[cfg.attention_kernel]
    partial = t * cfg.n_heads // tp * s.of_layer(kind).key * c
    attention += kernel.partials(t // s.rows, s.T, cfg) * partial
    if kernel.scores:
        block = min(cfg.attention_block, s.T if s.mesh[CP] == 1 else s.T // (2 * s.mesh[CP]))
        scores = s.rows * cfg.n_heads // tp * block**2
        attention = qkv * FLOAT32 / c + 3 * scores * FLOAT32 + scores * c
        if s.in_ring:  # of one step: keys and values, and their gradients; what travels, twice
            sizes = s.of_layer(kind)
            heads = max(sizes.kv_heads // tp, 1) * (sizes.key + sizes.value)
            attention += t * heads * (c + FLOAT32) + 2 * s.travels(kind) * (c + FLOAT32)
    return max(feed_forward, attention)


@functools.cache
def linear_values(s: Microbatch, kind: str) -> float:
    """Returns the bytes of inputs and output gradients of all `linear` of a layer, for W."""
    numbers = 0
    for p in layer(s.cfg, kind).params:
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


def pipeline_stash(s: Part) -> float:
    """Returns the bytes in flight between stages: inputs, output gradients, and all for W."""
    if s.schedule is None:
        return 0.0
    x = s.local * s.cfg.d_model * s.width
    stash = (s.schedule.x_depth + s.schedule.g_depth + 2) * x  # and the two that arrive
    if s.schedule.split:
        block = sum(linear_values(s.micro, kind) for kind in s.cfg.block)
        stash += s.schedule.s_depth * s.blocks * block
    return stash


def head_parts(s: Part) -> tuple[float, float]:
    """Returns the bytes of a chunk's logits, float32, with their gradient in the compute type; and
    of the head's weight, gathered, with its gradient where that adds up over chunks."""
    c, matrix = s.width, s.cfg.vocab_size // s.mesh[TP] * s.cfg.d_model
    logits = s.loss_tokens * s.cfg.vocab_size // s.mesh[TP]
    several = s.loss_tokens < s.head_tokens * s.mesh[TP]
    parts = logits * (FLOAT32 + c), matrix * (c + several * FLOAT32)
    if s.platform != 'gpu':
        return parts
    # A matmul does not add to a sum there: the chunk's gradient of the weight stands beside the
    # sum, after the logits in float32. The only chunk's weight is laid out anew, too.
    if not several:
        return parts[0], matrix * 3 * c
    return max(parts, (logits * c, matrix * (c + 2 * FLOAT32)), key=sum)


def head_gradient(s: Part) -> float:
    """Returns the bytes of the gradient of the head's weight, float32, sharded, which is there
    before those of the layers; a pipeline adds it up with all others."""
    if s.schedule is not None:
        return 0.0
    return FLOAT32 * shards(s.declared.of('embed' if s.cfg.tie_embeddings else 'head'), s.sizes)


def laid_out_anew(s: Part) -> float:
    """Returns the bytes of master parameters that XLA:GPU copies before the first microbatch.

    It gathers along the outermost dimension in memory, so what fsdp cuts in another is transposed,
    once for all loops.
    """
    if s.platform != 'gpu' or s.mesh[FSDP] == 1:
        return 0.0
    vocabulary = (s.declared.of(name) for name in ('embed', 'head'))
    count = sum(gathered_within(group, s.sizes) for group in vocabulary)
    for kind, layers in s.layers.items() if s.gather == 'layer' else ():
        count += layers * gathered_within(s.declared.layer(kind), s.sizes)
    return FLOAT32 * count


def made_before_backward(s: Part, gathers: float, gradients: float) -> float:
    """Returns the bytes that exist beside the head though only the backward pass reads them.

    XLA:GPU schedules what depends on nothing early: the zeros to which gradients are added, and, of
    the last layer, whose backward pass it takes out of the loop, the gathers and the attention that
    is computed again.
    """
    if s.platform != 'gpu' or s.schedule is not None:
        return 0.0
    again = 0.0
    if s.cfg.remat != 'none':
        values = attention_values(s.micro, s.cfg.block[-1])
        again = sum(v.bytes for v in values if v.group not in s.cfg.kept_names)
    return gathers + gradients + again


# ---------------------------------------------------------------------------------------------
# All of it
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes of the fullest device, by part. Not all are there at once: see `peak`."""

    parameters: float  # float32, the master copy
    moments: float  # float32, the optimizer's slots, and averaged parameters
    gradients: float  # float32, added up over microbatches
    microbatch_gradients: float  # of one microbatch, before they are added
    stash: float  # in flight between pipeline stages
    activations: float  # kept from forward to backward
    recomputed: float  # in the backward pass of one layer
    gathered: float  # weights in the compute type: of one layer, or of all
    layer_gradients: float  # of activations, within a layer
    logits: float  # of a chunk, with their gradient
    head: float  # the head's weight, and its gradient over chunks
    copies: float  # of master parameters in another layout
    beside_head: float  # what backward reads, made before it
    update: float  # whole matrices of Muon, and arrays made from them
    ahead: bool  # whether all weights are gathered, until the update

    @property
    def state(self) -> float:
        return self.parameters + self.moments

    @property
    def always(self) -> float:
        """Bytes from the first microbatch to the last, before the update."""
        weights = self.copies + self.ahead * self.gathered
        return self.state + self.gradients + self.stash + weights

    @property
    def in_backward(self) -> float:
        """Further bytes in the backward pass of the last layer."""
        weights = 0 if self.ahead else self.gathered
        within = self.recomputed + weights + self.layer_gradients
        return self.activations + self.microbatch_gradients + within

    @property
    def in_head(self) -> float:
        """Further bytes in the head; a pipeline keeps no activations from forward to backward."""
        kept = self.beside_head + (0 if self.stash else self.activations)
        return self.logits + self.head + kept

    @property
    def in_update(self) -> float:
        """Bytes beside the state in the update: the gradients of all parameters, summed."""
        return self.parameters + self.update

    @property
    def peak(self) -> float:
        before = self.always + max(self.in_backward, self.in_head)
        return max(before, self.state + self.in_update)


def memory(s: Part) -> Memory:
    """Estimates the memory of one device."""
    kinds, blocks = tuple(s.cfg.block), s.declared.of('blocks')
    count = shards(s.declared.all, s.sizes)
    in_blocks = shards(blocks, s.sizes)
    ahead = s.gather == 'step'
    summed = count
    if ahead:
        summed -= in_blocks
        in_blocks = shards(blocks, s.sizes, FSDP)
        summed += in_blocks
    kept = s.blocks // s.chunks * sum(kept_of_layer(s.micro, kind) for kind in kinds)
    if s.schedule is None:
        kept += s.cfg.first_dense * kept_of_layer(s.micro, s.cfg.first_kind)
    layers = max(
        gathered(s.declared.layer(kind), s.sizes, s.width, s.cfg.matmul_type) for kind in kinds
    )
    logits, head = head_parts(s)
    # Those of weights that are gathered once are of the compute type, as what they belong to.
    gradients = (s.width if ahead else FLOAT32) * in_blocks / s.chunks
    return Memory(
        parameters=FLOAT32 * count,
        moments=FLOAT32 * shards(s.declared.slots, s.sizes),
        gradients=FLOAT32 * summed * (s.schedule is not None or s.microbatches > 1),
        microbatch_gradients=gradients + head_gradient(s),
        stash=pipeline_stash(s),
        activations=kept,
        recomputed=max(recomputed_of_layer(s.micro, kind) for kind in kinds),
        gathered=gathered(blocks, s.sizes, s.width) if ahead else layers,
        layer_gradients=max(gradients_of_layer(s.micro, kind) for kind in kinds),
        logits=logits,
        head=head,
        copies=laid_out_anew(s),
        beside_head=made_before_backward(s, 0.0 if ahead else layers, gradients),
        update=max((shape.temporary for shape in s.of_muon), default=0.0),
        ahead=ahead,
    )
