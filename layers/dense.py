"""The parts that all layers are made of: gains, weights, norms, linear layers, dropout, SwiGLU.

FeedForward is the record of a kind of feed-forward; `model.FEED_FORWARD` lists the kinds.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import FP8, HIDDEN, ModelConfig, indivisible
from layers import float8
from layers.float8 import Quantized
from parallel import (
    BATCH,
    FSDP,
    SEQUENCE,
    TP,
    Array,
    Deferred,
    P,
    Param,
    Tree,
    all_gather,
    normal,
    ones,
    own_positions,
    reduce_scatter,
    unshard,
)

NEVER = 'never'  # `Param.kept_by` of a weight whose product no backward pass needs


class FeedForward(NamedTuple):
    """One kind of feed-forward.

    params(cfg) declares its parameters. forward(params, x_BtD, cfg) returns what is added to the
    residual stream, and statistics: none, or those of `moe.route` where it is `routed`. width(m) is
    the hidden size, for a ModelConfig or the config's own group of fields. rules(config) yields
    what cannot run.

    A `routed` forward takes one more argument where rows are padded: bool [B, T/tp], the positions
    that hold a token. The others count for nothing, neither in what is added to them.
    """

    params: Callable[[ModelConfig], Tree]
    forward: Callable[..., tuple[Array, dict[str, Array]]]
    routed: bool
    width: Callable[[Any], int]
    rules: Callable[[ConfigDict], Iterator[str]]


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


def gain(size: int) -> Param:
    """Declares the gain of a norm."""
    return Param((size,), P(None), ones, matrix=False)


def weight(
    shape: tuple[int, ...], spec: P, std: float, kept_by: str = '', inputs: int = 1
) -> Param:
    """Declares the weight of a `linear`, whose input takes the first `inputs` dimensions."""
    sides = {'inputs': inputs, 'outputs': len(shape) - inputs}
    return Param(shape, spec, normal(std), linear=True, kept_by=kept_by, **sides)


# ---------------------------------------------------------------------------------------------
# Norms, linear layers, dropout
# ---------------------------------------------------------------------------------------------


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """Computes x / rms(x) · gain over the last dimension, in float32 (Zhang & Sennrich 2019).

    Saves its input and a number per row; autodiff would save three arrays of the input's size.
    """
    return _rms_norm_forward(x, gain, eps)[0]


def _rms_norm_forward(x: Array, gain: Array, eps: float):
    x32 = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * gain).astype(x.dtype), (x, scale, gain)


def _rms_norm_backward(eps: float, saved: tuple, dy: Array):
    x, scale, gain = saved
    normed, dy = x.astype(jnp.float32) * scale, dy.astype(jnp.float32)
    d_normed = dy * gain
    dx = scale * (d_normed - normed * jnp.mean(d_normed * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(dy * normed, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@jax.custom_vjp
def _matmul(x_BTI: Array, w: Array) -> Array:
    """Computes x w, with a weight gradient that transposes the narrower operand.

    XLA:CPU would copy the wide one, a third of a SwiGLU's time. The weight comes in its own shape,
    so that backward refers to the array that was gathered, which no policy of rematerialization
    saves.
    """
    return jnp.einsum('bti,io->bto', x_BTI, w.reshape(x_BTI.shape[-1], -1))


def _matmul_forward(x_BTI: Array, w: Array):
    return _matmul(x_BTI, w), (x_BTI, w)


def _matmul_backward(saved: tuple[Array, Array], d_BTO: Array):
    x_BTI, w = saved
    w_IO = w.reshape(x_BTI.shape[-1], -1)
    rows = (((0, 1), (0, 1)), ((), ()))
    if w_IO.shape[0] <= w_IO.shape[1]:
        dw_IO = lax.dot_general(x_BTI, d_BTO, rows)
    else:
        dw_IO = lax.dot_general(d_BTO, x_BTI, rows).T
    return jnp.einsum('bto,io->bti', d_BTO, w_IO), dw_IO.reshape(w.shape)


_matmul.defvjp(_matmul_forward, _matmul_backward)


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@jax.custom_vjp
def _deferred_matmul(x_BTI: Array, w: Array | Quantized, sink: tuple[Array, Array]) -> Array:
    """Computes x w; backward leaves the weight gradient's operands in the sink (`Deferred`)."""
    return linear(x_BTI, w)


