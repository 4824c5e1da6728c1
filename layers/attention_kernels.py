"""The kernels of causal attention for one device's heads: blockwise on any platform, and those that
ship in jax, splash attention on TPU and cuDNN's on GPU. ATTENTION_KERNELS lists them.

All take (q_BkGTH, k_BkSH, v_BkSH, documents_BT or None, scale, cfg, sinks_kG or None), with the
config of the layer (`config.of_layer`), and return [B, K, G, T, value head size]. What a query sees
stands once, in `mask.visible`.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, NamedSharding
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT, QKV, ModelConfig
from layers import latent_kernel
from layers.blockwise import MASKED, causal_attention
from layers.kernels import Kernel, never
from layers.mask import own_mask_errors
from layers.rope import Positions
from layers.rope_scaling import attention_scale
from parallel import CP, Array, P, Tree, local_slice, zigzag, zigzag_order

# ---------------------------------------------------------------------------------------------
# Splash attention, on TPU
# ---------------------------------------------------------------------------------------------

SPLASH_LANES = 128  # the sides of its blocks are multiples of this


def splash_blocks(T: int, S: int, cfg: ModelConfig) -> tuple[int, int]:
    """Returns the sizes of blocks of queries, and of keys in the backward pass.

    It leaves a gradient of all queries for each block of keys: large ones make fewer of these, and
    compute some blocks in vain.
    """
    size = min(cfg.attention_block, T if T == S else T // 2)
    return size, 2 * size if S % (2 * size) == 0 else size


def splash_partials(T: int, S: int, cfg: ModelConfig) -> int:
    """Returns how many gradients of all queries the backward pass has before it adds them."""
    return S // splash_blocks(T, S, cfg)[1]


def splash_attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BS: Array | None,
    scale: float,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Computes `causal_attention` by a Pallas kernel for TPU (jax's splash attention).

    Skips the blocks above the diagonal and before the window. Backward is one kernel of five
    matmuls, which leaves partial gradients of the queries to be added up (`splash_blocks`). Heads
    of 64 fill half of a matrix unit's 128 lanes, so MLA's values of 64 cost as much as 128 would;
    queries and keys may be wider than values. Output and log-sum-exp, which backward needs, are
    named ATTENTION_OUTPUT for rematerialization. Where cp cuts the sequence, the mask is that of
    its zigzag, of which each device takes its rows.
    """
    # Importing Pallas takes a second, which runs without it need not spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, K, G, T, H = q_BkGTH.shape
    S = k_BkSH.shape[2]
    devices = S // T  # of cp
    size, keys = splash_blocks(T, S, cfg)
    if cfg.window:
        mask = masks.LocalMask((S, S), (cfg.window - 1, 0), offset=0, shard_count=devices)
    else:
        mask = masks.CausalMask((S, S), shard_count=devices)
    mask.q_sequence = zigzag_order(S, devices)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (K * G)),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=keys,
            block_kv_dkv_compute=size,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=devices,
        residual_checkpoint_name=ATTENTION_OUTPUT,
        interpret=interpret,
    )
    if devices > 1:
        kernel = _own_queries(kernel, devices)
    q_BnTH = (q_BkGTH * scale).astype(q_BkGTH.dtype).reshape(B, K * G, T, H)
    segments = None
    if documents_BS is not None:
        own_BT = zigzag(documents_BS, CP, 1) if devices > 1 else documents_BS
        segments = splash.SegmentIds(own_BT, documents_BS)
    sinks_n = None if sinks_kG is None else sinks_kG.reshape(-1)
    attend = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))
    out_BnTH = attend(q_BnTH, k_BkSH, v_BkSH, segments, sinks_n)
    return out_BnTH.reshape(B, K, G, T, v_BkSH.shape[-1])


def _own_queries(kernel: Tree, devices: int) -> Tree:
    """Takes this device's rows of a splash kernel's mask for the queries of all devices of cp."""
    sharding = NamedSharding(AbstractMesh((devices,), (CP,)), P(None, CP))
    specs = kernel.manual_sharding_spec(sharding)

    def own(spec: P, x: Array) -> Array:
        for dim, axis in enumerate(spec):
            x = local_slice(x, axis, dim) if axis else x
        return x

    return jax.tree.map(own, specs, kernel, is_leaf=lambda x: isinstance(x, P))


