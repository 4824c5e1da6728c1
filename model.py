"""The model: its layers in blocks, embedding and loss, and the declaration of its parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import (
    ATTENTION_OUTPUT,
    RESIDUAL,
    ModelConfig,
    config_of_layer,
    layer_kind,
    model_config,
    model_kinds,
    of_layer,
)
from layers.attention import ATTENTION, Attention, attention_sizes, positions
from layers.attention_kernels import ATTENTION_KERNELS
from layers.cross_entropy import cross_entropy, label_scores
from layers.dense import DENSE, FeedForward, dropout, gain, rms_norm
from layers.expert_kernels import EXPERT_KERNELS
from layers.kernels import Layer, choose
from layers.moe import MOE
from layers.rope import Positions
from parallel import (
    CP,
    FSDP,
    PP,
    TP,
    Array,
    Deferred,
    P,
    Param,
    Tree,
    all_gather,
    count,
    gather_zigzag,
    is_param,
    normal,
    own_positions,
    reduce_scatter,
    stacked,
    unshard,
    zigzag,
)

# The kinds of layers that model.block may name: their feed-forward part.
FEED_FORWARD: dict[str, FeedForward] = {'dense': DENSE, 'moe': MOE}


def model_for(config: ConfigDict, platform: str, end_of_text: int = -1) -> ModelConfig:
    """Returns the model's config for devices of this jax platform, with the kernels that run there.

    `end_of_text`, the token that ends a document of the data, counts with data.isolate_documents.
    """
    cfg = model_config(config)
    end, layers = cfg.document_end, kernel_layers(config)
    compared = [
        x for x, kind in zip(layers, model_kinds(cfg), strict=True) if not is_linear(cfg, kind)
    ]
    if config.data.isolate_documents and end < 0:
        end = end_of_text
    return dataclasses.replace(
        cfg,
        attention_kernel=choose(
            ATTENTION_KERNELS, cfg.attention_kernel, compared or layers, platform
        ),
        expert_kernel=choose(EXPERT_KERNELS, cfg.expert_kernel, layers, platform),
        ragged=platform != 'cpu',
        document_end=end,
        padded=config.data.packing != 'stream',
    )


def is_linear(cfg: ModelConfig, kind: str) -> bool:
    """Returns whether a layer keeps a state in place of keys, and so needs no attention kernel."""
    return attention_sizes(of_layer(cfg, kind)).state > 0


def kernel_layers(config: ConfigDict) -> list[Layer]:
    """Returns each kind of layer as the choice and the rules of kernels take it."""
    cfg = model_config(config)
    return [
        (config_of_layer(config, kind), attention_sizes(of_layer(cfg, kind)).key)
        for kind in model_kinds(cfg)
    ]


# ---------------------------------------------------------------------------------------------
# Layers in blocks
# ---------------------------------------------------------------------------------------------


def layer_kinds(cfg: ModelConfig, kind: str) -> tuple[Attention, FeedForward]:
    """Returns both parts of a layer of this kind."""
    return ATTENTION[of_layer(cfg, kind).attention], FEED_FORWARD[layer_kind(kind).feed_forward]


Tables = dict[int, Positions]  # by the rotating numbers of a head, which layers differ in


def tables_of(cfg: ModelConfig, table: Callable[[ModelConfig], Positions]) -> Tables:
    """Makes a table of positions for each kind of layer that takes another; `table` takes the
    config of such a layer."""
    layers = {attention_sizes(c).rotary: c for c in (of_layer(cfg, k) for k in model_kinds(cfg))}
    return {rotary: table(c) for rotary, c in layers.items()}


def attention_of(cfg: ModelConfig, kind: str, tables: Tables) -> Callable[..., tuple[Array, Tree]]:
    """Returns the attention of a layer of this kind: (parameters, input) -> its two results."""
    own = of_layer(cfg, kind)
    table = tables[attention_sizes(own).rotary]
    return functools.partial(ATTENTION[own.attention].forward, table=table, cfg=own)


def layer_params(cfg: ModelConfig, kind: str) -> Tree:
    """Declares the parameters of one layer."""
    attention, feed_forward = layer_kinds(cfg, kind)
    return {
        'attention_norm': gain(cfg.d_model),
        'attention': attention.params(of_layer(cfg, kind)),
        'ffn_norm': gain(cfg.d_model),
        'ffn': feed_forward.params(cfg),
    }


def layer(
    params: Tree,
    x_BtD: Array,
    attend: Callable[[Tree, Array], tuple[Array, Tree]],
    key: Array,
    cfg: ModelConfig,
    kind: str,
    held_Bt: Array | None = None,
) -> tuple[Array, Tree, dict[str, Array]]:
    """Runs one layer, with `attend` (parameters, input) as its attention.

    x_BtD: [B, T/tp, D] -> the same, the arrays that attention keeps for decoding, and the
    feed-forward's statistics. Each part is x + f(norm(x)), or with norms 'after' x + norm(f(x)), as
    in OLMo 2 (2025, section 3.1). Where held_Bt is False there is no token, and no expert for it.
    """
    _, feed_forward = layer_kinds(cfg, kind)

    def norm(x_BtD: Array, name: str, place: str) -> Array:
        return rms_norm(x_BtD, params[name], cfg.norm_eps) if cfg.norms == place else x_BtD

    h_BtD = norm(x_BtD, 'attention_norm', 'before')
    with jax.named_scope('attention'):
        h_BtD, kept = attend(params['attention'], h_BtD)
    h_BtD = norm(h_BtD, 'attention_norm', 'after')
    x_BtD = x_BtD + dropout(h_BtD, cfg.dropout, jax.random.fold_in(key, 0))
    x_BtD = checkpoint_name(x_BtD, RESIDUAL)
    h_BtD = norm(x_BtD, 'ffn_norm', 'before')
    with jax.named_scope(layer_kind(kind).feed_forward):
        held = () if held_Bt is None or not feed_forward.routed else (held_Bt,)
        h_BtD, stats = feed_forward.forward(params['ffn'], h_BtD, cfg, *held)
    h_BtD = norm(h_BtD, 'ffn_norm', 'after')
    x_BtD = x_BtD + dropout(h_BtD, cfg.dropout, jax.random.fold_in(key, 1))
    return checkpoint_name(x_BtD, RESIDUAL), kept, stats


def block_names(kinds: tuple[str, ...]) -> list[str]:
    """Returns the names of the layers of a block, in order: '0_dense', '1_moe', ..."""
    return [f'{i}_{kind}' for i, kind in enumerate(kinds)]


def _all_but_gathered_weights(prim: Any, *_: Any, **params: Any) -> bool:
    """Saves every result but those of an all-gather over fsdp."""
    return not (prim.name == 'all_gather' and FSDP in params['axis_name'])


REMAT = ('none', 'dots', 'full')


def remat_policy(cfg: ModelConfig) -> Callable[..., Any]:
    """Returns the policy of jax.checkpoint that model.remat stands for.

    'dots' and 'full' save arrays by REMAT_NAMES, since linear layers differentiate themselves,
    which hides their matmuls from a policy; a kernel whose results have no name is saved by its
    primitive. No policy saves a gathered weight: with FSDP all of them together are the whole
    model, so each is gathered again instead.
    """
    if cfg.remat == 'none':
        return _all_but_gathered_weights
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(cfg.kept_names),
        names_which_can_be_offloaded=list(cfg.offloaded_names),
        offload_src='device',
        offload_dst='pinned_host',
    )
    primitive = ATTENTION_KERNELS[cfg.attention_kernel].keeps
    if not primitive or ATTENTION_OUTPUT not in cfg.kept_names:
        return by_name

    def by_primitive_or_name(prim: Any, *args: Any, **params: Any) -> Any:
        return prim.name == primitive or by_name(prim, *args, **params)

    return by_primitive_or_name


def run_blocks(
    blocks: Tree,
    x_BtD: Array,
    tables: Tables,
    key: Array,
    cfg: ModelConfig,
    kinds: tuple[str, ...],
    first_layer: Array | int = 0,
) -> tuple[Array, Tree]:
    """Runs stacked blocks of layers of these kinds, in a scan. x_BtD: [B, T/tp, D] -> the same.

    The first layer has the number `first_layer` in the model. Also returns statistics by layer of
    the block: {name: {statistic: [blocks, ...]}}.
    """
    names = block_names(kinds)
    held = next(iter(tables.values())).held  # the same in all tables

    def one_layer(x_BtD: Array, scanned: tuple[Tree, Array], kind: str):
        params, number = scanned
        layer_key, attend = jax.random.fold_in(key, number), attention_of(cfg, kind, tables)
        x_BtD, _, stats = layer(params, x_BtD, attend, layer_key, cfg, kind, held)
        return x_BtD, stats

    def block(x_BtD: Array, scanned: tuple[Tree, Array]):
        params, index = scanned
        stats, start = {}, first_layer + index * len(kinds)
        for group in groups_of_a_kind(kinds, params, cfg):
            f = functools.partial(one_layer, kind=kinds[group[0]])
            f = jax.checkpoint(f, policy=remat_policy(cfg), prevent_cse=False)
            layers = [(params[names[i]], jnp.asarray(start + i)) for i in group]
            with jax.named_scope(f'layer_{names[group[0]]}' + f'_x{len(group)}' * (len(group) > 1)):
                x_BtD, found = run_layers(f, x_BtD, layers)
            stats |= {names[i]: s for i, s in zip(group, found, strict=True) if s}
        return x_BtD, stats

    n_blocks = jax.tree.leaves(blocks)[0].shape[0]
    return lax.scan(block, x_BtD, (blocks, jnp.arange(n_blocks)))


def run_layers(f: Callable, x_BtD: Array, layers: list[Tree]) -> tuple[Array, list[Tree]]:
    """Runs f over layers of one kind, several of them in a scan: the last output, and statistics
    of each layer."""
    if len(layers) == 1:
        x_BtD, stats = f(x_BtD, layers[0])
        return x_BtD, [stats]
    x_BtD, stacked_stats = lax.scan(f, x_BtD, jax.tree.map(lambda *x: jnp.stack(x), *layers))
    leaves, structure = jax.tree.flatten(stacked_stats)
    return x_BtD, [structure.unflatten([x[i] for x in leaves]) for i in range(len(layers))]


def groups_of_a_kind(kinds: tuple[str, ...], params: Tree, cfg: ModelConfig) -> list[list[int]]:
    """Groups neighbouring layers of one kind: these are scanned, so that the program holds one of
    them.

    That takes a copy of their shards. Weights whose gradient is deferred leave activations beside
    them, which are not worth copying: there each layer is alone. So it is with offloading: XLA's
    compiler for GPUs refuses arrays in host memory in a scan within a scan.
    """
    alone = bool(cfg.remat_offload) or any(
        isinstance(leaf, Deferred)
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Deferred))
    )
    found: list[list[int]] = []
    for i, kind in enumerate(kinds):
        if found and not alone and kinds[i - 1] == kind:
            found[-1].append(i)
        else:
            found.append([i])
    return found


# ---------------------------------------------------------------------------------------------
# Vocabulary: embedding
# ---------------------------------------------------------------------------------------------


def vocab_matrix(cfg: ModelConfig, std: float) -> Tree:
    """Declares an embedding or a head."""
    return {'w_VD': Param((cfg.vocab_size, cfg.d_model), P(TP, FSDP), normal(std))}


@jax.named_scope('embed')
def embed(params: Tree, ids_BT: Array, cfg: ModelConfig) -> Array:
    """Looks up embeddings: ids of all positions, [B, T] -> x_BtD of the local ones, [B, T/tp, D].

    Each tp device looks up the rows that it holds and adds zeros for the others. The lookup runs
    in float32, since its backward adds up all gradients of a token's row.
    """
    w_vD = unshard(params, vocab_matrix(cfg, 0), jnp.dtype(cfg.compute_dtype), cfg.fsdp_reduce)[
        'w_VD'
    ]
    row_BT = ids_BT - lax.axis_index(TP) * w_vD.shape[0]
    here_BT = (row_BT >= 0) & (row_BT < w_vD.shape[0])
    partial_BTD = w_vD.astype(jnp.float32)[jnp.where(here_BT, row_BT, 0)]
    partial_BTD = jnp.where(here_BT[..., None], partial_BTD, 0).astype(w_vD.dtype)
    return reduce_scatter(partial_BTD, TP, 1)


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def block_params(cfg: ModelConfig, kinds: tuple[str, ...]) -> Tree:
    """Declares the parameters of one block of layers of these kinds."""
    names = block_names(kinds)
    return {name: layer_params(cfg, kind) for name, kind in zip(names, kinds, strict=True)}


def model_params(cfg: ModelConfig, chunks: int = 1) -> Tree:
    """Declares every parameter of the model; `chunks` as in `stacked`."""
    params = {
        'embed': vocab_matrix(cfg, 0.02),
        'blocks': stacked(block_params(cfg, cfg.block), cfg.n_blocks, PP, chunks),
        'final_norm': gain(cfg.d_model),
    }
    if cfg.first_dense:
        params['first'] = stacked(block_params(cfg, (cfg.first_kind,)), cfg.first_dense, None)
    if not cfg.tie_embeddings:
        params['head'] = vocab_matrix(cfg, cfg.d_model**-0.5)
    return params


def declared_params(config: ConfigDict) -> Tree:
    """Declares every parameter of a config's model, laid out for the pipeline's chunks."""
    return model_params(model_config(config), config.pipeline.chunks)


def input_ids(tokens_BT: Array) -> Array:
    """Returns the inputs of rows of tokens, [B, T + 1] -> [B, T], -1 where there is none.

    In rows, -2 - id stands for an id that is an input and no target.
    """
    ids_BT = tokens_BT[:, :-1]
    return jnp.where(ids_BT < -1, -2 - ids_BT, ids_BT)


def first_layers(params: Tree, ids_BT: Array, cfg: ModelConfig, key: Array) -> Array:
    """Runs embedding and the dense layers before the blocks: int32 [B, T] -> [B, T/tp, D].

    An id of -1, which is no token, has the embedding of token 0.
    """
    x_BtD = embed(params['embed'], zigzag(jnp.maximum(ids_BT, 0), CP, 1), cfg)
    x_BtD = dropout(x_BtD, cfg.dropout, jax.random.fold_in(key, cfg.n_layers))
    if cfg.first_dense:
        tables, kinds = position_tables(ids_BT, cfg), (cfg.first_kind,)
        x_BtD, _ = run_blocks(params['first'], x_BtD, tables, key, cfg, kinds)
    return x_BtD


def position_tables(ids_BT: Array, cfg: ModelConfig) -> Tables:
    """Returns the rotations and documents of these tokens, for each kind of layer.

    With cfg.padded, also which positions of this device hold a token: ids of -1 are none.
    """
    tables = tables_of(cfg, functools.partial(positions, ids_BT))
    if not cfg.padded:
        return tables
    held_Bt = own_positions(ids_BT >= 0, 1)
    return {rotary: table._replace(held=held_Bt) for rotary, table in tables.items()}


def hidden_states(params: Tree, ids_BT: Array, cfg: ModelConfig, key: Array) -> tuple[Array, Tree]:
    """Runs all layers: ids of all positions, int32 [B, T] -> [B, T/tp, D], and statistics."""
    x_BtD = first_layers(params, ids_BT, cfg, key)
    tables = position_tables(ids_BT, cfg)
    return run_blocks(params['blocks'], x_BtD, tables, key, cfg, cfg.block, cfg.first_dense)


def head_weight(params: Tree, cfg: ModelConfig) -> Array:
    """Gathers the output matrix of this tp device: [V/tp, D] in the compute type."""
    head = params['embed' if cfg.tie_embeddings else 'head']
    return unshard(head, vocab_matrix(cfg, 0), jnp.dtype(cfg.compute_dtype), cfg.fsdp_reduce)[
        'w_VD'
    ]


@jax.named_scope('head_and_loss')
def token_loss(params: Tree, x_tD: Array, labels_t: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """Returns `cross_entropy` of the last block's output for any tokens of this device: their
    hidden states [T, D] and labels [T]."""
    x_tD = rms_norm(x_tD, params['final_norm'], cfg.norm_eps)
    return cross_entropy(x_tD, head_weight(params, cfg), labels_t, cfg.z_loss, cfg.loss_chunk)


@jax.named_scope('head_and_scores')
def token_scores(
    params: Tree, x_tD: Array, labels_t: Array, cfg: ModelConfig
) -> tuple[Array, Array]:
    """Returns `label_scores` of the last block's output, as `token_loss` takes it."""
    x_tD = rms_norm(x_tD, params['final_norm'], cfg.norm_eps)
    return label_scores(x_tD, head_weight(params, cfg), labels_t, cfg.loss_chunk)


