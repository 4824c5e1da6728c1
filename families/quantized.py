"""Quantized weights of releases, read as the bfloat16 tensors that they stand for.

A release in float8 (DeepSeek-V3, Kimi K2) holds a matrix x.weight in e4m3 and, for each block of
it, a factor in x.weight_scale_inv; despite its name the weight is multiplied by it. A release in
MXFP4 (gpt-oss) holds the experts of a layer, which in bfloat16 are [E, in, out], as x_blocks, uint8
[E, out, in/32, 16] with two numbers of 4 bits a byte, the lower bits first, and x_scales, uint8
[E, out, in/32], powers of two with a bias of 127 (OCP Microscaling Formats, version 1.0).

Both are computed in float32 and rounded to bfloat16, as transformers does; MXFP4 loses nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from config import ConfigError
from families.fields import Released
from storage.safetensors import Tensor

BFLOAT16 = np.dtype(jnp.bfloat16)
UINT8 = np.dtype(np.uint8)
FLOAT8 = np.dtype(jnp.float8_e4m3fn)
SCALE_INV, BLOCKS, SCALES = '_scale_inv', '_blocks', '_scales'  # ends of names
MXFP4_GROUP = 32  # numbers with one scale
MXFP4_BIAS, MXFP4_NAN = 127, 255
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # by its lower three bits; then the sign
PAIRS = np.array([(i & 15, i >> 4) for i in range(256)])  # the numbers in a byte
PAIR_VALUES = np.concatenate([E2M1, -E2M1])[PAIRS]  # float32 [256, 2]


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A tensor in bfloat16 that a release holds as two, with the interface of `Tensor`."""

    name: str
    weight: Tensor
    scales: Tensor
    shape: tuple[int, ...]
    read_rows: Callable[['Dequantized', int, int], np.ndarray]
    block: tuple[int, int] = (1, 1)  # rows and columns of the weight that share a factor

    dtype = BFLOAT16

    @property
    def file(self) -> str:
        return self.weight.file

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its numbers in bfloat16."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Reads the tensor, or these rows of its first dimension, as bfloat16.

        Raises ConfigError if a file ends before them, or a scale is no number.
        """
        first, stop, _ = rows.indices(self.shape[0])
        return self.read_rows(self, first, stop)


def _read_float8(tensor: Dequantized, first: int, stop: int) -> np.ndarray:
    """Returns rows of a matrix of float8: [stop - first, columns]."""
    rows, columns = tensor.block
    begin = first // rows
    scales = tensor.scales.read(slice(begin, -(-stop // rows))).astype(np.float32)
    out = tensor.weight.read(slice(first, stop)).astype(np.float32)
    of_row = np.arange(first, stop) // rows - begin
    for j in range(scales.shape[1]):  # by blocks of columns: no factors as large as the weight
        out[:, j * columns : (j + 1) * columns] *= scales[of_row, j, None]
    return out.astype(BFLOAT16)


def _read_mxfp4(tensor: Dequantized, first: int, stop: int) -> np.ndarray:
    """Returns experts' matrices, a view [stop - first, in, out] of them with inputs last."""
    scales = tensor.scales.read(slice(first, stop))
    if np.any(scales == MXFP4_NAN):
        raise ConfigError(f'{tensor.scales.file}: a scale of {tensor.scales.name} is no number')
    e, n_out, groups = scales.shape
    out = np.empty((e, n_out, groups * MXFP4_GROUP), BFLOAT16)
    for i, blocks in enumerate(tensor.weight.read(slice(first, stop))):  # few numbers in float32
        values = PAIR_VALUES.take(blocks, 0).reshape(n_out, groups, MXFP4_GROUP)
        values *= np.ldexp(np.float32(1), scales[i, ..., None].astype(np.int32) - MXFP4_BIAS)
        out[i] = values.reshape(n_out, -1)
    return out.transpose(0, 2, 1)


def dequantized(tensors: Mapping[str, Tensor], released: Released) -> dict[str, Any]:
    """Returns the tensors of a release by name, with those that are quantized as bfloat16 ones.

    Raises ConfigError for a kind of quantization that is not read, or scales that do not fit.
    """
    quantization = released.get('quantization_config') or {}
    method = quantization.get('quant_method')
    if not quantization:
        return dict(tensors)
    if method == 'fp8' and quantization.get('fmt', 'e4m3') == 'e4m3':
        return _with_float8(tensors, quantization.get('weight_block_size'), released.where)
    if method == 'mxfp4':
        return _with_mxfp4(tensors)
    raise ConfigError(
        f'{released.where} says that the weights are quantized ({quantization}); what is read is '
        f"'fp8' in e4m3 by blocks and 'mxfp4': take a release of the model in bfloat16"
    )


def _with_float8(tensors: Mapping[str, Tensor], block: Any, where: str) -> dict[str, Any]:
    """Joins x.weight and x.weight_scale_inv."""
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        raise ConfigError(
            f'{where} has weight_block_size={block!r}; what is read are factors by blocks, as '
            f'[128, 128]: take a release of the model in bfloat16'
        )
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_INV) and name.removesuffix(SCALE_INV) in tensors:
            continue
        scales = tensors.get(name + SCALE_INV)
        if tensor.dtype == FLOAT8 and scales:
            _check_scales(scales, [-(-n // b) for n, b in zip(tensor.shape, block, strict=False)])
            tensor = Dequantized(name, tensor, scales, tensor.shape, _read_float8, tuple(block))
        found[name] = tensor
    return found


def _with_mxfp4(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Joins x_blocks and x_scales to x."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        scales = tensors.get(name.removesuffix(BLOCKS) + SCALES)
        if name.endswith(BLOCKS) and scales:
            if len(tensor.shape) != 4 or tensor.shape[3] != MXFP4_GROUP // 2:
                raise ConfigError(
                    f'{name} has the shape {list(tensor.shape)} in {tensor.file}, and blocks of '
                    f'MXFP4 have [experts, out, in/32, 16]: fetch the file again'
                )
            _check_scales(scales, [*tensor.shape[:3]])
            if (tensor.dtype, scales.dtype) != (UINT8, UINT8):
                raise ConfigError(f'{name} in {tensor.file} and its scales are no bytes')
            e, n_out, groups = tensor.shape[:3]
            shape, name = (e, groups * MXFP4_GROUP, n_out), name.removesuffix(BLOCKS)
            found[name] = Dequantized(name, tensor, scales, shape, _read_mxfp4)
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in tensors):
            found[name] = tensor
    return found


def _check_scales(scales: Tensor, shape: list[int]) -> None:
    if [*scales.shape] != shape:
        raise ConfigError(
            f'{scales.name} has the shape {list(scales.shape)} in {scales.file}, and {shape} '
            f'belong to its weight: fetch the file again'
        )
