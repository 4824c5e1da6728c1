"""Releases in float8 and MXFP4 are read as the bfloat16 weights that they are to transformers."""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from common_released import RELEASED

import convert
from config import ConfigError
from families.fields import Released
from families.quantized import BFLOAT16, FLOAT8, dequantized
from storage import safetensors
from storage.safetensors import read_folder, read_header

GOLDEN = pathlib.Path(__file__).parent / 'golden/quantized.safetensors'
FP8 = {'quant_method': 'fp8', 'fmt': 'e4m3', 'weight_block_size': [8, 16]}
METHODS = {'fp8': FP8, 'mxfp4': {'quant_method': 'mxfp4'}}
NAMES = {'fp8': 'fp8.weight', 'mxfp4': 'mxfp4'}


def released(quantization: dict) -> Released:
    return Released({'quantization_config': quantization}, 'config.json')


@pytest.mark.parametrize('method', METHODS)
def test_weights_are_those_of_transformers(method):
    tensors = read_header(str(GOLDEN))
    want = tensors[f'want.{method}'].read()
    got = dequantized(tensors, released(METHODS[method]))
    tensor = got[NAMES[method]]
    assert (tensor.dtype, tensor.shape) == (BFLOAT16, want.shape)
    np.testing.assert_array_equal(tensor.read(), want)
    for rows in (slice(0, 1), slice(1, 2), slice(5, 19), slice(16, None)):  # within and across
        np.testing.assert_array_equal(tensor.read(rows), want[rows])
    joined = {'fp8': {'fp8.weight_scale_inv'}, 'mxfp4': {'mxfp4_blocks', 'mxfp4_scales'}}[method]
    assert got.keys() == tensors.keys() - joined | {NAMES[method]}


def write_model(folder: pathlib.Path, config: dict, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    entries = [(name, x.dtype, x.shape) for name, x in arrays.items()]
    safetensors.write_file(str(folder / safetensors.SINGLE), entries, iter(arrays.values()))


def in_float8(x: np.ndarray, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes a matrix: (float8, factors, the bfloat16 matrix that they stand for)."""
    factors = np.empty((math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / columns)), np.float32)
    small, back = x.astype(FLOAT8), x.astype(BFLOAT16)
    for i, j in np.ndindex(*factors.shape):
        at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        factors[i, j] = np.abs(x[at]).max() / 448
        small[at] = (x[at] / factors[i, j]).astype(FLOAT8)
        back[at] = (small[at].astype(np.float32) * factors[i, j]).astype(BFLOAT16)
    return small, factors, back


def test_a_release_in_float8_becomes_a_run(tmp_path):
    """As DeepSeek-V3's: all matrices but embedding, head and routers; the weights that go out again
    are bfloat16, and say so."""
    whole = {name: t.read() for name, t in read_folder(str(RELEASED / 'deepseek_v3')).items()}
    config = json.loads((RELEASED / 'deepseek_v3/config.json').read_text())
    quantized, want = {}, {}
    for name, x in whole.items():
        if name.endswith('_proj.weight') or 'proj_with_mqa' in name:
            x = x.astype(np.float32)
            quantized[name], quantized[f'{name}_scale_inv'], want[name] = in_float8(x, 8, 16)
        else:
            quantized[name] = want[name] = x
    assert len(quantized) > len(want) + 10
    write_model(tmp_path / 'release', config | {'quantization_config': FP8}, quantized)
    convert.import_model(str(tmp_path / 'release'), str(tmp_path / 'run'))
    convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))
    got = read_folder(str(tmp_path / 'out'))
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name].read().astype(np.float32), x.astype(np.float32))
    assert 'quantization_config' not in json.loads((tmp_path / 'out/config.json').read_text())


@pytest.mark.parametrize(
    ('quantization', 'said'),
    [
        ({'quant_method': 'awq'}, "the weights are quantized .*'awq'"),
        (FP8 | {'fmt': 'e5m2'}, 'take a release of the model in bfloat16'),
        (FP8 | {'weight_block_size': None}, 'weight_block_size=None'),
        (FP8 | {'weight_block_size': [16, 16]}, r'has the shape \[3, 3\] .* \[2, 3\] belong'),
    ],
)
def test_other_kinds_are_refused(quantization, said):
    with pytest.raises(ConfigError, match=said):
        dequantized(read_header(str(GOLDEN)), released(quantization))


def test_a_weight_without_its_factors_is_refused(tmp_path):
    """It would count as a matrix of its own numbers, hundreds of times too large."""
    tensors = {name: t.read() for name, t in read_folder(str(RELEASED / 'llama31')).items()}
    name = next(name for name in tensors if name.endswith('q_proj.weight'))
    tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
    config = json.loads((RELEASED / 'llama31/config.json').read_text())
    write_model(tmp_path / 'bare', config | {'quantization_config': FP8}, tensors)
    with pytest.raises(ConfigError, match=r'q_proj.weight has the type float8_e4m3fn'):
        convert.import_model(str(tmp_path / 'bare'), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    tensors = {name: t.read() for name, t in read_header(str(GOLDEN)).items()}
    tensors['mxfp4_scales'][1, 0, 0] = 255
    write_model(tmp_path / 'x', {}, tensors)
    tensor = dequantized(read_folder(str(tmp_path / 'x')), released(METHODS['mxfp4']))['mxfp4']
    tensor.read(slice(0, 1))
    with pytest.raises(ConfigError, match='a scale of mxfp4_scales is no number'):
        tensor.read()
