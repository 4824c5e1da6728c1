"""Decoding: prompts in, tokens out, with a cache of fixed size on any mesh.

    tokens = generate(params, cfg, prompts, max_tokens=200, context=1024)

Two compiled programs do it: `prefill` takes all prompts, padded on the right to one of a few
lengths, and leaves the part of each position that attention keeps; `decode` extends every row by
some tokens, at its own position. So neither compiles anew for another position, and prefill only
for another padded length. Rows of the batch are spread over every axis but tp.

In the residual stream of `decode`, rows stand where positions stand in training (see
`attention.Attention`): x_1tD is [1, T/tp, D] with a row per position, and each part of the model
runs as it is trained.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from config import COMPUTE, ConfigError, ModelConfig, of_layer
from layers.attention import ATTENTION, attention_sizes, rope_table
from layers.attention_kernels import ATTENTION_KERNELS
from layers.expert_kernels import EXPERT_KERNELS
from layers.kernels import portable
from layers.kinds import Cache
from model import (
    attention_of,
    block_names,
    embed,
    head_logits,
    layer,
    model_params,
    position_tables,
    tables_of,
)
from parallel import (
    AXES,
    BATCH,
    CP,
    PP,
    TP,
    Array,
    P,
    Param,
    Tree,
    all_gather,
    broadcast,
    free_axes,
    is_param,
    map_params,
    replicate,
    specs,
    varying,
)

# The axes that rows are spread over: stages of a pipeline take their share; cp has one device.
ROWS = (PP, *BATCH, CP)

SHORTEST = 16  # the least padded length of a prompt

# Each device has a copy of its own, so that values alike on the tp devices are never compared.
STATE = {
    'cache': P(None, ROWS, TP),
    'token': P(AXES),
    'position': P(AXES),
    'start': P(AXES),
    'limit': P(AXES),
    'done': P(AXES),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rules for drawing a token. Filters apply in the order of the fields, one after the other.

    temperature 0 takes the likeliest token. top_k (0: all) keeps so many; top_p (1: all) keeps the
    likeliest that together reach this share (nucleus sampling, Holtzman et al. 2020); min_p (0:
    all) keeps those at least this share as likely as the likeliest (Nguyen et al. 2024). Tokens
    exactly as likely as the last one kept are kept too. Raises ConfigError if out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        rules = {
            'temperature': (0 <= self.temperature < math.inf, '0 (greedy) or more'),
            'top_k': (self.top_k >= 0, '0 (all tokens) or more'),
            'top_p': (0 < self.top_p <= 1, 'a share above 0, up to 1 (all tokens)'),
            'min_p': (0 <= self.min_p <= 1, 'a share from 0 (all tokens) to 1'),
        }
        for name, (holds, remedy) in rules.items():
            if not holds:
                raise ConfigError(f'{name}={getattr(self, name)} is out of range; use {remedy}')


def sample(logits_V: Array, key: Array, sampling: Sampling) -> Array:
    """Draws one token, int32, from float32 logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_V).astype(jnp.int32)
    logits_V = logits_V / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        sorted_V = jnp.sort(logits_V, descending=True)
        if sampling.top_k:
            sorted_V = jnp.where(jnp.arange(len(sorted_V)) < sampling.top_k, sorted_V, -jnp.inf)
        probs_V = jax.nn.softmax(sorted_V)
        before_V = jnp.cumsum(probs_V) - probs_V
        kept_V = (before_V < sampling.top_p) & (sorted_V > -jnp.inf)
        least = jnp.min(jnp.where(kept_V, sorted_V, jnp.inf))
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    if sampling.min_p:
        least = jnp.max(logits_V) + math.log(sampling.min_p)
        logits_V = jnp.where(logits_V >= least, logits_V, -jnp.inf)
    return jax.random.categorical(key, logits_V).astype(jnp.int32)


# ---------------------------------------------------------------------------------------------
# The model with a cache; inside shard_map
# ---------------------------------------------------------------------------------------------


