"""The model: embedding, layers in blocks, the loss. Dimension letters as in layers/dense.py."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT, RESIDUAL, ModelConfig
from layers.attention import ATTENTION, Positions, positions
from layers.attention_kernels import CUDNN_FORWARD, choose_kernel, key_size
from layers.dense import dropout, gain, rms_norm, swiglu, swiglu_params
from layers.expert_kernels import choose_expert_kernel
from layers.moe import moe, moe_params
from parallel import (
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
    is_param,
    local_slice,
    normal,
    pmax,
    psum,
    reduce_scatter,
    stacked,
    unshard,
)

# A layer's kind, as model.block names it, is its feed-forward part.
FEED_FORWARD: dict[str, tuple[Callable, Callable]] = {
    'dense': (lambda cfg: swiglu_params(cfg, cfg.d_ff), swiglu),
    'moe': (moe_params, moe),
}


def layer_params(cfg: ModelConfig, kind: str) -> Tree:
    return {
        'attention_norm': gain(cfg.d_model),
        'attention': ATTENTION[cfg.attention].params(cfg),
        'ffn_norm': gain(cfg.d_model),
        'ffn': FEED_FORWARD[kind][0](cfg),
    }


def layer(
    params: Tree,
    x_BTD: Array,
    attend: Callable[[Tree, Array], tuple[Array, Tree]],
    key: Array,
    cfg: ModelConfig,
    kind: str,
) -> tuple[Array, Tree, dict[str, Array]]:
    """One pre-norm layer, with `attend` (parameters, input) as its attention. x_BTD: [B, T/tp, D]
    -> the same, what attention keeps for decoding, and the feed-forward's statistics."""
    h_BTD = rms_norm(x_BTD, params['attention_norm'], cfg.norm_eps)
    with jax.named_scope('attention'):
        h_BTD, kept = attend(params['attention'], h_BTD)
    x_BTD = x_BTD + dropout(h_BTD, cfg.dropout, jax.random.fold_in(key, 0))
    x_BTD = checkpoint_name(x_BTD, RESIDUAL)
    h_BTD = rms_norm(x_BTD, params['ffn_norm'], cfg.norm_eps)
    with jax.named_scope(kind):
        h_BTD, stats = FEED_FORWARD[kind][1](params['ffn'], h_BTD, cfg)
    x_BTD = x_BTD + dropout(h_BTD, cfg.dropout, jax.random.fold_in(key, 1))
    return checkpoint_name(x_BTD, RESIDUAL), kept, stats


def block_names(kinds: tuple[str, ...]) -> list[str]:
    """Names of the layers of a block, in order: '0_dense', '1_moe', ..."""
    return [f'{i}_{kind}' for i, kind in enumerate(kinds)]


def _all_but_gathered_weights(prim, *_, **params) -> bool:
    return not (prim.name == 'all_gather' and FSDP in params['axis_name'])


REMAT = ('none', 'dots', 'full')


def remat_policy(cfg: ModelConfig) -> Callable:
    """What the backward pass finds saved. Of REMAT, 'dots' and 'full' go by names
    (layers.REMAT_NAMES), since linear layers differentiate themselves, which hides their matmuls
    from a policy. None saves a gathered weight: with FSDP all of them together are the whole model,
    so each is gathered again instead. Raises ValueError for attention by cuDNN, which is kept as a
    whole, if it is to be offloaded."""
    if cfg.remat == 'none':
        return _all_but_gathered_weights
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(cfg.kept_names),
        names_which_can_be_offloaded=list(cfg.remat_offload),
        offload_src='device',
        offload_dst='pinned_host',
    )
    if cfg.attention_kernel != 'cudnn':
        return by_name
    if ATTENTION_OUTPUT in cfg.remat_offload:
        raise ValueError(
            f"model.remat_offload={cfg.remat_offload} has 'attention', and cuDNN's can be kept but "
            f"not offloaded; name it in model.remat_keep, or use model.attention_kernel='blockwise'"
        )
    keep = ATTENTION_OUTPUT in cfg.kept_names
    return lambda prim, *args, **params: (
        (keep and prim.name == CUDNN_FORWARD) or by_name(prim, *args, **params)
    )


