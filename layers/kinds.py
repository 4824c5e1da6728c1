"""The record of a kind of attention, and what kinds share: projections to heads and back, and the
layout of decoding. attention.py has the table of kinds.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from config import RESIDUAL, ModelConfig
from layers.dense import linear, weight
from layers.mask import cache_size, cached_positions, cached_visible
from parallel import FSDP, TP, Array, Deferred, P, Param, Tree


class Sizes(NamedTuple):
    """Numbers per position of the attention of one layer, over all tp devices together.

    key: the head size of queries and keys, `rotary` of it with a rotation; value: that of values.
    kv_heads: heads of keys and values that the forward pass makes.
    cache: numbers that decoding keeps.
    gathered: numbers that travel over tp on the way in.
    latents: numbers made from a device's own positions before they are gathered.
    inputs: sizes of the arrays of all positions that the projections to heads read.
    travels: numbers that travel over cp, from which keys and values are made; tp cuts them where
        `travels_cut`, else each tp device sends all. 0 if a sequence cannot be cut.
    expansion: weights that make keys and values of them, over all tp devices.
    state: numbers, in float32, of what a layer keeps of a whole sequence in place of keys; 0 if it
        compares keys. What travels over cp is then a state of each part, and how it changes one.
    work: FLOPs of a token's forward pass beside its weights, where they do not grow with T;
        work_before: of the pass that says what parts of a sequence do to a state, where cp cuts.
    """

    key: int
    value: int
    rotary: int
    kv_heads: int
    cache: int
    gathered: int
    latents: int
    inputs: tuple[int, ...]
    travels: int = 0
    travels_cut: bool = False
    expansion: int = 0
    state: int = 0
    work: float = 0.0
    work_before: float = 0.0


class Cache(NamedTuple):
    """How decoding keeps what a kind of attention needs of earlier positions.

    keep(kept, lengths_B, context, cfg) makes the cache, leaves [B, K, ...] that tp shards in K, of
    what `forward` kept of prompts of these lengths. seen(positions_B, starts_B, cache, cfg) returns
    what `decode` takes to know which of it a row's next position sees, whose document began at the
    position `starts`. write(leaf, new, positions_B) returns a leaf, stacked over blocks, with what
    `decode` made for these positions.
    """

    keep: Callable[[Tree, Array, int, ModelConfig], Tree]
    seen: Callable[[Array, Array, Tree, ModelConfig], Array]
    write: Callable[[Array, Array, Array], Array]


def _keep_positions(kept: Tree, lengths_B: Array, context: int, cfg: ModelConfig) -> Tree:
    """Puts the last positions of prompts, [B, K, T, H], where `cached_positions` has them: [B, K,
    S, H] with S = `cache_size`. Entries of no position of the prompt mean nothing; decoding
    overwrites each before it is visible."""
    S = cache_size(context, cfg)

    def leaf(x_BKTH: Array) -> Array:
        T = x_BKTH.shape[2]
        if T <= S:
            return jnp.pad(x_BKTH, ((0, 0), (0, 0), (0, S - T), (0, 0)))
        index_BS = jnp.maximum(cached_positions(lengths_B, S), 0)
        return jnp.take_along_axis(x_BKTH, index_BS[:, None, :, None], axis=2)

    return jax.tree.map(leaf, kept)


def _visible_positions(positions_B: Array, starts_B: Array, cache: Tree, cfg: ModelConfig) -> Array:
    """Returns which entries a row sees: bool [B, S]."""
    return cached_visible(positions_B, starts_B, jax.tree.leaves(cache)[0].shape[-2], cfg)


def _write_positions(cache: Array, new: Array, positions_B: Array) -> Array:
    """Writes the entry of one position of each row: [blocks, B, K, S, H], [blocks, B, K, H]."""
    rows, S = cache.shape[1], cache.shape[-2]
    return cache.at[:, jnp.arange(rows), :, positions_B % S].set(new.swapaxes(0, 1))


POSITIONS = Cache(_keep_positions, _visible_positions, _write_positions)


class Attention(NamedTuple):
    """One kind of attention.

    params(cfg) declares its parameters; sizes(cfg) says its numbers per position; rules(config)
    yields what cannot run. All take the config of one layer (`config.of_layer`,
    `config.config_of_layer`).

    forward(params, x_BtD, table, cfg) and decode(params, x_BtD, table, cache, seen, cfg) both
    return what is added to the residual stream, and what later positions need of these ones: leaves
    [B, K, T, H], sharded over tp in K, or copies of one head, unless `cache` says otherwise.

    `decode` takes one new position of each of B rows. In the residual stream, rows then stand where
    positions stand in training, so that linear layers, feed-forward parts and collectives are the
    same: x_BtD is [1, T/tp, D], where T is B rounded up to a multiple of tp by repeating the last
    row, and the table has a position for each of the T. Its cache has leaves [B, K, S, H], of which
    a row sees the positions set in `seen`, bool [B, S]; for the new position it returns [B, K, H].
    """

    params: Callable[[ModelConfig], Tree]
    forward: Callable[..., tuple[Array, Tree]]
    decode: Callable[..., tuple[Array, Tree]]
    sizes: Callable[[ModelConfig], Sizes]
    rules: Callable[[ConfigDict], Iterator[str]]
    cache: Cache = POSITIONS


# ---------------------------------------------------------------------------------------------
# Projections
# ---------------------------------------------------------------------------------------------


def to_heads(x_BTI: Array, w_InH: Array | Deferred) -> Array:
    """Projects to heads: [B, T, I], [I, N/tp, H] -> [B, N/tp, T, H]."""
    x_BTO = linear(x_BTI, w_InH)
    return x_BTO.reshape(*x_BTI.shape[:2], *w_InH.shape[1:]).swapaxes(1, 2)


def from_heads(x_BnTH: Array, w_nHD: Array | Deferred) -> Array:
    """Projects heads to the residual stream: [B, N/tp, T, H], [N/tp, H, D] -> [B, T, D], a partial
    sum over tp."""
    B, n, T, H = x_BnTH.shape
    return linear(x_BnTH.swapaxes(1, 2).reshape(B, T, n * H), w_nHD)


def output_weight(cfg: ModelConfig, size: int, heads: int = 0) -> Param:
    """Declares the weight from heads of this size, n_heads if not so many, back to the residual
    stream."""
    N = heads or cfg.n_heads
    std = (2 * cfg.n_layers * N * size) ** -0.5
    return weight((N, size, cfg.d_model), P(TP, None, FSDP), std, RESIDUAL, inputs=2)


# ---------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------


def rows_first(x_1nTH: Array, rows: int) -> Array:
    """Brings the rows of decoding to the front: [1, N, T, H] -> [B, N, H].

    They stand where positions do in training, and the last of them only fill up the tp devices.
    """
    return x_1nTH[0, :, :rows].swapaxes(0, 1)


def rows_last(x_BnH: Array, rows: int) -> Array:
    """Brings rows back to where positions stand: [B, N, H] -> [1, N, T, H] with T = rows.

    The last row is repeated to fill them up.
    """
    filled = jnp.pad(x_BnH, ((0, rows - x_BnH.shape[0]), (0, 0), (0, 0)), mode='edge')
    return filled.swapaxes(0, 1)[None]