def decoding_config(cfg: ModelConfig) -> ModelConfig:
    """Returns the model without the parts that serve training alone.

    Experts take all choices: a capacity is a share of a whole sequence, and decoding does not know
    the rest of it. Kernels that shard_map cannot check, as it does here, or that take whole blocks
    of positions, make way for those that run everywhere. Weights are multiplied in the compute
    type. Sequences are whole, whatever cp trained the model (`stream` refuses a mesh with cp).
    """
    attention, experts = cfg.attention_kernel, cfg.expert_kernel
    if not ATTENTION_KERNELS[attention].checked or ATTENTION_KERNELS[attention].latent:
        attention = portable(ATTENTION_KERNELS)
    if not EXPERT_KERNELS[experts].checked:
        experts = portable(EXPERT_KERNELS)
    return dataclasses.replace(
        cfg, cp=1, dropout=0.0, capacity_factor=0.0, buffer_factor=0.0, balance_loss=0.0,
        router_z_loss=0.0, attention_kernel=attention, expert_kernel=experts, matmul_type=COMPUTE,
    )  # fmt: skip


def chunks_of(params: Tree, cfg: ModelConfig) -> int:
    """Returns the chunks per stage of the pipeline that these parameters were laid out for."""
    declared = model_params(cfg)
    found, plain = (jax.tree.leaves(x['blocks'], is_leaf=is_param)[0] for x in (params, declared))
    return 1 if found.ndim == len(plain.shape) else found.shape[0]