def run_blocks(
    blocks: Tree,
    x_BTD: Array,
    table: Positions,
    key: Array,
    cfg: ModelConfig,
    kinds: tuple[str, ...],
    first_layer: Array | int = 0,
) -> tuple[Array, Tree]:
    """A scan over stacked blocks of layers of these kinds, the first of them being layer number
    `first_layer` of the model. x_BTD: [B, T/tp, D] -> the same, and statistics by layer of the
    block: {name: {statistic: [blocks, ...]}}."""
    attend = functools.partial(ATTENTION[cfg.attention].forward, table=table, cfg=cfg)
    names = block_names(kinds)

    def one_layer(x_BTD: Array, scanned: tuple[Tree, Array], kind: str):
        params, number = scanned
        layer_key = jax.random.fold_in(key, number)
        x_BTD, _, stats = layer(params, x_BTD, attend, layer_key, cfg, kind)
        return x_BTD, stats

    def block(x_BTD: Array, scanned: tuple[Tree, Array]):
        params, index = scanned
        stats, start = {}, first_layer + index * len(kinds)
        for run in runs(kinds, params, cfg):
            f = functools.partial(one_layer, kind=kinds[run[0]])
            f = jax.checkpoint(f, policy=remat_policy(cfg), prevent_cse=False)
            layers = [(params[names[i]], jnp.asarray(start + i)) for i in run]
            with jax.named_scope(f'layer_{names[run[0]]}' + f'_x{len(run)}' * (len(run) > 1)):
                x_BTD, found = run_layers(f, x_BTD, layers)
            stats |= {names[i]: s for i, s in zip(run, found, strict=True) if s}
        return x_BTD, stats

    n_blocks = jax.tree.leaves(blocks)[0].shape[0]
    return lax.scan(block, x_BTD, (blocks, jnp.arange(n_blocks)))


def run_layers(f: Callable, x_BTD: Array, layers: list[Tree]) -> tuple[Array, list[Tree]]:
    """f over layers of one kind, several of them in a scan: the last output, and statistics."""
    if len(layers) == 1:
        x_BTD, stats = f(x_BTD, layers[0])
        return x_BTD, [stats]
    x_BTD, stacked_stats = lax.scan(f, x_BTD, jax.tree.map(lambda *x: jnp.stack(x), *layers))
    at = lambda i: jax.tree.map(lambda x: x[i], stacked_stats)  # noqa: E731
    return x_BTD, [at(i) for i in range(len(layers))]


