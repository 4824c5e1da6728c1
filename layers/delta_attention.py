"""Linear attention by the gated delta rule: Gated DeltaNet (gdn) and Kimi Delta Attention (kda).

A layer of them keeps a state of fixed size where attention keeps the keys of all positions. Between
its input and the state stand projections, short convolutions over the last positions, and gates;
delta_rule.py is the state itself. All of it is computed for a block of positions at a time
(model.attention_block), and again in the backward pass: what a layer holds for it are its input,
and the state before each block.

    gdn   one decay a head (Yang et al. 2024, arXiv:2412.06464; Qwen3-Next)
    kda   one a channel of keys, by a matrix of low rank (Kimi Linear 2025, arXiv:2510.26692)
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT, ModelConfig, divisors, indivisible
from layers.delta_rule import chunk_size, delta_rule, delta_step, flops
from layers.dense import gain, linear, rms_norm, weight
from layers.kinds import (
    Attention,
    Cache,
    Sizes,
    from_heads,
    output_weight,
    rows_last,
    to_heads,
)
from layers.rope import Positions
from parallel import (
    CP,
    FSDP,
    TP,
    Array,
    P,
    Param,
    Tree,
    all_gather,
    gather_zigzag,
    normal,
    reduce_scatter,
    unshard,
    zigzag,
)

NORM_EPS = 1e-6  # of the lengths of queries and keys
FASTEST = 16.0  # decays start between 1 and this, per unit of the step ...
STEPS = (1e-3, 1e-1)  # ... and steps between these, as in Mamba
CONVOLVED = ('q', 'k', 'v')

# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


def log_uniform_decay(key: Array, shape: tuple[int, ...]) -> Array:
    """Draws log A, A being uniform from 1 to FASTEST."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, FASTEST))


def step_bias(key: Array, shape: tuple[int, ...]) -> Array:
    """Draws biases whose softplus is log-uniform within STEPS."""
    low, high = (math.log(step) for step in STEPS)
    step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def streamed(shape: tuple[int, ...], spec: P, inputs: int = 1) -> Param:
    """Declares a weight that `stream` uses block by block, which is more than a `Deferred` can say;
    backward makes its product again, once more unless remat keeps the layer's output."""
    std = math.prod(shape[:inputs]) ** -0.5
    return dataclasses.replace(weight(shape, spec, std, ATTENTION_OUTPUT, inputs), linear=False)


def convolution(shape: tuple[int, ...]) -> Param:
    """Declares a short convolution of each channel, [width, heads, head size]: the last number
    weighs the position itself."""
    return Param(shape, P(None, TP, None), normal(shape[0] ** -0.5), kept_by=ATTENTION_OUTPUT)


def delta_params(cfg: ModelConfig) -> Tree:
    """Declares the parameters of `delta`."""
    D, W, K, N = cfg.d_model, cfg.delta_conv, delta_key_heads(cfg), cfg.delta_heads
    Hk, Hv = cfg.delta_key_dim, cfg.delta_value_dim
    heads = P(FSDP, TP, None)
    params = {
        'w_q': streamed((D, K, Hk), heads),
        'w_k': streamed((D, K, Hk), heads),
        'w_v': streamed((D, N, Hv), heads),
        'w_beta': streamed((D, N), P(FSDP, TP)),
        'conv_q': convolution((W, K, Hk)),
        'conv_k': convolution((W, K, Hk)),
        'conv_v': convolution((W, N, Hv)),
        'log_decay': Param((N,), P(TP), log_uniform_decay, matrix=False),
        'out_norm': gain(Hv),
        'w_o': dataclasses.replace(
            output_weight(cfg, Hv, N), linear=False, kept_by=ATTENTION_OUTPUT
        ),
    }
    if cfg.attention == 'gdn':
        return params | {
            'w_step': streamed((D, N), P(FSDP, TP)),
            'step_bias': Param((N,), P(TP), step_bias, matrix=False),
            'w_gate': streamed((D, N, Hv), heads),
        }
    return params | {
        'w_step_down': streamed((D, Hv), P(FSDP, None)),
        'w_step_up': streamed((Hv, N, Hk), heads),
        'step_bias': Param((N, Hk), P(TP, None), step_bias, matrix=False),
        'w_gate_down': streamed((D, Hv), P(FSDP, None)),
        'w_gate_up': streamed((Hv, N, Hv), heads),
    }


