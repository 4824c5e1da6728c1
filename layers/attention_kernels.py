"""Causal attention by the kernels that ship in jax: splash attention on TPU, cuDNN's on GPU.

Both take and return what `attention.causal_attention` does, which is the blockwise form for any
platform and needs no kernel. They carry no replication types, so shard_map must not check them
(check_vma off). Dimension letters as in layers/dense.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import ATTENTION_OUTPUT, QKV, ModelConfig
from parallel import Array

AUTO = {'tpu': 'splash', 'gpu': 'cudnn'}


KERNELS = ('blockwise', 'splash', 'cudnn')


CUDNN_FORWARD = 'dot_product_attention_fwd_wrapper'  # the primitive: jax names none of its results


CUDNN_HEAD = 128  # the largest head size that it takes on every GPU; on Hopper and later 256


SPLASH_LANES = 128  # splash attention works on blocks whose sides are multiples of this


def choose_kernel(
    name: str, platform: str, check_vma: bool, compute_dtype: str, head_size: int
) -> str:
    """The kernel that model.attention_kernel means on devices of this platform.

    'auto' is the platform's own kernel, and blockwise where there is none, where shard_map checks
    replication types, or where cuDNN would have to take what it does not: float32, or heads (of
    queries and keys) that are wide or no multiple of 8. Splash on another platform than TPU is
    interpreted: exact and slow, for tests.
    """
    if name == 'auto':
        name = AUTO.get(platform, 'blockwise')
        fits = compute_dtype == 'bfloat16' and head_size % 8 == 0 and head_size <= CUDNN_HEAD
        if check_vma or (name == 'cudnn' and not fits):
            name = 'blockwise'
    return 'splash_interpreted' if name == 'splash' and platform != 'tpu' else name


def splash_attention(
    q_BKGTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    documents_BT: Array | None,
    scale: float,
    block: int,
    saved_name: str,
    interpret: bool,
) -> Array:
    """FlashAttention as a Pallas kernel for TPU, forward and backward (jax's splash attention).

    Blocks above the diagonal are skipped. Backward is one kernel of five matmuls, which leaves a
    dq for each block of keys to be added up. Heads of 64 fill half of a matrix unit's 128 lanes,
    so MLA's values of 64 cost as much as 128 would; queries and keys may be wider than values.
    What backward needs of the result (output and log-sum-exp) is named `saved_name` for remat.
    """
    # Importing Pallas takes a second, which runs without it need not spend.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, K, G, T, H = q_BKGTH.shape
    size = min(block, T)
    keys = 2 * size if T % (2 * size) == 0 else size  # fewer partial dq, some blocks in vain
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((T, T))] * (K * G)),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=keys,
            block_kv_dkv_compute=size,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=saved_name,
        interpret=interpret,
    )
    q_BNTH = (q_BKGTH * scale).astype(q_BKGTH.dtype).reshape(B, K * G, T, H)
    if documents_BT is None:
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    else:
        segments = splash.SegmentIds(documents_BT, documents_BT)
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.reshape(B, K, G, T, v_BKSH.shape[-1])


def cudnn_attention(
    q_BKGTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    documents_BT: Array | None,
    scale: float,
    implementation: str = 'cudnn',
) -> Array:
    """cuDNN's fused attention, in bfloat16 (`jax.nn.dot_product_attention`).

    Takes one head size only: values narrower than keys are padded with zeros, which for MLA costs
    the matmuls with values as much as those with keys. Documents become a mask of [B, 1, T, T],
    which cuDNN reads as a bias: B·T² numbers more, where blockwise and splash hold none. What
    backward needs of the result is kept by `model.remat_policy`, which knows `CUDNN_FORWARD`.
    """
    B, K, G, T, H = q_BKGTH.shape
    v_dim, mask = v_BKSH.shape[-1], None
    v_BKSH = jnp.pad(v_BKSH, ((0, 0), (0, 0), (0, 0), (0, H - v_dim)))
    if documents_BT is not None:
        mask = (documents_BT[:, :, None] == documents_BT[:, None, :])[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BKGTH.reshape(B, K * G, T, H).swapaxes(1, 2),
        k_BKSH.swapaxes(1, 2),
        v_BKSH.swapaxes(1, 2),
        mask=mask,
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )
    return out_BTNH.swapaxes(1, 2)[..., :v_dim].reshape(B, K, G, T, v_dim)


def key_size(cfg: ModelConfig | ConfigDict) -> int:
    """The head size of queries and keys, of a model's config in either form."""
    return cfg.nope_dim + cfg.rope_dim if cfg.attention == 'mla' else cfg.head_dim


def attention_scale(cfg: ModelConfig) -> float:
    """1/√H; YaRN sharpens it by (0.1·ln(factor) + 1)² (Peng et al. 2023, section 3.4)."""
    sharpen = 0.1 * math.log(cfg.rope_factor) + 1 if cfg.rope_scaling == 'yarn' else 1.0
    return sharpen**2 / math.sqrt(key_size(cfg))


_MASKED = -1e30  # finite, so that a row without a visible key in one block yields no NaN


def _lower_triangle(T: int, block: int) -> tuple[int, np.ndarray]:
    """The pairs (query block, key block) on and below the diagonal: int32 [n(n+1)/2, 2]."""
    block = min(block, T)
    if T % block:
        raise ValueError(
            f'seq_len={T} is not a multiple of model.attention_block={block}; '
            f'use an attention_block that divides it'
        )
    n = T // block
    return block, np.array([(i, j) for i in range(n) for j in range(i + 1)], np.int32)


def _block(x: Array, i: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=-2)


def _put(x: Array, i: Array, value: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, value, i * value.shape[-2], axis=-2)


def _scores(q: Array, k: Array, documents: Array | None, i: Array, j: Array, scale: float) -> Array:
    """Masked scores of one pair of blocks, float32 [B, K, G, block, block]."""
    block = q.shape[-2]
    within = jnp.arange(block)
    visible = (i * block + within)[:, None] >= j * block + within
    if documents is not None:
        of_q, of_k = (lax.dynamic_slice_in_dim(documents, n * block, block, 1) for n in (i, j))
        visible &= (of_q[:, :, None] == of_k[:, None, :])[:, None, None]
    scores = jnp.einsum('bkgth,bksh->bkgts', q, k, preferred_element_type=jnp.float32)
    return jnp.where(visible, scores * scale, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def causal_attention(
    q_BKGTH: Array,
    k_BKSH: Array,
    v_BKSH: Array,
    documents_BT: Array | None,
    scale: float,
    block: int,
) -> Array:
    """softmax(scale · q kᵀ + mask) v -> [B, K, G, T, value head size]; the mask shows what is not
    later and, where documents are numbered, in the same one.

    Blockwise with a running maximum and sum (FlashAttention-2, Dao 2023): one scan over the pairs
    of blocks on and below the diagonal, so the program does not grow with T, blocks above the
    diagonal cost nothing, and no score array exceeds B·N·block². The backward pass recomputes the
    scores from the saved log-sum-exp. Scores and softmax are float32 whatever the inputs are.
    """
    return _attention_forward(q_BKGTH, k_BKSH, v_BKSH, documents_BT, scale, block)[0]


def _attention_forward(q, k, v, documents: Array | None, scale: float, block: int):
    block, pairs = _lower_triangle(q.shape[-2], block)

    def step(carry: tuple, pair: Array):
        out, top, total = carry
        i, j = pair
        scores = _scores(_block(q, i, block), _block(k, j, block), documents, i, j, scale)
        old_top = _block(top, i, block)
        new_top = jnp.maximum(old_top, jnp.max(scores, axis=-1, keepdims=True))
        p = jnp.exp(scores - new_top)
        shrink = jnp.exp(old_top - new_top)
        pv = jnp.einsum(
            'bkgts,bksh->bkgth',
            p.astype(v.dtype),
            _block(v, j, block),
            preferred_element_type=jnp.float32,
        )
        out = _put(out, i, _block(out, i, block) * shrink + pv)
        total = _put(total, i, _block(total, i, block) * shrink + jnp.sum(p, -1, keepdims=True))
        return (out, _put(top, i, new_top), total), None

    rows = q.shape[:-1]
    zeros = functools.partial(jnp.zeros_like, q, dtype=jnp.float32)
    start = (zeros(shape=(*rows, v.shape[-1])), zeros(shape=(*rows, 1)) + _MASKED)
    (out, top, total), _ = lax.scan(step, (*start, zeros(shape=(*rows, 1))), pairs)
    out = checkpoint_name((out / total).astype(q.dtype), ATTENTION_OUTPUT)
    logsumexp = checkpoint_name(top + jnp.log(total), ATTENTION_OUTPUT)
    return out, (q, k, v, documents, out, logsumexp)


def _attention_backward(scale: float, block: int, saved: tuple, d_out: Array):
    q, k, v, documents, out, logsumexp = saved
    block, pairs = _lower_triangle(q.shape[-2], block)
    f32 = {'preferred_element_type': jnp.float32}
    delta = jnp.einsum('...h,...h->...', out, d_out, **f32)[..., None]

    def step(carry: tuple, pair: Array):
        dq, dk, dv = carry
        i, j = pair
        q_i, k_j, v_j = _block(q, i, block), _block(k, j, block), _block(v, j, block)
        do_i = _block(d_out, i, block)
        p = jnp.exp(_scores(q_i, k_j, documents, i, j, scale) - _block(logsumexp, i, block))
        dp = jnp.einsum('bkgth,bksh->bkgts', do_i, v_j, **f32)
        ds = (p * (dp - _block(delta, i, block)) * scale).astype(q.dtype)
        p = p.astype(q.dtype)
        dq_i = jnp.einsum('bkgts,bksh->bkgth', ds, k_j, **f32)
        dk_j = jnp.einsum('bkgts,bkgth->bksh', ds, q_i, **f32)
        dv_j = jnp.einsum('bkgts,bkgth->bksh', p, do_i, **f32)
        dq = _put(dq, i, _block(dq, i, block) + dq_i)
        dk = _put(dk, j, _block(dk, j, block) + dk_j)
        dv = _put(dv, j, _block(dv, j, block) + dv_j)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    (dq, dk, dv), _ = lax.scan(step, start, pairs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


causal_attention.defvjp(_attention_forward, _attention_backward)


def attention(
    q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, documents_BT: Array | None, cfg: ModelConfig
) -> Array:
    """`causal_attention`, by the kernel that the config chooses."""
    qkv = checkpoint_name((q_BKGTH, k_BKSH, v_BKSH), QKV)
    inputs = (*qkv, documents_BT, attention_scale(cfg))
    if cfg.attention_kernel == 'blockwise':
        return causal_attention(*inputs, cfg.attention_block)
    if cfg.attention_kernel == 'cudnn':
        return cudnn_attention(*inputs)
    interpret = cfg.attention_kernel == 'splash_interpreted'
    return splash_attention(*inputs, cfg.attention_block, ATTENTION_OUTPUT, interpret)