def runs(kinds: tuple[str, ...], params: Tree, cfg: ModelConfig) -> list[list[int]]:
    """A block's layers, those of one kind in a row together: they are scanned, so that the program
    has one of them. That takes a copy of their shards. Weights whose gradient is deferred leave
    activations beside them, which are not worth copying: there each layer is alone. So it is with
    offloading: XLA's compiler for GPUs refuses what lies in host memory in a scan within a scan.
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
# Vocabulary: embedding and loss
# ---------------------------------------------------------------------------------------------


def vocab_matrix(cfg: ModelConfig, std: float) -> Tree:
    return {'w_VD': Param((cfg.vocab_size, cfg.d_model), P(TP, FSDP), normal(std))}


@jax.named_scope('embed')
def embed(params: Tree, ids_BT: Array, cfg: ModelConfig) -> Array:
    """Embedding rows of ids_BT (all positions) -> x_BTD for the local positions [B, T/tp, D].

    Each tp device looks up the rows that it holds and adds zeros for the others. The lookup runs
    in float32, since its backward adds up all gradients of a token's row.
    """
    w_VD = unshard(params, vocab_matrix(cfg, 0), jnp.dtype(cfg.compute_dtype))['w_VD']
    row_BT = ids_BT - lax.axis_index(TP) * w_VD.shape[0]
    here_BT = (row_BT >= 0) & (row_BT < w_VD.shape[0])
    x_BTD = w_VD.astype(jnp.float32)[jnp.where(here_BT, row_BT, 0)]
    x_BTD = jnp.where(here_BT[..., None], x_BTD, 0).astype(w_VD.dtype)
    return reduce_scatter(x_BTD, TP, 1)  # B T D -> B T/tp D


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    x_TD: Array, w_VD: Array, labels_T: Array, z_loss: float, chunk: int
) -> tuple[Array, Array]:
    """This device's share of Σ (-log p(label) + z_loss · logsumexp²), and of the first term alone.

    x_TD holds the tokens of this tp device, w_VD the rows of its part of the vocabulary; labels
    of -1 are left out. Logits are [chunk · tp, V/tp] at a time: B·T·V of them never exist. Where
    gradients are wanted, the forward pass computes them chunk by chunk, since d logits follow
    from the logits at once: three matmuls in all, where rematerialization takes four. Only the
    first result is differentiable. z-loss: PaLM, section 5.
    """
    return _cross_entropy(x_TD, w_VD, labels_T, z_loss, chunk, with_grads=False)[0]


def _cross_entropy(x_TD, w_VD, labels_T, z_loss: float, chunk: int, with_grads: bool):
    n_chunks = -(-x_TD.shape[0] // chunk)
    while x_TD.shape[0] % n_chunks:
        n_chunks += 1
    first_row = lax.axis_index(TP) * w_VD.shape[0]
    rows_V = first_row + jnp.arange(w_VD.shape[0])

    def step(carry: tuple, inputs: tuple[Array, Array]):
        total, nll_total, dw_VD = carry
        x_TD, labels_T = all_gather(inputs[0], TP, 0), all_gather(inputs[1], TP, 0)
        logits_TV = jnp.einsum('td,vd->tv', x_TD, w_VD, preferred_element_type=jnp.float32)
        is_label_TV = labels_T[:, None] == rows_V
        top_T = pmax(jnp.max(logits_TV, axis=-1), TP)
        exp_TV = jnp.exp(logits_TV - top_T[:, None])
        row_T = jnp.clip(labels_T - first_row, 0, w_VD.shape[0] - 1)
        label_logit_T = jnp.take_along_axis(logits_TV, row_T[:, None], axis=1)[:, 0]
        label_logit_T = jnp.where(rows_V[row_T] == labels_T, label_logit_T, 0)
        sum_T, label_logit_T = psum(jnp.stack((jnp.sum(exp_TV, axis=-1), label_logit_T)), TP)
        logsumexp_T = top_T + jnp.log(sum_T)
        valid_T = labels_T >= 0
        nll_T = jnp.where(valid_T, logsumexp_T - label_logit_T, 0)
        z_T = jnp.where(valid_T, z_loss * jnp.square(logsumexp_T), 0)
        nll = jnp.sum(nll_T)
        total, nll_total = total + nll + jnp.sum(z_T), nll_total + nll
        if not with_grads:
            return (total, nll_total, dw_VD), None
        scale_T = jnp.where(valid_T, (1 + 2 * z_loss * logsumexp_T) / sum_T, 0)

        def d_logits(exp_TV: Array) -> Array:
            return (exp_TV * scale_T[:, None] - is_label_TV).astype(x_TD.dtype)

        # exp is evaluated and written once, in the compute type. On TPU each of the two matmuls
        # then makes its d logits from it as it reads, and none are written, if they look like two.
        exp_TV = lax.optimization_barrier(exp_TV.astype(x_TD.dtype))
        dx_TD = reduce_scatter(jnp.einsum('tv,vd->td', d_logits(exp_TV), w_VD), TP, 0)
        d_logits_TV = d_logits(
            lax.platform_dependent(exp_TV, tpu=lax.optimization_barrier, default=lambda x: x)
        )
        dw_VD += jnp.einsum('tv,td->vd', d_logits_TV, x_TD, preferred_element_type=jnp.float32)
        return (total, nll_total, dw_VD), dx_TD

    split = functools.partial(jnp.reshape, shape=(n_chunks, -1))
    chunks = (x_TD.reshape(n_chunks, -1, x_TD.shape[-1]), split(labels_T))
    zero = jnp.zeros_like(x_TD, dtype=jnp.float32, shape=())
    dw_VD = jnp.zeros_like(w_VD, dtype=jnp.float32) if with_grads else ()
    (total, nll, dw_VD), dx_TD = lax.scan(step, (zero, zero, dw_VD), chunks)
    tp = lax.axis_size(TP)  # all tp devices found the same sums: each takes an equal share
    if with_grads:
        dx_TD = dx_TD.reshape(x_TD.shape)
    return (total / tp, nll / tp), (dx_TD, dw_VD)


def _cross_entropy_forward(x_TD, w_VD, labels_T, z_loss: float, chunk: int):
    shares, (dx_TD, dw_VD) = _cross_entropy(x_TD, w_VD, labels_T, z_loss, chunk, with_grads=True)
    return shares, (dx_TD, dw_VD.astype(w_VD.dtype))


def _cross_entropy_backward(z_loss: float, chunk: int, grads: tuple, cotangents: tuple):
    dx_TD, dw_VD = grads
    scale = psum(cotangents[0], TP) / lax.axis_size(TP)
    return (dx_TD * scale).astype(dx_TD.dtype), (dw_VD * scale).astype(dw_VD.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def block_params(cfg: ModelConfig, kinds: tuple[str, ...]) -> Tree:
    names = block_names(kinds)
    return {name: layer_params(cfg, kind) for name, kind in zip(names, kinds, strict=True)}


def model_params(cfg: ModelConfig, chunks: int = 1) -> Tree:
    """The declaration of every parameter of the model; `chunks` as in `stacked`."""
    params = {
        'embed': vocab_matrix(cfg, 0.02),
        'blocks': stacked(block_params(cfg, cfg.block), cfg.n_blocks, PP, chunks),
        'final_norm': gain(cfg.d_model),
    }
    if cfg.first_dense:
        params['first'] = stacked(block_params(cfg, ('dense',)), cfg.first_dense, None)
    if not cfg.tie_embeddings:
        params['head'] = vocab_matrix(cfg, cfg.d_model**-0.5)
    return params


def first_layers(params: Tree, ids_BT: Array, cfg: ModelConfig, key: Array) -> Array:
    """Embedding and the dense layers before the blocks: int32 [B, T] -> x_BTD: [B, T/tp, D]."""
    x_BTD = embed(params['embed'], ids_BT, cfg)
    x_BTD = dropout(x_BTD, cfg.dropout, jax.random.fold_in(key, cfg.n_layers))
    if cfg.first_dense:
        x_BTD, _ = run_blocks(params['first'], x_BTD, positions(ids_BT, cfg), key, cfg, ('dense',))
    return x_BTD


def hidden_states(params: Tree, ids_BT: Array, cfg: ModelConfig, key: Array) -> tuple[Array, Tree]:
    """ids_BT: int32 [B, T], all positions -> the last x_BTD: [B, T/tp, D], and statistics."""
    x_BTD = first_layers(params, ids_BT, cfg, key)
    table = positions(ids_BT, cfg)
    return run_blocks(params['blocks'], x_BTD, table, key, cfg, cfg.block, cfg.first_dense)


def head_weight(params: Tree, cfg: ModelConfig) -> Array:
    """The output matrix w_VD of this tp device, gathered: [V/tp, D] in the compute type."""
    head = params['embed' if cfg.tie_embeddings else 'head']
    return unshard(head, vocab_matrix(cfg, 0), jnp.dtype(cfg.compute_dtype))['w_VD']


@jax.named_scope('head_and_loss')
def token_loss(params: Tree, x_TD: Array, labels_T: Array, cfg: ModelConfig) -> tuple[Array, Array]:
    """`cross_entropy` of the last block's output, any tokens of this device: [T, D] and [T]."""
    x_TD = rms_norm(x_TD, params['final_norm'], cfg.norm_eps)
    return cross_entropy(x_TD, head_weight(params, cfg), labels_T, cfg.z_loss, cfg.loss_chunk)