def loss(
    params: Tree, tokens_BT: Array, cfg: ModelConfig, key: Array
) -> tuple[Array, tuple[Array, Array, Tree]]:
    """Returns this device's share of the summed loss over valid targets; of its cross-entropy
    (nats); of the routers' losses, averaged over the microbatch; and the routers' statistics.

    tokens_BT: int32 [B, T + 1]; position t predicts t + 1, and a target below 0 is left out. `key`
    is for dropout: the same on all devices, different each step and microbatch.
    """
    ids_BT, labels_BT = input_ids(tokens_BT), tokens_BT[:, 1:]
    x_BtD, stats = hidden_states(params, ids_BT, cfg, key)
    labels_Bt = own_positions(labels_BT, 1)
    x_tD, labels_t = x_BtD.reshape(-1, cfg.d_model), labels_Bt.reshape(-1)
    total, nll = token_loss(params, x_tD, labels_t, cfg)
    router, stats = split_router_loss(stats)
    return total, (nll, router, stats)


def split_router_loss(stats: Tree) -> tuple[Array | float, Tree]:
    """Returns the sum of all layers' `loss`, and the other statistics."""
    total = sum(jnp.sum(s['loss']) for s in stats.values())
    others = {n: {k: v for k, v in s.items() if k != 'loss'} for n, s in stats.items()}
    return total, lax.stop_gradient(others)