def block_at(blocks: Tree, declared: Tree, i: Array) -> Tree:
    """Fetches the parameters of block i from the pipeline stage that holds it."""

    def leaf(p: Param, x: Array) -> Array:
        if PP not in p.spec[:2]:
            return lax.dynamic_index_in_dim(x, i, keepdims=False)
        if p.spec[0] == PP:
            x = x[None]  # a single chunk
        n = x.shape[1]  # blocks of a chunk of a stage; see `parallel.stacked`
        chunk, stage = jnp.divmod(i // n, lax.axis_size(PP))
        return broadcast(x[chunk, i % n], PP, stage)

    return map_params(leaf, declared, blocks)


def run_layers(
    params: Tree,
    x_BtD: Array,
    cache: Tree | None,
    attend: Callable[[Tree, Array, Tree | None, str], tuple[Array, Tree]],
    cfg: ModelConfig,
) -> tuple[Array, Tree]:
    """Runs all layers in scans over blocks; `attend` takes a layer's parameters, input, cache and
    kind.

    Returns the last x_BtD, and the arrays that attention keeps, by group, layer of the block and
    name; like the cache's, they are stacked over blocks. The cache is only read: one write after
    the scans leaves it where it is, a write in each layer could make the compiler copy it.
    """
    declared, kept = model_params(cfg, chunks_of(params, cfg)), {}
    groups = {'first': (cfg.first_kind,)} if cfg.first_dense else {}
    for group, kinds in (groups | {'blocks': cfg.block}).items():
        n_blocks = cfg.first_dense if group == 'first' else cfg.n_blocks
        cached = cache[group] if cache else dict.fromkeys(block_names(kinds))
        block = functools.partial(
            run_block, params[group], declared[group], attend=attend, kinds=kinds, cfg=cfg
        )
        x_BtD, kept[group] = lax.scan(block, x_BtD, (jnp.arange(n_blocks), cached))
    return x_BtD, kept


def run_block(
    blocks: Tree,
    declared: Tree,
    x_BtD: Array,
    scanned: tuple[Array, Tree],
    attend: Callable[[Tree, Array, Tree | None, str], tuple[Array, Tree]],
    kinds: tuple[str, ...],
    cfg: ModelConfig,
) -> tuple[Array, Tree]:
    """Runs block i of stacked blocks; `scanned` is i and its cache. Returns x_BtD and its part of
    the cache."""
    i, cached = scanned
    weights, kept = block_at(blocks, declared, i), {}
    key = jax.random.key(0)  # of dropout, which is off
    for name, kind in zip(block_names(kinds), kinds, strict=True):
        with_cache = functools.partial(attend, cached=cached[name], kind=kind)
        x_BtD, kept[name], _ = layer(weights[name], x_BtD, with_cache, key, cfg, kind)
    return x_BtD, kept


def prefill_logits(
    params: Tree, ids_BT: Array, lengths_B: Array, cfg: ModelConfig, context: int
) -> tuple[Array, Tree]:
    """Computes all positions of prompts at once. ids_BT: int32 [B, T], padded on the right.

    Returns the logits after each prompt's last token, float32 [B, V], and the cache: leaves that
    `kinds.Cache` makes, stacked over blocks.
    """
    T = ids_BT.shape[1]
    block = max(d for d in range(1, cfg.attention_block + 1) if T % d == 0)
    cfg = dataclasses.replace(cfg, attention_block=block)
    tables = position_tables(ids_BT, cfg)
    tables = {rotary: table._replace(lengths=lengths_B) for rotary, table in tables.items()}

    def attend(params: Tree, h_BtD: Array, cached: None, kind: str) -> tuple[Array, Tree]:
        out_BtD, kept = attention_of(cfg, kind, tables)(params, h_BtD)
        return out_BtD, cache_kind(cfg, kind).keep(kept, lengths_B, context, of_layer(cfg, kind))

    x_BtD = embed(params['embed'], ids_BT, cfg)
    x_BtD, cache = run_layers(params, x_BtD, None, attend, cfg)
    x_BTD = all_gather(x_BtD, TP, 1)
    last_B1D = jnp.take_along_axis(x_BTD, lengths_B[:, None, None] - 1, axis=1)
    return all_gather(head_logits(params, last_B1D, cfg), TP, 2)[:, 0], cache


def cache_kind(cfg: ModelConfig, kind: str) -> Cache:
    """Returns how a layer of this kind keeps earlier positions."""
    return ATTENTION[of_layer(cfg, kind).attention].cache


def written(cache: Tree, new: Tree, positions_B: Array, cfg: ModelConfig) -> Tree:
    """Returns the cache of all layers with what they made for these positions."""
    found: Tree = {}
    for group, layers in cache.items():
        kinds = (cfg.first_kind,) if group == 'first' else cfg.block
        found[group] = {}
        for name, kind in zip(block_names(kinds), kinds, strict=True):
            write = functools.partial(cache_kind(cfg, kind).write, positions_B=positions_B)
            found[group][name] = jax.tree.map(write, layers[name], new[group][name])
    return found


def decode_logits(
    params: Tree, cache: Tree, ids_B: Array, positions_B: Array, starts_B: Array, cfg: ModelConfig
) -> tuple[Array, Tree]:
    """Computes one more token per row, int32 [B], at its position, in a document that started at
    the position `starts`: logits after it, float32 [B, V], and the cache with it."""
    rows, tp = ids_B.shape[0], lax.axis_size(TP)

    def filled(x_B: Array) -> Array:
        return jnp.pad(x_B, (0, -rows % tp), mode='edge')

    since_start = filled(positions_B - starts_B)
    tables = tables_of(cfg, lambda own: rope_table(own, since_start))

    def attend(params: Tree, h_1tD: Array, cached: Tree, kind: str) -> tuple[Array, Tree]:
        own = of_layer(cfg, kind)
        seen = cache_kind(cfg, kind).seen(positions_B, starts_B, cached, own)
        table = tables[attention_sizes(own).rotary]
        return ATTENTION[own.attention].decode(params, h_1tD, table, cached, seen, own)

    x_1tD = embed(params['embed'], filled(ids_B)[None], cfg)
    x_1tD, kept = run_layers(params, x_1tD, cache, attend, cfg)
    cache = written(cache, kept, positions_B, cfg)
    x_1BD = all_gather(x_1tD, TP, 1)[:, :rows]
    return all_gather(head_logits(params, x_1BD, cfg), TP, 2)[0], cache


def next_starts(ids_BT: Array, lengths_B: Array, cfg: ModelConfig) -> Array:
    """Finds the start of the document that goes on after these tokens: int32 [B]."""
    index = jnp.arange(ids_BT.shape[1])
    ends_BT = (ids_BT == cfg.document_end) & (index < lengths_B[:, None])
    return jnp.max(jnp.where(ends_BT, index + 1, 0), axis=1)


# ---------------------------------------------------------------------------------------------
# The two programs
# ---------------------------------------------------------------------------------------------


def _place(state: Tree, logits_BV: Array, rules: Tree, sampling: Sampling) -> Tree:
    """Draws a token for each row's position, and returns the state with it.

    A row's randomness follows from the seed, its number in the batch and the position: not from the
    mesh, nor from other rows.
    """
    B = logits_BV.shape[0]
    rows_B = lax.axis_index(ROWS) * B + jnp.arange(B)
    key = jax.random.key(rules['seed'])
    logits_BV = jnp.where(rules['allowed'], logits_BV, -jnp.inf)

    def draw(row: Array, position: Array, logits_V: Array) -> Array:
        return sample(
            logits_V, jax.random.fold_in(jax.random.fold_in(key, row), position), sampling
        )

    token_B = jax.vmap(draw)(rows_B, state['position'], logits_BV)
    done_B = (token_B == rules['stop']) | (state['position'] + 1 >= state['limit'])
    return state | {'token': token_B, 'done': done_B}


def _varying_params(params: Tree, cfg: ModelConfig) -> Tree:
    declared = model_params(cfg, chunks_of(params, cfg))
    return map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)