def _deferred_backward(saved: tuple[Array, Array | Quantized], d_BTO: Array):
    x_BTI, w = saved
    if isinstance(w, Quantized):
        dx_BTI = float8.input_gradient(d_BTO, w)
    else:
        dx_BTI = jnp.einsum('bto,io->bti', d_BTO, w.reshape(x_BTI.shape[-1], -1))
    return dx_BTI, None, (x_BTI, d_BTO)


_deferred_matmul.defvjp(lambda x, w, _: (linear(x, w), (x, w)), _deferred_backward)


def weights(params: Tree, declared: Tree, dtype: jnp.dtype, cfg: ModelConfig) -> Tree:
    """Returns one layer's weights as `linear` takes them: `unshard`, with matmul_type='fp8' each
    matrix as a `Quantized`."""
    quantize = float8.quantize if cfg.matmul_type == FP8 else None
    return unshard(params, declared, dtype, cfg.fsdp_reduce, quantize)


def linear(x_BTI: Array, w: Array | Quantized | Deferred) -> Array:
    """Computes x w: [B, T, I] -> [B, T, O]. A weight of more dimensions counts as [I, O]."""
    if not isinstance(w, Deferred):
        return float8.matmul(x_BTI, w) if isinstance(w, Quantized) else _matmul(x_BTI, w)
    if w.sink is not None:
        return _deferred_matmul(x_BTI, w.array, w.sink)
    out_BTO = linear(x_BTI, w.array)
    w.seen.sink = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x_BTI, out_BTO))
    return out_BTO


def linear_weight_gradient(
    p: Param, shard: Array, x_BTI: Array, d_BTO: Array, cfg: ModelConfig
) -> Array:
    """Computes the gradient of a weight from the input and the output gradient of its `linear`.

    Ends with the sum over fsdp that is the transpose of `unshard`, which takes `reduce` too, so it
    is shaped like the shard.
    """

    def f(shard: Array) -> Array:
        return linear(x_BTI, weights({'w': shard}, {'w': p}, x_BTI.dtype, cfg)['w'])

    return jax.vjp(f, shard)[1](d_BTO)[0]


def dropout(x_BtD: Array, rate: float, key: Array) -> Array:
    """Drops numbers at the rate and scales up the rest (inverted dropout).

    Every token draws from a key of its own row and position in the global microbatch, so the mask
    is the same on every mesh; this costs one hash per token.
    """
    if rate == 0.0:
        return x_BtD
    B, t, D = x_BtD.shape
    rows_B = lax.axis_index(BATCH) * B + jnp.arange(B)
    positions_t = own_positions(jnp.arange(t * lax.axis_size(SEQUENCE)), 0)

    def keep(row: Array, position: Array) -> Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.bernoulli(token_key, 1.0 - rate, (D,))

    of_row = jax.vmap(keep, in_axes=(None, 0))
    keep_BtD = jax.vmap(of_row, in_axes=(0, None))(rows_B, positions_t)
    return jnp.where(keep_BtD, x_BtD / (1.0 - rate), 0).astype(x_BtD.dtype)


# ---------------------------------------------------------------------------------------------
# SwiGLU
# ---------------------------------------------------------------------------------------------


def activation(x: Array, limit: float) -> Array:
    """Computes the activation of every feed-forward, dense or of experts, elementwise.

    silu; with a limit above 0 that of gpt-oss, min(x, limit) · σ(1.702 · min(x, limit)). To change
    it, edit this function: its derivative follows.
    """
    if not limit:
        return jax.nn.silu(x)
    x = clipped(x, -jnp.inf, limit)
    return x * jax.nn.sigmoid(1.702 * x)