def loss(
    params: Tree, tokens_BT: Array, cfg: ModelConfig, key: Array
) -> tuple[Array, tuple[Array, Array, Tree]]:
    """This device's share of the summed loss over valid targets; of its cross-entropy (nats); of
    the routers' losses, averaged over the microbatch; and the routers' statistics.

    tokens_BT: int32 [B, T + 1]; position t predicts t + 1, and a target of -1 is left out. `key`
    is for dropout: the same on all devices, different each step and microbatch.
    """
    ids_BT, labels_BT = jnp.maximum(tokens_BT[:, :-1], 0), tokens_BT[:, 1:]
    x_BTD, stats = hidden_states(params, ids_BT, cfg, key)
    labels_BT = local_slice(labels_BT, TP, 1)  # B T -> B T/tp
    x_TD, labels_T = x_BTD.reshape(-1, cfg.d_model), labels_BT.reshape(-1)
    total, nll = token_loss(params, x_TD, labels_T, cfg)
    router, stats = split_router_loss(stats)
    return total, (nll, router, stats)


def split_router_loss(stats: Tree) -> tuple[Array | float, Tree]:
    """The sum of all layers' `loss`, and the other statistics."""
    total = sum(jnp.sum(s['loss']) for s in stats.values())
    others = {n: {k: v for k, v in s.items() if k != 'loss'} for n, s in stats.items()}
    return total, lax.stop_gradient(others)