def _prefill(params, ids_BT, lengths_B, limits_B, rules, *, cfg, sampling, context):
    params = _varying_params(params, cfg)
    ids_BT, lengths_B, limits_B = (varying(x, TP) for x in (ids_BT, lengths_B, limits_B))
    rules = jax.tree.map(lambda x: varying(x, AXES), rules)
    logits_BV, cache = prefill_logits(params, ids_BT, lengths_B, cfg, context)
    starts_B = next_starts(ids_BT, lengths_B, cfg)
    state = {'cache': cache, 'position': lengths_B, 'start': starts_B, 'limit': limits_B}
    state = _place(state, logits_BV, rules, sampling)
    return state, _shown(state['token'][:, None], state['done'])


def _decode(params, state, rules, *, cfg, sampling, n_tokens):
    params = _varying_params(params, cfg)
    rules = jax.tree.map(lambda x: varying(x, AXES), rules)

    def step(state: Tree, _: None):
        logits_BV, cache = decode_logits(
            params, state['cache'], state['token'], state['position'], state['start'], cfg
        )
        old = {name: x for name, x in state.items() if name != 'cache'}
        position_B = old['position'] + 1
        start_B = jnp.where(old['token'] == cfg.document_end, position_B, old['start'])
        new = _place(old | {'position': position_B, 'start': start_B}, logits_BV, rules, sampling)
        kept = jax.tree.map(functools.partial(jnp.where, old['done']), old, new)
        return kept | {'cache': cache}, jnp.where(old['done'], -1, new['token'])

    state, tokens_TB = lax.scan(step, state, length=n_tokens)
    return state, _shown(tokens_TB.T, state['done'])


def _shown(tokens_BT: Array, done_B: Array) -> Array:
    """Brings all devices' tokens to the host, with a last column that is 1 for ended rows."""
    both = jnp.concatenate((tokens_BT, done_B[:, None].astype(jnp.int32)), axis=1)
    return replicate(both, AXES, 0)


@functools.cache
def programs(
    cfg: ModelConfig, chunks: int, mesh: Mesh, sampling: Sampling, context: int, n_tokens: int
) -> tuple[Callable, Callable]:
    """Returns jitted prefill (params, ids_BT, lengths_B, limits_B, rules) -> (state, tokens and
    ends), and decode (params, state, rules) -> the same for n_tokens more; the state is donated."""
    params = specs(model_params(cfg, chunks))
    prefill = functools.partial(_prefill, cfg=cfg, sampling=sampling, context=context)
    decode = functools.partial(_decode, cfg=cfg, sampling=sampling, n_tokens=n_tokens)
    shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=(STATE, P()))
    prefill = shard(prefill, in_specs=(params, P(ROWS), P(ROWS), P(ROWS), P()))
    decode = shard(decode, in_specs=(params, STATE, P()))
    return jax.jit(prefill), jax.jit(decode, donate_argnums=1)


# ---------------------------------------------------------------------------------------------
# For the host
# ---------------------------------------------------------------------------------------------


def padded_lengths(context: int, tp: int) -> list[int]:
    """Lists the lengths that prompts are padded to, the last one being the cache's: each twice the
    one before, all divisible by tp."""
    unit = math.lcm(SHORTEST, tp)
    longest = -(-context // unit) * unit
    lengths = [unit]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return lengths


def check_prompts(prompts: Sequence[Sequence[int]], context: int, vocab_size: int) -> None:
    """Raises ConfigError for prompts that cannot be continued."""
    if not prompts:
        raise ConfigError('there is no prompt; give at least one')
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f'prompt {i} is empty; give at least one token, as end of text')
        if len(prompt) >= context:
            raise ConfigError(
                f'prompt {i} has {len(prompt)} tokens, and the context of {context} must hold it '
                f'and a token more; shorten it, or use a larger context'
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f'prompt {i} has ids from {min(prompt)} to {max(prompt)}, outside of the '
                f'vocabulary of {vocab_size}; encode it with the tokenizer of the run'
            )