def state_params(cfg: ModelConfig) -> Tree:
    """Declares the parameters that what a layer does to a state depends on."""
    of_outputs = ('w_q', 'conv_q', 'w_gate', 'w_gate_down', 'w_gate_up', 'out_norm', 'w_o')
    return {name: p for name, p in delta_params(cfg).items() if name not in of_outputs}


def delta_key_heads(m: ModelConfig | ConfigDict) -> int:
    """Returns the heads of queries and keys."""
    return m.delta_key_heads or m.delta_heads


def delta_sizes(cfg: ModelConfig) -> Sizes:
    """Returns the numbers of `delta`, whose state stands for all positions."""
    N, Hk, Hv = cfg.delta_heads, cfg.delta_key_dim, cfg.delta_value_dim
    each = functools.partial(flops, chunk_size(cfg.attention_block), Hk, Hv, cfg.attention == 'kda')
    return Sizes(
        key=Hk,
        value=Hv,
        rotary=0,
        kv_heads=0,
        cache=0,
        gathered=cfg.d_model,
        latents=0,
        inputs=(cfg.d_model,),
        state=N * Hk * Hv,
        work=N * each(),
        work_before=N * each(outputs=False),
    )


def delta_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes that do not go together, or that the mesh does not divide."""
    m = config.model
    fields = ['delta_heads', *(['delta_key_heads'] if m.delta_key_heads else [])]
    yield from indivisible(config, TP, [f'model.{name}' for name in fields])
    if m.attention == 'kda':
        yield from indivisible(config, FSDP, ['model.delta_value_dim'])
    if m.delta_heads % delta_key_heads(m):
        yield (
            f'model.delta_heads={m.delta_heads} is not divisible by model.delta_key_heads='
            f'{m.delta_key_heads}; use {divisors(m.delta_heads)} heads of keys, or 0 for as many'
        )


# ---------------------------------------------------------------------------------------------
# From the input to the state, and from the state to the output
# ---------------------------------------------------------------------------------------------


def convolved(h_BnTH: Array, w_WnH: Array, since_BT: Array) -> Array:
    """Computes silu of a causal convolution of each channel, within documents: float32 [B, n, T,
    H].

    h_BnTH: [B, n, W - 1 + T, H], with the positions before those of since_BT in front.
    """
    W, T = w_WnH.shape[0], since_BT.shape[1]
    h_BnTH, w_WnH = h_BnTH.astype(jnp.float32), w_WnH.astype(jnp.float32)
    out = 0.0
    for back in range(W):
        first = W - 1 - back
        part = h_BnTH[:, :, first : first + T] * w_WnH[first, :, None]
        out += jnp.where((since_BT >= back)[:, None, :, None], part, 0)
    return jax.nn.silu(out)


def unit(x: Array) -> Array:
    """Scales vectors of the last dimension to length 1."""
    return x * lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + NORM_EPS)


def rule_inputs(
    w: Tree, h: dict[str, Array], x_BTD: Array, since_BT: Array, cfg: ModelConfig
) -> tuple[Array | None, ...]:
    """Makes what `delta_rule` takes, of projections with the positions before them, and of x_BTD:
    queries if there are any, keys, values, g and β."""
    parts = {name: convolved(x, w[f'conv_{name}'], since_BT) for name, x in h.items()}
    v = parts.pop('v')
    groups = v.shape[1] // parts['k'].shape[1]  # each head of keys serves so many neighbours
    of_keys = {name: jnp.repeat(unit(x), groups, axis=1) for name, x in parts.items()}
    q, k = of_keys.get('q'), of_keys['k']
    q = None if q is None else q * q.shape[-1] ** -0.5
    if cfg.attention == 'gdn':
        step = linear(x_BTD, w['w_step']).astype(jnp.float32) + w['step_bias']
        step = step.swapaxes(1, 2)[..., None]  # [B, n, T, 1]
    else:
        step = to_heads(linear(x_BTD, w['w_step_down']), w['w_step_up']).astype(jnp.float32)
        step += w['step_bias'][:, None]
    g = -jnp.exp(w['log_decay'])[:, None, None] * jax.nn.softplus(step)
    g = jnp.where((since_BT >= 0)[:, None, :, None], g, 0)
    beta = jax.nn.sigmoid(linear(x_BTD, w['w_beta']).astype(jnp.float32)).swapaxes(1, 2)
    return q, k, v, g, beta


def gated_norm(w: Tree, out_BnTH: Array, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Norms each head's output, and scales it by a gate: [B, n, T, value size] in the compute
    type."""
    normed = rms_norm(out_BnTH, w['out_norm'], cfg.norm_eps)
    if cfg.attention == 'gdn':
        gate = jax.nn.silu(to_heads(x_BTD, w['w_gate']).astype(jnp.float32))
    else:
        gate = to_heads(linear(x_BTD, w['w_gate_down']), w['w_gate_up'])
        gate = jax.nn.sigmoid(gate.astype(jnp.float32))
    return (normed * gate).astype(x_BTD.dtype)


