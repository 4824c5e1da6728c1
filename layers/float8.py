"""Matmuls of weights in 8-bit floating point (model.matmul_type='fp8'; Micikevicius et al. 2022).

Weights and activations are rounded to e4m3 (3 bits of mantissa), gradients of activations to e5m2
(2 bits); products are summed in float32 and rounded to the compute type. The scales are computed
from the numbers that they scale, so a step stays a function of its inputs: one scale a weight
matrix, one a token for activations and their gradients, so that no token's numbers depend on
another token. All scales are powers of two. So they change no mantissa, and numbers that several
devices scale by scales of their own round alike. Only below 2^-12 (e4m3) or 2^-28 (e5m2) of the
largest, where numbers become subnormal, may they differ, by less than 2^-16 or 2^-31 of the
largest: activations need no collective. Only a weight has one scale for all its shards, which the
maximum over their devices gives; it travels over fsdp in e4m3, one byte a number.

On chips without these types XLA converts the numbers and multiplies in a wider one: the same
results, slower. Head, embedding, router, layers of linear attention and what makes keys and values
of `mla`'s latents stay in the compute type, as do sums over tp; so do queries where
model.attention_kernel='latent' makes them.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from parallel import FSDP, REDUCES, Array, P, Param, all_gather, pmax, spec_axes

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# Exponent and mantissa (its 23 bits of a float32) of the largest number in use: 240 and 57,344.
# e4m3 has numbers up to 448, but floats that jax.checkpoint saves pass through `reduce_precision`,
# which takes the highest exponent for infinity, as in formats of IEEE's kind, and makes zeros of
# subnormal numbers, below 2^-6. So what is kept for the backward pass is bits (`as_bits`).
TOP = {E4M3: (7, 0x700000), E5M2: (15, 0x600000)}


class Rounded(NamedTuple):
    """Numbers in 8 bits, and what to multiply them by: a power of two, in the compute type."""

    array: Array
    scale: Array

    def wide(self) -> Array:
        """Returns the numbers that it stands for, in the compute type, which holds them exactly."""
        return self.array.astype(self.scale.dtype) * self.scale


def rounded(x: Array, kind: jnp.dtype, largest: Array) -> Rounded:
    """Rounds x, scaled so that `largest`, the largest |x| of those that share a scale, comes as
    near to the top of the format (TOP) as a power of two allows.

    What is not finite becomes NaN: e4m3 has no infinity.
    """
    bits = lax.bitcast_convert_type(largest.astype(jnp.float32), jnp.int32)
    top, mantissa = TOP[kind]
    exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) > mantissa)
    up = jnp.clip(top - exponent, -126, 126)
    up, down = (lax.bitcast_convert_type((n + 127) << 23, jnp.float32) for n in (up, -up))
    return Rounded((x.astype(jnp.float32) * up).astype(kind), down.astype(x.dtype))


def round_tokens(x_BTI: Array, kind: jnp.dtype) -> Rounded:
    """Rounds with a scale for each token: of the last dimension's numbers on this device."""
    return rounded(x_BTI, kind, jnp.max(jnp.abs(x_BTI), axis=-1, keepdims=True))


def round_all(x: Array, kind: jnp.dtype) -> Rounded:
    """Rounds with one scale."""
    return rounded(x, kind, jnp.max(jnp.abs(x)))


def as_bits(x: Array) -> Array:
    """Returns the bits of numbers in 8 bits, uint8, which no `reduce_precision` changes."""
    return lax.bitcast_convert_type(x, jnp.uint8)