def head_logits(params: Tree, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Logits of the last x_BTD, all positions [B, T, D]: float32 [B, T, V/tp]."""
    x_BTD = rms_norm(x_BTD, params['final_norm'], cfg.norm_eps)
    w_VD = head_weight(params, cfg)
    return jnp.einsum('btd,vd->btv', x_BTD, w_VD, preferred_element_type=jnp.float32)


def logits(params: Tree, ids_BT: Array, cfg: ModelConfig) -> Array:
    """Logits of all positions, float32 [B, T, V/tp]: for tests and small models."""
    x_BTD, _ = hidden_states(params, ids_BT, cfg, jax.random.key(0))
    return head_logits(params, all_gather(x_BTD, TP, 1), cfg)  # B T/tp D -> B T D


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Useful FLOPs of forward and backward for a token: 6 a weight that it meets, plus attention.

    The embedding lookup does no matmul, a tied head does. Causal attention counts half of T²:
    3 · 2 · N · (H_qk + H_v) · T/2 a layer. Recomputation is not counted (PaLM, appendix B).
    """
    params = model_params(cfg)
    if not cfg.tie_embeddings:
        del params['embed']
    matrices = [p for p in jax.tree.leaves(params, is_leaf=is_param) if p.matrix]
    if cfg.attention == 'mla':
        head_dims = cfg.nope_dim + cfg.rope_dim + cfg.v_dim
    else:
        head_dims = 2 * cfg.head_dim
    attention = 3 * cfg.n_layers * cfg.n_heads * head_dims * seq_len
    return 6.0 * count(matrices, active=True) + attention


def model_config(config: ConfigDict, platform: str = 'cpu') -> ModelConfig:
    """The model's sizes and choices, with the kernels for devices of this platform."""
    fields = dict(config.model) | {'compute_dtype': config.compute_dtype}
    fields['attention_kernel'] = choose_kernel(
        config.model.attention_kernel, platform, config.check_vma, config.compute_dtype,
        key_size(config.model),
    )  # fmt: skip
    fields['expert_kernel'] = choose_expert_kernel(
        config.model.expert_kernel, platform, config.check_vma
    )
    return ModelConfig(**fields)


def declared_params(config: ConfigDict) -> Tree:
    """The declaration of every parameter, laid out for the pipeline's chunks."""
    return model_params(model_config(config), config.pipeline.chunks)