# ---------------------------------------------------------------------------------------------
# Block by block
# ---------------------------------------------------------------------------------------------

# The state, float32 [B, n, key size, value size], and the inputs of the last W - 1 positions.
Carry = tuple[Array, Array]


def block(
    w: Tree, carry: Carry, x_BTD: Array, since_BT: Array, cfg: ModelConfig, outputs: bool
) -> tuple[Carry, Array | None]:
    """Computes the positions of a block: the carry after it, and partial sums over tp of the
    layer's output, [B, T, D]."""
    state, before_BWD = carry
    all_BTD = jnp.concatenate((before_BWD, x_BTD), axis=1)
    names = CONVOLVED if outputs else CONVOLVED[1:]
    h = {name: to_heads(all_BTD, w[f'w_{name}']) for name in names}
    inputs = rule_inputs(w, h, x_BTD, since_BT, cfg)
    state, out = delta_rule(*inputs, since_BT, state, x_BTD.dtype)
    if outputs:
        out = from_heads(gated_norm(w, out, x_BTD, cfg), w['w_o'])
    return (state, all_BTD[:, x_BTD.shape[1] :]), out


def _blocks(x_BT: Array, size: int) -> Array:
    """Cuts positions into blocks: [B, T, ...] -> [T / size, B, size, ...]."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, size, *x_BT.shape[2:]), 1, 0)


def _joined(x: Array) -> Array:
    """Undoes `_blocks`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def stream(
    w: Tree, carry: Carry, x_BTD: Array, since_BT: Array, cfg: ModelConfig, outputs: bool
) -> tuple[Carry, Array | None]:
    """Computes all positions, `model.attention_block` at a time, as `block` does one.

    since_BT, int32, counts positions since the start of the document; -1 where there is none, which
    leaves the state as it is. Saves its inputs and the carry before each block; backward computes
    the blocks again from the last to the first, and adds gradients of weights up in float32.
    """
    return _stream_forward(w, carry, x_BTD, since_BT, cfg, outputs)[0]


def _stream_forward(w: Tree, carry: Carry, x_BTD: Array, since_BT: Array, cfg, outputs: bool):
    def step(carry: Carry, xs: tuple):
        after, out = block(w, carry, *xs, cfg, outputs)
        return after, (carry, out)

    size = min(cfg.attention_block, x_BTD.shape[1])
    after, (carries, out) = lax.scan(
        step, carry, tuple(_blocks(x, size) for x in (x_BTD, since_BT))
    )
    carries = checkpoint_name(carries, ATTENTION_OUTPUT)
    return (after, _joined(out) if outputs else None), (w, carries, x_BTD, since_BT)


def _stream_backward(cfg: ModelConfig, outputs: bool, saved: tuple, d_results: tuple):
    w, carries, x_BTD, since_BT = saved
    d_after, d_out = d_results
    size = min(cfg.attention_block, x_BTD.shape[1])

    def step(grads: tuple, xs: tuple):
        d_w, d_carry = grads
        carry, x_BsD, since_Bs, d_out = xs
        _, pull = jax.vjp(lambda *args: block(*args, since_Bs, cfg, outputs), w, carry, x_BsD)
        d_here, d_carry, d_x = pull((d_carry, d_out))
        return (jax.tree.map(jnp.add, d_w, d_here), d_carry), d_x

    d_w = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), w)
    d_out = _blocks(d_out, size) if outputs else None
    xs = (carries, _blocks(x_BTD, size), _blocks(since_BT, size), d_out)
    (d_w, d_carry), d_x = lax.scan(step, (d_w, d_after), xs, reverse=True)
    d_w = jax.tree.map(lambda d, x: d.astype(x.dtype), d_w, w)
    return d_w, d_carry, _joined(d_x), None