def of_bits(bits: Array, kind: jnp.dtype) -> Array:
    """Returns the numbers whose bits these are."""
    return lax.bitcast_convert_type(bits, kind)


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight in e4m3, gathered over fsdp, as `linear` and the experts' kernels take it.

    bits: the numbers' (`as_bits`); scale: a power of two, [..., 1, 1] with one for each expert.
    shard: this device's shard in the compute type. It receives the gradient, since that of a number
        in 8 bits would have 8 bits.
    dim: the dimension that was gathered over fsdp; None for none. reduce: what sums its gradient.
    """

    bits: Array
    scale: Array
    shard: Array
    dim: int | None = dataclasses.field(metadata={'static': True})
    reduce: str = dataclasses.field(metadata={'static': True})

    @property
    def array(self) -> Array:
        """The numbers, in e4m3."""
        return of_bits(self.bits, E4M3)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    def wide(self) -> Array:
        """Returns the numbers that it stands for, in the compute type."""
        return Rounded(self.array, self.scale).wide()

    def gradient(self, dw: Array) -> 'Quantized':
        """Returns the cotangent that brings the gradient of the gathered weight to the shard.

        Moves: a sum over fsdp by `reduce` in the type of dw, as backward of `parallel.unshard`.
        """
        dw = dw.reshape(self.shape).astype(self.shard.dtype)
        dw = dw if self.dim is None else REDUCES[self.reduce](dw, FSDP, self.dim)
        return dataclasses.replace(self, bits=None, scale=None, shard=dw)


def quantize(p: Param, shard: Array, dim: int | None, reduce: str) -> Quantized:
    """Rounds a weight's shard to e4m3 and gathers dimension `dim` over fsdp.

    Layout: dim/n -> dim. Forward: all-gather of bytes, size·(n-1)/n bytes, and the all-reduce of a
    scale. Backward: see `Quantized.gradient`.
    """
    own = lax.stop_gradient(shard)
    first = len(p.shape) - p.inputs - p.outputs  # dimensions of experts, each with its scale
    axes = tuple(range(first, shard.ndim))
    sharded = spec_axes(P(*p.spec[first:]))
    if dim is None:
        sharded = tuple(axis for axis in sharded if axis != FSDP)
    largest = jnp.max(jnp.abs(own), axis=axes, keepdims=True)
    found = rounded(own, E4M3, pmax(largest, sharded) if sharded else largest)
    bits = as_bits(found.array)
    bits = bits if dim is None else all_gather(bits, FSDP, dim)
    return Quantized(bits, found.scale, shard, dim, reduce)


# ---------------------------------------------------------------------------------------------
# The matmul of a linear layer
# ---------------------------------------------------------------------------------------------


# Its derivative is written by hand, below: change both. tests/test_float8.py compares it with that
# of the same rounded numbers in float32.
@jax.custom_vjp
def matmul(x_BTI: Array, w: Quantized) -> Array:
    """Computes x w, [B, T, I] -> [B, T, O], in e4m3. Saves x in e4m3."""
    return product(round_tokens(x_BTI, E4M3), w)


def product(x: Rounded, w: Quantized) -> Array:
    """Multiplies rounded tokens by a weight."""
    w_IO = w.array.reshape(x.array.shape[-1], -1)
    return _dot(x.array, w_IO, (2,), (0,), x.scale) * x.scale * w.scale.reshape(())


def input_gradient(d_BTO: Array, w: Quantized) -> Array:
    """Computes the gradient of the input, [B, T, I], with d in e5m2."""
    d = round_tokens(d_BTO, E5M2)
    w_IO = w.array.reshape(-1, d_BTO.shape[-1])
    return _dot(d.array, w_IO, (2,), (1,), d.scale) * d.scale * w.scale.reshape(())


def weight_gradient(x: Rounded, d_BTO: Array) -> Array:
    """Computes the gradient of the weight, [I, O], with d in e5m2.

    The scale of each token of x goes over to d, which has one scale for all tokens: e5m2 has room
    for 2^30 between the largest gradient and the smallest.
    """
    d = round_all(d_BTO * x.scale, E5M2)
    return _dot(x.array, d.array, (0, 1), (0, 1), d.scale) * d.scale


def _dot(
    a: Array, b: Array, over_a: tuple[int, ...], over_b: tuple[int, ...], like: Array
) -> Array:
    """Multiplies numbers in 8 bits: the result in the type of `like`, summed in float32."""
    dims = ((over_a, over_b), ((), ()))
    return lax.dot_general(a, b, dims, preferred_element_type=like.dtype)


def _forward(x_BTI: Array, w: Quantized):
    x = round_tokens(x_BTI, E4M3)
    return product(x, w), (as_bits(x.array), x.scale, w)


def _backward(saved: tuple[Array, Array, Quantized], d_BTO: Array):
    bits, scale, w = saved
    x = Rounded(of_bits(bits, E4M3), scale)
    return input_gradient(d_BTO, w), w.gradient(weight_gradient(x, d_BTO))


matmul.defvjp(_forward, _backward)

# ---------------------------------------------------------------------------------------------
# The matmuls of experts
# ---------------------------------------------------------------------------------------------


def as_e4m3(x_XD: Array) -> Array:
    """Rounds each row to e4m3 and returns the numbers in the type of x: what a kernel without
    8-bit matmuls multiplies instead, with the same results."""
    return round_tokens(x_XD, E4M3).wide()


def as_e5m2(d_XD: Array) -> Array:
    """Rounds each row to e5m2, as `as_e4m3`."""
    return round_tokens(d_XD, E5M2).wide()


def unchanged(x: Array) -> Array:
    """Returns x: the rounding of kernels in the compute type."""
    return x


def is_quantized(w: object) -> bool:
    """Returns True for a weight in e4m3, a leaf of a layer's weights."""
    return isinstance(w, Quantized)


def gathered(w: object) -> Array:
    """Returns a weight in the compute type: what a `Quantized` stands for, others as they are."""
    return w.wide() if is_quantized(w) else w


def gradients(w: dict[str, object], dw: dict[str, Array]) -> dict[str, object]:
    """Returns the cotangents of a layer's weights from the gradients of the gathered ones."""
    return {n: x.gradient(dw[n]) if is_quantized(x) else dw[n] for n, x in w.items()}


def grouped(
    multiply: Callable[..., Array],
    x_XI: Array,
    w: Quantized,
    sizes_e: Array,
    group_X: Array,
    kind: jnp.dtype,
    transposed: bool = False,
) -> Array:
    """Multiplies each row by the matrix of its group, both in 8 bits.

    `multiply` is the kernel: (rows, matrices, sizes, transposed, dtype of the result).
    """
    x = round_tokens(x_XI, kind)
    y_XO = multiply(x.array, w.array, sizes_e, transposed, x_XI.dtype)
    return y_XO * x.scale * w.scale[group_X][:, 0]


def grouped_gradient(
    gradient: Callable[..., Array], x_XI: Array, d_XO: Array, sizes_e: Array
) -> Array:
    """Sums xᵀ d over the rows of each group, x in e4m3 and d in e5m2, as `weight_gradient`."""
    x = round_tokens(x_XI, E4M3)
    in_group_X1 = jnp.arange(len(d_XO))[:, None] < jnp.sum(sizes_e)  # the others hold anything
    d = round_all(jnp.where(in_group_X1, d_XO * x.scale, 0), E5M2)
    return gradient(x.array, d.array, sizes_e, x_XI.dtype) * d.scale