def weight_types(declared: Tree, cfg: ModelConfig) -> Tree:
    """Returns the type that each parameter is used in: weights in the compute type; gains, and the
    router and the shared experts' gate, which decide in float32, in float32."""

    def leaf(path: tuple, p: Param) -> np.dtype:
        narrow = p.matrix and path[-1].key not in ('router', 'shared_gate')
        return np.dtype(cfg.compute_dtype if narrow else np.float32)

    return jax.tree_util.tree_map_with_path(leaf, declared, is_leaf=is_param)


def cast_weights(params: Tree, cfg: ModelConfig) -> Tree:
    """Casts parameters to the types that they are used in, so that no token has to."""
    types = weight_types(model_params(cfg, chunks_of(params, cfg)), cfg)
    return jax.tree.map(lambda x, dtype: x.astype(dtype), params, types)


def put_request(
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    context: int,
    mesh: Mesh,
    rules: dict[str, np.ndarray],
) -> tuple[tuple[Array, Array, Array], Tree]:
    """Puts prompts on the mesh as `programs` take them: (ids_BT, lengths_B, limits_B), rules.

    Rows are added so that each device has as many; these hold one token, and end when they begin.
    """
    shards = math.prod(mesh.shape[axis] for axis in ROWS)
    B = -(-len(prompts) // shards) * shards
    T = next(n for n in padded_lengths(context, mesh.shape[TP]) if n >= max(map(len, prompts)))
    ids_BT = np.zeros((B, T), np.int32)
    lengths_B, limits_B = np.ones((2, B), np.int32)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
        limits_B[row] = min(len(prompt) + max_tokens, context)
    rows = tuple(jax.device_put((ids_BT, lengths_B, limits_B), NamedSharding(mesh, P(ROWS))))
    return rows, jax.device_put(rules, NamedSharding(mesh, P()))


def fetch(shown: Array, mesh: Mesh, n_prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Fetches the tokens of a program, int32 [n_prompts, n], and the ends, bool [n_prompts].

    tp devices hold the same rows; the first one's are taken.
    """
    shown = np.asarray(shown)
    shown = shown.reshape(mesh.size // mesh.shape[TP], mesh.shape[TP], -1, shown.shape[1])[:, 0]
    shown = shown.reshape(-1, shown.shape[-1])[:n_prompts]
    return shown[:, :-1], shown[:, -1].astype(bool)


def stream(
    params: Tree,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    context: int,
    *,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: int = -1,
    allowed: np.ndarray | None = None,
    n_tokens: int = 8,
) -> Iterator[np.ndarray]:
    """Continues prompts: yields int32 [prompts, n] as tokens come, -1 where a row has ended.

    `params` lie on a mesh as `model_params` declares, pp > 1 included, and in any float type. A row
    ends with the token `stop` (-1: none), after max_tokens, or when prompt and tokens fill the
    context. `allowed`: bool [V], the tokens that may come. `n_tokens` come at a time, after a first
    one. Raises ConfigError for empty or too long prompts, and for a mesh with cp. With several
    processes all call this.
    """
    check_prompts(prompts, context, cfg.vocab_size)
    if max_tokens < 1:
        raise ConfigError(f'max_tokens={max_tokens} is below 1; ask for a token or more')
    cfg, chunks = decoding_config(cfg), chunks_of(params, cfg)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    if mesh.shape[CP] > 1:
        raise ConfigError(
            f'decoding does not cut sequences, and the mesh has cp={mesh.shape[CP]}; restore the '
            f'checkpoint on a mesh without cp'
        )
    rules = {'seed': np.uint32(seed), 'stop': np.int32(stop)}
    rules['allowed'] = np.ones(cfg.vocab_size, bool) if allowed is None else allowed
    rows, rules = put_request(prompts, max_tokens, context, mesh, rules)
    length = padded_lengths(context, mesh.shape[TP])[-1]
    prefill, decode = programs(cfg, chunks, mesh, sampling, length, n_tokens)

    state, shown = prefill(params, *rows, rules)
    to_come = max(min(max_tokens, context - len(prompt)) for prompt in prompts) - 1
    while shown is not None:
        following = None
        if to_come > 0:  # runs while the tokens before it are looked at
            state, following = decode(params, state, rules)
            to_come -= n_tokens
        tokens, ended = fetch(shown, mesh, len(prompts))
        yield tokens
        shown = None if ended.all() else following


def generate(
    params: Tree,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    context: int,
    **options,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt; a `stop` token is the last one where it came.

    Arguments and errors as of `stream`.
    """
    tokens = np.concatenate(list(stream(params, cfg, prompts, max_tokens, context, **options)), 1)
    return [row[row >= 0].tolist() for row in tokens]
