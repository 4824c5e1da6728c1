"""Causal attention by the kernels that ship in jax: splash attention on TPU, cuDNN's on GPU.

Both take and return what `attention.causal_attention` does, which is the blockwise form for any
platform and needs no kernel. They carry no replication types, so shard_map must not check them
(check_vma off). Dimension letters as in layers.py.
"""

import jax
import jax.numpy as jnp

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