def head_logits(params: Tree, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Computes logits from the last hidden states, [B, T, D]: float32 [B, T, V/tp]."""
    x_BTD = rms_norm(x_BTD, params['final_norm'], cfg.norm_eps)
    w_vD = head_weight(params, cfg)
    return jnp.einsum('btd,vd->btv', x_BTD, w_vD, preferred_element_type=jnp.float32)


def logits(params: Tree, ids_BT: Array, cfg: ModelConfig) -> Array:
    """Computes the logits of all positions, float32 [B, T, V/tp]: for tests and small models."""
    x_BtD, _ = hidden_states(params, ids_BT, cfg, jax.random.key(0))
    x_BTD = gather_zigzag(all_gather(x_BtD, TP, 1), CP, 1)
    return head_logits(params, x_BTD, cfg)


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Returns the useful FLOPs of forward and backward per token: 6 per weight that it meets, plus
    attention.

    The embedding lookup does no matmul, a tied head does. Attention counts the keys that a query
    sees (`keys_seen`), T/2 without a window: 3 · 2 · N · (H_qk + H_v) · T/2 per layer; of a linear
    layer `Sizes.work`.
    Recomputation is not counted (PaLM, appendix B).
    """
    params = model_params(cfg)
    if not cfg.tie_embeddings:
        del params['embed']
    matrices = [p for p in jax.tree.leaves(params, is_leaf=is_param) if p.matrix]
    kinds = [*cfg.block * cfg.n_blocks, *[cfg.first_kind] * cfg.first_dense]
    attention = sum(attention_work(of_layer(cfg, kind), seq_len) for kind in kinds)
    return 6.0 * count(matrices, active=True) + attention


def attention_work(cfg: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs per token of one layer's attention, forward and backward."""
    sizes = attention_sizes(cfg)
    if sizes.state:
        return 3 * sizes.work
    return 6 * cfg.n_heads * (sizes.key + sizes.value) * keys_seen(cfg, seq_len)


def keys_seen(cfg: ModelConfig, seq_len: int) -> float:
    """Returns how many keys a query of a layer sees, averaged over the positions of a sequence:
    T/2, or with a window of W below T, W - W²/2T."""
    W = min(cfg.window or seq_len, seq_len)
    return W - W**2 / (2 * seq_len)
