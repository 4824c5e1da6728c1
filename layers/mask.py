"""The mask of attention: which keys a query sees, in training, prefill and decoding alike."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from config import ModelConfig, model_config
from parallel import Array


def visible(
    q_position: Array,
    k_position: Array,
    q_document: Array | None,
    k_document: Array | None,
    cfg: ModelConfig | ConfigDict,
) -> Array:
    """Returns whether queries see keys: the one mask of training, prefill and decoding.

    Positions count from the start of a row; documents are numbers, or None where all is one. Shapes
    are broadcast. In a layer with a window a query sees so many positions, its own and those right
    before it. An edit here changes all three alike; a query must see itself and nothing later.
    Kernels with a mask of their own are then refused, and 'auto' takes blockwise
    (`own_mask_errors`). Blockwise skips what is later than a query or before its window.
    """
    seen = q_position >= k_position
    if cfg.window:
        seen &= q_position - k_position < cfg.window
    return seen if q_document is None else seen & (q_document == k_document)


def cached_visible(positions_B: Array, starts_B: Array, S: int, cfg: ModelConfig) -> Array:
    """Returns which entries of a cache of S the query at each row's position sees: bool [B, S].

    Its document began at the position `starts`. Its own entry is not in the cache yet.
    """
    k_BS = cached_positions(positions_B, S)
    before_BS = (k_BS < starts_B[:, None]).astype(jnp.int32)  # 1: another document
    seen_BS = visible(positions_B[:, None], k_BS, 0, before_BS, cfg)
    return seen_BS & (k_BS >= 0)


def cached_positions(lengths_B: Array, S: int) -> Array:
    """Returns the positions in a cache of S entries, after so many positions: int32 [B, S].

    Position p is entry p modulo S, so the cache holds the last S positions. Entries that hold none
    yet have negative numbers.
    """
    last_B1 = lengths_B[:, None] - 1
    return last_B1 - (last_B1 - jnp.arange(S)) % S


def cache_size(context: int, cfg: ModelConfig) -> int:
    """Counts the positions that a layer's cache holds, of a context of so many."""
    return min(cfg.window, context) if cfg.window else context


def own_mask_errors(kernel: str, config: ConfigDict) -> Iterator[str]:
    """Yields an error if `visible` is not the mask that the kernel computes by itself: causal, and
    within the layer's window.

    Looks at the first query and the last one, which sees keys at all distances.
    """
    cfg = dataclasses.replace(model_config(config), cp=1)  # the mask is that of whole sequences
    if not _is_own_mask(visible, config.seq_len, cfg):
        yield (
            f'model.attention_kernel={kernel!r} computes a causal mask of its own, and '
            f"mask.visible another one; use the kernel 'blockwise'"
        )


@functools.cache
def _is_own_mask(mask: Callable[..., Array], seq_len: int, cfg: ModelConfig) -> bool:
    """Returns whether a mask is causal, and within the layer's window; once, since it takes long
    for long sequences."""
    q, k = np.array([[0], [seq_len - 1]]), np.arange(seq_len)
    for documents in ((None, None), (0, k % 2)):
        own = (q >= k) & (True if documents[0] is None else documents[1] == 0)
        own &= q - k < (cfg.window or seq_len)
        if not np.array_equal(mask(q, k, *documents, cfg), own):
            return False
    return True
