"""What every part of the model is made of: its sizes, norms, linear layers, SwiGLU.

Dimensions, as suffixes of array names and in einsums. Inside shard_map they are one device's:
    B batch    T position (query)    S position (key)    D model    V vocabulary
    N query heads    K key/value heads    G query heads a key/value head (N = K·G)    H head size
    R latent rank    F feed-forward    L layers    M microbatches
The residual stream is sharded over positions: x_BTD is [B, T/tp, D].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from config import HIDDEN, ModelConfig
from parallel import (
    BATCH,
    FSDP,
    TP,
    Array,
    Deferred,
    P,
    Param,
    Tree,
    all_gather,
    normal,
    ones,
    reduce_scatter,
    unshard,
)


def gain(size: int) -> Param:
    return Param((size,), P(None), ones, matrix=False)


def weight(shape: tuple[int, ...], spec: P, std: float) -> Param:
    """The weight of a `linear`."""
    return Param(shape, spec, normal(std), linear=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / rms(x) · gain over the last dimension, in float32 (Zhang & Sennrich 2019).

    Saves its input and a number a row; autodiff would save three arrays of the input's size.
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


@jax.custom_vjp
def _matmul(x_BTI: Array, w: Array) -> Array:
    """x w. Its weight gradient is written so that the narrower operand is the one transposed:
    XLA:CPU would else copy the wide one, a third of a SwiGLU's time. The weight comes in its own
    shape, so that what it leaves to backward is what was gathered, which no policy of
    rematerialization saves."""
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


@jax.custom_vjp
def _deferred_matmul(x_BTI: Array, w_IO: Array, sink: tuple[Array, Array]) -> Array:
    """x w, where backward leaves what the weight gradient takes in the sink (see `Deferred`)."""
    return _matmul(x_BTI, w_IO)


def _deferred_backward(saved: tuple[Array, Array], d_BTO: Array):
    x_BTI, w_IO = saved
    return jnp.einsum('bto,io->bti', d_BTO, w_IO), None, (x_BTI, d_BTO)


_deferred_matmul.defvjp(lambda x, w, _: (_matmul(x, w), (x, w)), _deferred_backward)


def linear(x_BTI: Array, w: Array | Deferred) -> Array:
    """x w: [B, T, I] -> [B, T, O]. A weight of more dimensions counts as [I, O]."""
    if not isinstance(w, Deferred):
        return _matmul(x_BTI, w)
    w_IO = w.array.reshape(x_BTI.shape[-1], -1)
    if w.sink is not None:
        return _deferred_matmul(x_BTI, w_IO, w.sink)
    out_BTO = _matmul(x_BTI, w_IO)
    w.seen.sink = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x_BTI, out_BTO))
    return out_BTO


def linear_weight_gradient(p: Param, shard: Array, x_BTI: Array, d_BTO: Array) -> Array:
    """The gradient of a layer's weight from the input and output gradient of its `linear`, with
    the reduce-scatter over fsdp that is the transpose of `unshard`; shaped like the shard."""

    def f(shard: Array) -> Array:
        return linear(x_BTI, unshard({'w': shard}, {'w': p}, x_BTI.dtype)['w'])

    return jax.vjp(f, shard)[1](d_BTO)[0]


def dropout(x_BTD: Array, rate: float, key: Array) -> Array:
    """Inverted dropout. Every token draws from a key of its own row and position in the global
    microbatch, so that the mask is the same on every mesh; this costs a hash a token more."""
    if rate == 0.0:
        return x_BTD
    B, T, D = x_BTD.shape
    rows_B = lax.axis_index(BATCH) * B + jnp.arange(B)
    positions_T = lax.axis_index(TP) * T + jnp.arange(T)

    def keep(row: Array, position: Array) -> Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, row), position)
        return jax.random.bernoulli(token_key, 1.0 - rate, (D,))

    keep_BTD = jax.vmap(lambda row: jax.vmap(lambda t: keep(row, t))(positions_T))(rows_B)
    return jnp.where(keep_BTD, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


@jax.custom_vjp
def gated(gate: Array, up: Array) -> Array:
    """silu(gate) · up. Saves its inputs only; autodiff would save three more arrays like them."""
    return jax.nn.silu(gate) * up


def _gated_backward(saved: tuple[Array, Array], d_out: Array):
    gate, up = saved
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    return d_out * up * (sigmoid + silu * (1 - sigmoid)), d_out * silu


gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _gated_backward)


def swiglu_params(cfg: ModelConfig, d_ff: int) -> Tree:
    D, F = cfg.d_model, d_ff
    return {
        'w_gate': weight((D, F), P(FSDP, TP), D**-0.5),
        'w_up': weight((D, F), P(FSDP, TP), D**-0.5),
        'w_down': weight((F, D), P(TP, FSDP), (2 * cfg.n_layers * F) ** -0.5),
    }


def swiglu_shards(w: Tree, x_BTD: Array) -> Array:
    """(silu(x W_gate) · x W_up) W_down (Shazeer 2020) by this device's slice of F: summed over tp,
    [B, T, D] is the result."""
    gate_BTF, up_BTF = linear(x_BTD, w['w_gate']), linear(x_BTD, w['w_up'])
    gate_BTF, up_BTF = checkpoint_name((gate_BTF, up_BTF), HIDDEN)
    return linear(gated(gate_BTF, up_BTF), w['w_down'])


def swiglu(params: Tree, x_BTD: Array, cfg: ModelConfig) -> tuple[Array, dict[str, Array]]:
    """The dense feed-forward. x_BTD: [B, T/tp, D] -> the same, and no statistics."""
    w = unshard(params, swiglu_params(cfg, cfg.d_ff), x_BTD.dtype)
    x_BTD = all_gather(x_BTD, TP, 1)  # B T/tp D -> B T D
    return reduce_scatter(swiglu_shards(w, x_BTD), TP, 1), {}