def splash_rules(config: ConfigDict, _: int) -> Iterator[str]:
    """Yields errors for blocks and masks that splash attention does not take."""
    cp = config.mesh.cp
    if cp > 1 and config.cp_style == 'ring':
        yield (
            f"model.attention_kernel='splash' gives no sums that a ring could go on with, and "
            f"cp_style='ring' with mesh.cp={cp}; use cp_style='gather', or the kernel 'blockwise'"
        )
    block = min(config.model.attention_block, config.seq_len // (2 * cp if cp > 1 else 1))
    if block % SPLASH_LANES:
        yield (
            f'model.attention_block={config.model.attention_block} with seq_len={config.seq_len} '
            f'makes blocks of {block}, and splash takes multiples of {SPLASH_LANES}; use a '
            f'multiple of it that divides seq_len'
        )
    yield from own_mask_errors('splash', config)


# ---------------------------------------------------------------------------------------------
# cuDNN, on GPU
# ---------------------------------------------------------------------------------------------

CUDNN_FORWARD = 'dot_product_attention_fwd_wrapper'  # its primitive
CUDNN_HEAD = 128  # the largest head size that it takes on every GPU; on Hopper and later 256


def cudnn_attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BT: Array | None,
    scale: float,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
    implementation: str = 'cudnn',
) -> Array:
    """Computes `causal_attention` by cuDNN, in bfloat16 (`jax.nn.dot_product_attention`).

    Chooses blocks itself. Takes one head size only: values narrower than keys are padded with
    zeros, which for MLA costs the matmuls with values as much as those with keys. Documents become
    a mask of [B, 1, T, T], which cuDNN reads as a bias: B·T² numbers more, where blockwise and
    splash hold none. jax names no result of it, so what backward needs is kept by its primitive.
    Takes no sinks (`cudnn_rules`).
    """
    del sinks_kG
    B, K, G, T, H = q_BkGTH.shape
    v_dim, mask = v_BkSH.shape[-1], None
    v_BkSH = jnp.pad(v_BkSH, ((0, 0), (0, 0), (0, 0), (0, H - v_dim)))
    if documents_BT is not None:
        mask = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
    out_BTnH = jax.nn.dot_product_attention(
        q_BkGTH.reshape(B, K * G, T, H).swapaxes(1, 2),
        k_BkSH.swapaxes(1, 2),
        v_BkSH.swapaxes(1, 2),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=(cfg.window - 1, 0) if cfg.window else None,
        implementation=implementation,
    )
    return out_BTnH.swapaxes(1, 2)[..., :v_dim].reshape(B, K, G, T, v_dim)


def cudnn_rules(config: ConfigDict, head: int) -> Iterator[str]:
    """Yields errors for types, head sizes and masks that cuDNN does not take."""
    if config.mesh.cp > 1:
        yield (
            f"model.attention_kernel='cudnn' masks from the first query on, and mesh.cp="
            f"{config.mesh.cp} gives a device later ones; use the kernel 'blockwise'"
        )
    yield from own_mask_errors('cudnn', config)
    if config.model.attention_sinks:
        yield (
            "model.attention_kernel='cudnn' has no sinks, and model.attention_sinks=True; use the "
            "kernel 'blockwise'"
        )
    if config.compute_dtype != 'bfloat16':
        yield (
            f"model.attention_kernel='cudnn' does not take compute_dtype={config.compute_dtype!r}; "
            f"use 'bfloat16', or the kernel 'blockwise'"
        )
    if head % 8 or head > 2 * CUDNN_HEAD:
        yield (
            f"model.attention_kernel='cudnn' does not take heads of {head} for queries and keys; "
            f'use a multiple of 8 up to {CUDNN_HEAD} ({2 * CUDNN_HEAD} on Hopper and later), or '
            f"the kernel 'blockwise'"
        )
    if ATTENTION_OUTPUT in config.model.remat_offload:
        yield (
            f"model.remat_offload={config.model.remat_offload} has 'attention', and cuDNN's can be "
            f'kept but not offloaded; name it in model.remat_keep, or use '
            f"model.attention_kernel='blockwise'"
        )


def cudnn_chosen(_: ConfigDict, head: int) -> bool:
    """Returns whether every GPU's cuDNN takes heads of this size."""
    return head <= CUDNN_HEAD


# ---------------------------------------------------------------------------------------------
# Of latents, on TPU
# ---------------------------------------------------------------------------------------------


def attention_of_latents(
    q_BTR: Array,
    latent_BSR: Array,
    k_rope_BSH: Array,
    w: Tree,
    table: Positions,
    cfg: ModelConfig,
    interpret: bool = False,
) -> Array:
    """Computes `causal_attention` of the heads that `mla` makes of its latents: [B, N/tp, T, V].

    `w` has w_q, w_k_up and w_v_up, [size of a latent, N/tp, head size]; k_rope_BSH is the rotary
    key, and the table rotates queries. latent_kernel.py says what that spares.
    """
    front = [(0, 0), (0, 0), (cfg.nope_dim, 0)]
    heads_first = (y.swapaxes(0, 1) for y in (w['w_q'], w['w_k_up'], w['w_v_up']))
    w_q_nRH, w_k_nRH, w_v_nRH = heads_first
    w_k_nRH = jnp.pad(w_k_nRH, ((0, 0), (0, 0), (0, cfg.rope_dim)))
    x = latent_kernel.Latents(
        q_BTR, latent_BSR, jnp.pad(k_rope_BSH, front), w_q_nRH, w_k_nRH, w_v_nRH
    )
    (B, T, _), (N, _, H), V = q_BTR.shape, w_q_nRH.shape, w_v_nRH.shape[2]
    turn, scale = latent_kernel.rotation(table.cos, table.sin, H), attention_scale(cfg, H)
    out_BTO = latent_kernel.latent_attention(
        x, turn, cfg.rope_dim // 2, scale, min(cfg.attention_block, T), interpret
    )
    return out_BTO.reshape(B, T, N, V).swapaxes(1, 2)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