def factor(x: Array, limit: float) -> Array:
    """Computes what the activation is multiplied by: x, or with a limit above 0 that of gpt-oss,
    x clipped to ±limit, plus 1."""
    return clipped(x, -limit, limit) + 1 if limit else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def clipped(x: Array, low: float, high: float) -> Array:
    """Clips x, with the slope 1 at the limits too, as PyTorch has it; jnp.clip has a half.

    By numbers alone: jnp.where would make arrays of the limits, which a scan over layers makes
    once, before it, and keeps.
    """
    return jnp.minimum(jnp.maximum(x, low), high)


@clipped.defjvp
def _clipped_jvp(low: float, high: float, x: tuple[Array], dx: tuple[Array]):
    (x,), (dx,) = x, dx
    return clipped(x, low, high), dx * ((x >= low) & (x <= high))


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: Array, up: Array, limit: float) -> Array:
    """Computes activation(gate) · factor(up), both with model.swiglu_limit. Saves its inputs;
    autodiff would save three further arrays."""
    return activation(gate, limit) * factor(up, limit)


def _gated_backward(limit: float, saved: tuple[Array, Array], d_out: Array):
    gate, up = saved
    active, slope = jax.jvp(lambda x: activation(x, limit), (gate,), (jnp.ones_like(gate),))
    other, other_slope = jax.jvp(lambda x: factor(x, limit), (up,), (jnp.ones_like(up),))
    return d_out * other * slope, d_out * active * other_slope


gated.defvjp(lambda gate, up, limit: (gated(gate, up, limit), (gate, up)), _gated_backward)


def swiglu_params(cfg: ModelConfig, d_ff: int) -> Tree:
    """Declares the three matrices of a SwiGLU of this hidden size."""
    D, F = cfg.d_model, d_ff
    return {
        'w_gate': weight((D, F), P(FSDP, TP), D**-0.5, HIDDEN),
        'w_up': weight((D, F), P(FSDP, TP), D**-0.5, HIDDEN),
        'w_down': weight((F, D), P(TP, FSDP), (2 * cfg.n_layers * F) ** -0.5, NEVER),
    }


def swiglu_shards(w: Tree, x_BTD: Array, limit: float, weight_BT1: Array | None = None) -> Array:
    """Computes (activation(x W_gate) · x W_up) W_down (SwiGLU, Shazeer 2020) for this device's
    slice of F.

    The results, [B, T, D], add up over tp. A weight of each token multiplies what W_down takes, not
    what it gives: so backward needs that product no more than without.
    """
    gate_BTf, up_BTf = linear(x_BTD, w['w_gate']), linear(x_BTD, w['w_up'])
    gate_BTf, up_BTf = checkpoint_name((gate_BTf, up_BTf), HIDDEN)
    h_BTf = gated(gate_BTf, up_BTf, limit)
    if weight_BT1 is not None:
        h_BTf = (h_BTf * weight_BT1).astype(h_BTf.dtype)
    return linear(h_BTf, w['w_down'])


def dense_params(cfg: ModelConfig) -> Tree:
    """Declares the parameters of the dense `swiglu`."""
    return swiglu_params(cfg, cfg.d_ff)


def swiglu(params: Tree, x_BtD: Array, cfg: ModelConfig) -> tuple[Array, dict[str, Array]]:
    """Runs the dense feed-forward: [B, T/tp, D] -> the same, and no statistics."""
    w = weights(params, dense_params(cfg), x_BtD.dtype, cfg)
    x_BTD = all_gather(x_BtD, TP, 1)
    return reduce_scatter(swiglu_shards(w, x_BTD, cfg.swiglu_limit), TP, 1), {}


def dense_width(m: ModelConfig | ConfigDict) -> int:
    """Returns the hidden size."""
    return m.d_ff


def dense_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes that do not go together, or that the mesh does not divide."""
    yield from indivisible(config, TP, ['model.d_ff'])


DENSE = FeedForward(dense_params, swiglu, False, dense_width, dense_rules)
