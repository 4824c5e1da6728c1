"""Rotation of queries and keys by their positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parallel import Array


class Positions(NamedTuple):
    """Rotations and documents of the tokens of a batch, and which of them there are."""

    cos: Array  # of the rotation angles, times YaRN's factor: float32 [T, rotary / 2], or [B, 1, T,
    sin: Array  # rotary / 2]
    # [B, S] the number of each token's document, of all positions of a row; None: all are one
    documents: Array | None = None
    # [B, T/tp] the positions of this device that hold a token, for experts; None: all do
    held: Array | None = None
    # [B] the positions of each row that count, its first ones, for a state; None: all
    lengths: Array | None = None


def rope(x: Array, table: Positions) -> Array:
    """Rotates pairs of [..., T, H] by their position's angles (RoFormer, Su et al. 2021).

    The last dimensions, twice as many as the table is wide, are paired as (i, i + half of them);
    those before them stay as they are. A table of width 0 leaves x as it is.
    """
    if not table.cos.shape[-1]:
        return x
    return _rotate(x, table.cos, table.sin)


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@jax.custom_vjp
def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    return lax.platform_dependent(x, cos, sin, tpu=_rotate_whole, default=_rotate_parts)


def _rotate_parts(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates by slicing heads into parts."""
    half = cos.shape[-1]
    first, a, b = jnp.split(x, (x.shape[-1] - 2 * half, x.shape[-1] - half), axis=-1)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    a, b = a * cos - b * sin, b * cos + a * sin
    return jnp.concatenate((first, a.astype(x.dtype), b.astype(x.dtype)), axis=-1)


def _rotate_whole(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates by a matmul with a signed permutation, which is exact and keeps heads whole.

    Parts of a head would each take up the 128 lanes of a TPU's registers and memory tiles: slicing
    and joining them cost several times the rotation.
    """
    H, half = x.shape[-1], cos.shape[-1]
    a = np.arange(H - 2 * half, H - half)
    exchange_HH = np.zeros((H, H))
    exchange_HH[a + half, a], exchange_HH[a, a + half] = -1, 1
    exchanged = jnp.einsum(
        '...h,hi->...i',
        x,
        exchange_HH.astype(x.dtype),
        precision='highest' if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    front = [(0, 0)] * (cos.ndim - 1) + [(H - 2 * half, 0)]
    cos = jnp.pad(jnp.concatenate((cos, cos), axis=-1), front, constant_values=1)
    sin = jnp.pad(jnp.concatenate((sin, sin), axis=-1), front)
    return (x.astype(jnp.float32) * cos + exchanged * sin).astype(x.dtype)


def _rotate_forward(x: Array, cos: Array, sin: Array):
    return _rotate(x, cos, sin), (cos, sin)


def _rotate_backward(saved: tuple[Array, Array], d: Array):
    cos, sin = saved
    return _rotate(d, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)