ATTENTION_KERNELS: dict[str, Kernel] = {
    'splash': Kernel(
        splash_attention, ('tpu',), checked=False, rules=splash_rules,
        elsewhere='splash_interpreted', partials=splash_partials,
    ),
    'splash_interpreted': Kernel(  # exact and slow, for tests
        functools.partial(splash_attention, interpret=True), (), checked=False, rules=splash_rules,
        partials=splash_partials,
    ),
    'cudnn': Kernel(
        cudnn_attention, ('gpu',), checked=False, rules=cudnn_rules, chosen=cudnn_chosen,
        keeps=CUDNN_FORWARD,
    ),
    'latent': Kernel(
        attention_of_latents, ('tpu',), rules=latent_kernel.latent_rules, chosen=never,
        elsewhere='latent_interpreted', latent=True,
    ),
    'latent_interpreted': Kernel(  # exact and slow, for tests
        functools.partial(attention_of_latents, interpret=True), (), checked=False,
        rules=latent_kernel.latent_rules, latent=True,
    ),
    'blockwise': Kernel(causal_attention, scores=True),
}  # fmt: skip
LATENT_KERNELS = tuple(name for name, kernel in ATTENTION_KERNELS.items() if kernel.latent)


# ---------------------------------------------------------------------------------------------
# For the layers
# ---------------------------------------------------------------------------------------------


def attention(
    q_BkGTH: Array,
    k_BkSH: Array,
    v_BkSH: Array,
    documents_BT: Array | None,
    cfg: ModelConfig,
    sinks_kG: Array | None = None,
) -> Array:
    """Computes `causal_attention` by the kernel that the config names."""
    q_BkGTH, k_BkSH, v_BkSH = checkpoint_name((q_BkGTH, k_BkSH, v_BkSH), QKV)
    scale = attention_scale(cfg, q_BkGTH.shape[-1])
    compute = ATTENTION_KERNELS[cfg.attention_kernel].compute
    return compute(q_BkGTH, k_BkSH, v_BkSH, documents_BT, scale, cfg, sinks_kG)


def cached_attention(
    q_BkGH: Array,
    cache: tuple[Array, Array],
    own: tuple[Array, Array],
    visible_BS: Array,
    scale: float,
    sinks_kG: Array | None = None,
) -> Array:
    """Computes the attention of one query per row: [B, K, G, value head size].

    It sees the cached entries that are visible (`cached_visible`), and its own. `cache` is
    (k_BkSH, v_BkSH), whose other entries may be anything finite; `own` is (k_BkH, v_BkH) of the
    query's position. All S positions are computed, so the time does not depend on how many are
    visible. Scores and softmax are float32.
    """
    (k_BkSH, v_BkSH), (own_k_BkH, own_v_BkH) = cache, own
    f32 = {'preferred_element_type': jnp.float32}
    scores_BkGS = jnp.einsum('bkgh,bksh->bkgs', q_BkGH, k_BkSH, **f32) * scale
    scores_BkGS = jnp.where(visible_BS[:, None, None], scores_BkGS, MASKED)
    own_BkG1 = (jnp.einsum('bkgh,bkh->bkg', q_BkGH, own_k_BkH, **f32) * scale)[..., None]
    top_BkG1 = jnp.maximum(jnp.max(scores_BkGS, axis=-1, keepdims=True), own_BkG1)
    if sinks_kG is not None:
        top_BkG1 = jnp.maximum(top_BkG1, sinks_kG[..., None])
    p_BkGS, own_p_BkG1 = jnp.exp(scores_BkGS - top_BkG1), jnp.exp(own_BkG1 - top_BkG1)
    out_BkGH = jnp.einsum('bkgs,bksh->bkgh', p_BkGS.astype(v_BkSH.dtype), v_BkSH, **f32)
    out_BkGH += own_p_BkG1 * own_v_BkH[:, :, None]
    total_BkG1 = jnp.sum(p_BkGS, axis=-1, keepdims=True) + own_p_BkG1
    if sinks_kG is not None:
        total_BkG1 += jnp.exp(sinks_kG[..., None] - top_BkG1)
    return (out_BkGH / total_BkG1).astype(q_BkGH.dtype)