stream.defvjp(_stream_forward, _stream_backward)


# ---------------------------------------------------------------------------------------------
# Where cp cuts the sequence
# ---------------------------------------------------------------------------------------------


def before_parts(x_PBTD: Array, n: int) -> Array:
    """Returns the n positions before each of this device's two parts, zeros before the sequence:
    [2, B, T, D] -> [2, B, n, D].

    Moves the last n positions of each part, or all if they are fewer. Forward: all-gather over cp.
    Backward: reduce-scatter of the cotangents, as many bytes.
    """
    if not n:  # convolutions of one position
        return x_PBTD[:, :, :0]
    T = x_PBTD.shape[2]
    ends = gather_zigzag(x_PBTD[:, :, max(T - n, 0) :], CP, 0)
    parts = -(-n // T)  # that n positions reach over
    padded = jnp.pad(ends, ((parts, 0), (0, 0), (0, 0), (0, 0)))
    before = [padded[i : i + len(ends)] for i in range(parts)]
    both = jnp.concatenate([*before, ends[:, :, :0]], axis=2)
    return zigzag(both[:, :, both.shape[2] - n :], CP, 0)


def states_before(w: Tree, before_BWD: Array, x_BTD: Array, since_BT: Array, cfg) -> Array:
    """Returns the state before each of this device's two parts, which lie along the rows: [2·B, n,
    key size, value size].

    A part turns a state S into M S + b. Each device computes M and b of its parts at once, as the
    state that comes of (0, I); they are gathered over cp, 4 · key · (key + value size) bytes a
    head, row and part, and each device goes through all parts. No position travels.
    """
    w = {name: w[name] for name in state_params(cfg)}
    n, Hk, Hv = w['w_v'].shape[1], cfg.delta_key_dim, cfg.delta_value_dim
    rows = x_BTD.shape[0]
    start = jnp.zeros_like(x_BTD, jnp.float32, (rows, n, Hk, Hv + Hk))
    start += jnp.eye(Hk, Hv + Hk, Hv)
    (changes, _), _ = stream(w, (start, before_BWD), x_BTD, since_BT, cfg, False)
    parts = gather_zigzag(changes.reshape(2, rows // 2, *changes.shape[1:]), CP, 0)

    def step(state: Array, part: Array) -> tuple[Array, Array]:
        offset, change = part[..., :Hv], part[..., Hv:]
        after = jnp.einsum('bnhi,bniv->bnhv', change, state, precision='highest') + offset
        return after, state

    first = jnp.zeros_like(parts[0, ..., :Hv])
    _, before = lax.scan(step, first, parts)
    return zigzag(before, CP, 0).reshape(rows, n, Hk, Hv)


# ---------------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------------


def since_start(table: Positions, rows: int, T: int) -> Array:
    """Counts the positions since each one's document began, of this device's T: int32 [B, T]; -1
    beyond the lengths of rows."""
    S = T * lax.axis_size(CP)
    since_BS = jnp.broadcast_to(jnp.arange(S), (rows, S))
    if table.documents is not None:
        new = jnp.diff(table.documents, axis=1) != 0
        starts_BS = jnp.pad(new, ((0, 0), (1, 0))) * since_BS
        since_BS = since_BS - lax.cummax(starts_BS, axis=1)
    if table.lengths is not None:
        since_BS = jnp.where(jnp.arange(S) < table.lengths[:, None], since_BS, -1)
    return zigzag(since_BS, CP, 1)


def delta(params: Tree, x_BtD: Array, table: Positions, cfg: ModelConfig) -> tuple[Array, Tree]:
    """Runs linear attention by the gated delta rule. x_BtD: [B, T/tp, D] -> the same; and where cp
    does not cut sequences, what decoding keeps: states [B, N/tp, key size, value size] float32, and
    the projections before the convolutions of the last W - 1 positions, [B, heads/tp, W - 1, H].

    tp shards heads. Where cp cuts, each device first computes what its parts do to a state
    (`states_before`): twice the forward pass.
    """
    w = unshard(params, delta_params(cfg), x_BtD.dtype, cfg.fsdp_reduce)
    x_BTD = all_gather(x_BtD, TP, 1)
    (B, T, D), W = x_BTD.shape, cfg.delta_conv
    since_BT = since_start(table, B, T)
    cut = lax.axis_size(CP) > 1
    parts = 2 if cut else 1

    def rows_of_parts(x_BT: Array) -> Array:
        """Lays the parts of the sequence along rows: [B, T, ...] -> [parts·B, T/parts, ...]."""
        return _blocks(x_BT, T // parts).reshape(parts * B, T // parts, *x_BT.shape[2:])

    x_PTD, since_PT = rows_of_parts(x_BTD), rows_of_parts(since_BT)
    n, Hk, Hv = w['w_v'].shape[1], cfg.delta_key_dim, cfg.delta_value_dim
    if cut:
        before_PWD = before_parts(x_PTD.reshape(2, B, T // 2, D), W - 1)
        before_PWD = before_PWD.reshape(2 * B, W - 1, D)
        state = states_before(w, before_PWD, x_PTD, since_PT, cfg)
    else:
        before_PWD = jnp.zeros_like(x_BTD, shape=(B, W - 1, D))
        state = jnp.zeros_like(x_BTD, jnp.float32, (B, n, Hk, Hv))
    (state, _), out = stream(w, (state, before_PWD), x_PTD, since_PT, cfg, True)
    out_BTD = _joined(out.reshape(parts, B, T // parts, D))
    out_BtD = checkpoint_name(reduce_scatter(out_BTD, TP, 1), ATTENTION_OUTPUT)
    return out_BtD, {} if cut else {'state': state, **_tails(w, x_BTD, table, W - 1)}


def last_positions(x_BTD: Array, n: int) -> Array:
    """Returns the last n positions, zeros where there are fewer."""
    missing = max(n - x_BTD.shape[1], 0)
    return jnp.pad(x_BTD, ((0, 0), (missing, 0), (0, 0)))[:, x_BTD.shape[1] + missing - n :]


def _tails(w: Tree, x_BTD: Array, table: Positions, n: int) -> Tree:
    """Makes the projections that the convolutions of the next positions read, of rows' last n."""
    if table.lengths is None:
        x_BWD = last_positions(x_BTD, n)
    else:
        index_BW = jnp.maximum(table.lengths[:, None] - n + jnp.arange(n), 0)
        x_BWD = jnp.take_along_axis(x_BTD, index_BW[..., None], axis=1)
    return {name: to_heads(x_BWD, w[f'w_{name}']) for name in CONVOLVED}


def delta_decode(
    params: Tree, x_1tD: Array, table: Positions, cache: Tree, since_B: Array, cfg: ModelConfig
) -> tuple[Array, Tree]:
    """Computes `delta` of one more position of each row, in the layout of `Attention.decode`: as
    long for any position."""
    w = unshard(params, delta_params(cfg), x_1tD.dtype)
    x_1TD = all_gather(x_1tD, TP, 1)
    rows, filled = since_B.shape[0], x_1TD.shape[1]
    x_B1D, since_B1 = x_1TD[0, :rows, None], since_B[:, None]
    h = {
        name: jnp.concatenate((cache[name], to_heads(x_B1D, w[f'w_{name}'])), axis=2)
        for name in CONVOLVED
    }
    inputs = (x[:, :, 0] for x in rule_inputs(w, h, x_B1D, since_B1, cfg))
    state, out_BnH = delta_step(*inputs, since_B, cache['state'])
    out_BnH = gated_norm(w, out_BnH[:, :, None], x_B1D, cfg)[:, :, 0]
    out_1tD = reduce_scatter(from_heads(rows_last(out_BnH, filled), w['w_o']), TP, 1)
    return out_1tD, {'state': state, **{name: x[:, :, 1:] for name, x in h.items()}}


def _keep(kept: Tree, lengths_B: Array, context: int, cfg: ModelConfig) -> Tree:
    return kept


def _since(positions_B: Array, starts_B: Array, cache: Tree, cfg: ModelConfig) -> Array:
    return positions_B - starts_B


def _replace(cache: Array, new: Array, positions_B: Array) -> Array:
    return new


# States and the projections of a few positions, which a new position replaces: of fixed size.
STATES = Cache(_keep, _since, _replace)
GDN = KDA = Attention(delta_params, delta, delta_decode, delta_sizes, delta_rules, STATES)
