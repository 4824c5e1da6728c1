"""What convert.py refuses, and the traps of released weights."""

import json
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from common_released import RELEASED, released_copy

import convert
from checkpoint import Checkpointer, CheckpointError
from config import ConfigError
from families import exporting, fields
from families.rules import Rule, copy, fill_leaf, fill_tensor, halves_of_pairs
from storage import leaves, safetensors
from storage.safetensors import Tensor, read_folder, read_header

ROOT = pathlib.Path(__file__).parent.parent
NORM = 'model.norm.weight'


@pytest.fixture
def release(tmp_path) -> pathlib.Path:
    return released_copy(tmp_path)


def file_of(folder: pathlib.Path, name: str) -> pathlib.Path:
    return pathlib.Path(read_folder(str(folder))[name].file)


def rewrite(
    file: pathlib.Path, change: Callable[[dict], Any] = lambda _: None, tail: bytes = b''
) -> None:
    """Changes a file's header, and appends to it."""
    content = file.read_bytes()
    (length,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack('<Q', len(text)) + text + content[8 + length :] + tail)


def edit_json(path: pathlib.Path, change: Callable[[dict], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def missing(folder: pathlib.Path) -> None:
    file_of(folder, NORM).unlink()


def cut(folder: pathlib.Path) -> None:
    file = file_of(folder, NORM)
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(folder: pathlib.Path) -> None:
    file = file_of(folder, NORM)
    file.write_bytes(file.read_bytes()[:20])


def cut_length(folder: pathlib.Path) -> None:
    file_of(folder, NORM).write_bytes(b'\x01\x02')


def another_shape(folder: pathlib.Path) -> None:
    rewrite(file_of(folder, NORM), lambda h: h[NORM].update(shape=[4, 4]))


def lying_shape(folder: pathlib.Path) -> None:
    rewrite(file_of(folder, NORM), lambda h: h[NORM].update(shape=[17]))


def lying_offsets(folder: pathlib.Path) -> None:
    def change(header: dict) -> None:
        start, stop = header[NORM]['data_offsets']
        header[NORM]['data_offsets'] = [start - 32, stop - 32]

    rewrite(file_of(folder, NORM), change)


def beyond_the_end(folder: pathlib.Path) -> None:
    def change(header: dict) -> None:
        names = [name for name in header if name != '__metadata__']
        last = max(names, key=lambda name: header[name]['data_offsets'])
        header[last]['shape'][0] += 1
        header[last]['data_offsets'][1] += 2 * int(np.prod(header[last]['shape'][1:]))

    rewrite(file_of(folder, NORM), change)


def trailing(folder: pathlib.Path) -> None:
    rewrite(file_of(folder, NORM), tail=b'xyz')


def negative(folder: pathlib.Path) -> None:
    rewrite(file_of(folder, NORM), lambda h: h[NORM].update(shape=[-16]))


def strange_type(folder: pathlib.Path) -> None:
    rewrite(file_of(folder, NORM), lambda h: h[NORM].update(dtype='F4'))


def quantized(folder: pathlib.Path) -> None:
    rewrite(file_of(folder, NORM), lambda h: h[NORM].update(dtype='I16'))


def unknown(folder: pathlib.Path) -> None:
    def change(header: dict) -> None:
        header['model.layers.0.extra.weight'] = header.pop(NORM)

    rewrite(file_of(folder, NORM), change)
    edit_json(
        folder / 'model.safetensors.index.json',
        lambda x: x['weight_map'].update(
            {'model.layers.0.extra.weight': x['weight_map'].pop(NORM)}
        ),
    )


def not_in_index(folder: pathlib.Path) -> None:
    edit_json(folder / 'model.safetensors.index.json', lambda x: x['weight_map'].pop(NORM))


def only_in_index(folder: pathlib.Path) -> None:
    index = folder / 'model.safetensors.index.json'
    edit_json(index, lambda x: x['weight_map'].update(ghost=x['weight_map'][NORM]))


def outside(folder: pathlib.Path) -> None:
    index = folder / 'model.safetensors.index.json'
    edit_json(index, lambda x: x['weight_map'].update({NORM: '../x.safetensors'}))


def no_weights(folder: pathlib.Path) -> None:
    (folder / 'model.safetensors.index.json').unlink()


def no_config(folder: pathlib.Path) -> None:
    (folder / 'config.json').unlink()


def half_config(folder: pathlib.Path) -> None:
    text = (folder / 'config.json').read_text()
    (folder / 'config.json').write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (missing, r'model-0000\d-of-0000\d.safetensors is missing; .* the first of them'),
        (cut, r'safetensors is damaged: the tensor .* ends at byte .*fetch the file again'),
        (cut_header, 'safetensors is damaged: its 20 bytes do not begin with the length'),
        (cut_length, 'safetensors is damaged: its 2 bytes do not begin'),
        (another_shape, r'model.norm.weight has the shape \[4, 4\] in .*safetensors, .* \[16\]'),
        (
            lying_shape,
            'is damaged: the tensor model.norm.weight has the type and shape of 34 bytes',
        ),
        (lying_offsets, r'safetensors is damaged: the tensor .*(overlaps|leaves a gap)'),
        (beyond_the_end, r'safetensors is damaged: the tensor .* ends at byte'),
        (trailing, 'safetensors is damaged: 3 bytes behind its tensors belong to none'),
        (negative, 'safetensors is damaged: its header says of the tensor model.norm.weight'),
        (strange_type, 'safetensors is damaged: the tensor model.norm.weight has the unknown type'),
        (quantized, r'model.norm.weight has the type int16 in .*safetensors; take a'),
        (unknown, r'model.layers.0.extra.weight in .*safetensors belongs to no part'),
        (unknown, 'model.norm.weight is in no file of'),
        (not_in_index, r'safetensors holds the tensor model.norm.weight, which .*index.json lacks'),
        (only_in_index, r'safetensors lacks the tensor ghost, which .*index.json says'),
        (outside, 'index.json is damaged'),
        (no_weights, 'holds neither model.safetensors.index.json nor model.safetensors'),
        (no_config, r'there is no .*config.json'),
        (half_config, r'config.json is damaged'),
    ],
)
def test_a_damaged_release_is_refused_by_file_and_tensor(damage, said, release, tmp_path):
    damage(release)
    with pytest.raises(ConfigError, match=said):
        convert.import_model(str(release), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_file_that_shrinks_while_it_is_read_leaves_no_checkpoint(release, tmp_path, monkeypatch):
    def shrunk(folder: str) -> dict[str, Tensor]:
        tensors = read_folder(folder)
        cut(release)
        return tensors

    monkeypatch.setattr(convert, 'read_folder', shrunk)
    with pytest.raises(CheckpointError, match=r'ends within the tensor [\w.]+: fetch'):
        convert.import_model(str(release), str(tmp_path / 'run'))
    assert not list((tmp_path / 'run').rglob('COMMIT'))
    assert not list((tmp_path / 'run').rglob('metadata.json'))
    with Checkpointer(f'{tmp_path}/run/checkpoints') as checkpoints:
        assert checkpoints.latest_step() is None


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'model_type': 'gpt2'}, "model_type='gpt2', which families/ does not have; it has llama"),
        ({'hidden_act': 'gelu'}, "hidden_act='gelu', which this code does not compute"),
        ({'mlp_bias': True}, 'mlp_bias=True'),
        ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type='dynamic'"),
        ({'rope_scaling': {'rope_type': 'longrope', 'factor': 2.0}}, "rope_type='longrope'"),
        ({'rope_scaling': {'rope_type': 'llama3', 'factor': 2.0}}, "lacks 'low_freq_factor'"),
        ({'rope_scaling': {'rope_type': 'linear'}}, "the rotation of .*config.json lacks 'factor'"),
        ({'rope_scaling': 'linear'}, "says of the rotation 'linear'"),
        ({'quantization_config': {'quant_method': 'awq'}}, r'the weights are quantized'),
        ({'hidden_size': None}, "lacks 'hidden_size'"),
        ({'num_key_value_heads': 3}, 'n_kv_heads=3'),
        ({'num_hidden_layers': 3}, 'model.layers.2.[a-z_.]+ is in no file'),
        ({'intermediate_size': 25}, r'has the shape \[24, 16\] in .* by config.json \[25, 16\]'),
    ],
)
def test_what_the_code_does_not_compute_is_refused_before_weights_are_read(
    changes, said, release, tmp_path
):
    edit_json(release / 'config.json', lambda x: x.update(changes))
    with pytest.raises(ConfigError, match=said):
        convert.import_model(str(release), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_used_workdir_and_a_used_folder_are_refused(release, tmp_path):
    run = tmp_path / 'run'
    convert.import_model(str(release), str(run))
    with pytest.raises(ConfigError, match='holds step 0 already: name a new folder'):
        convert.import_model(str(release), str(run))
    with pytest.raises(ConfigError, match='is there already'):
        convert.export_model(str(run), str(release))
    with pytest.raises(ConfigError, match='holds no checkpoint'):
        convert.export_model(str(tmp_path / 'none'), str(tmp_path / 'out'))
    with pytest.raises(ConfigError, match='is no local folder'):
        convert.export_model(str(run), 'gs://bucket/out')


@pytest.mark.parametrize('name', ['gpt_oss', 'llama31'])
def test_large_tensors_go_through_memory_in_parts(name, tmp_path, monkeypatch):
    monkeypatch.setattr(leaves, 'CHUNK_BYTES', 256)
    monkeypatch.setattr(exporting, 'PIECE_BYTES', 300)
    sizes = []

    def measured(self: Tensor, *args: Any, read=Tensor.read) -> np.ndarray:
        sizes.append(self.nbytes if not args or args[0] == slice(None) else 0)
        return read(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, 'read', measured)
        convert.import_model(str(RELEASED / name), str(tmp_path / 'run'))
    want = read_folder(str(RELEASED / name))
    assert sizes.count(0) > 8  # parts of the embedding at least, which is the largest
    assert max(sizes) < max(tensor.nbytes for tensor in want.values())
    made: list[int] = []
    monkeypatch.setattr(exporting, 'assemble', lambda *a, f=exporting.assemble: noted(made, f(*a)))
    convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert max(made) < max(tensor.nbytes for tensor in want.values())
    got = read_folder(str(tmp_path / 'out'))
    assert {n: t.read().tobytes() for n, t in got.items()} == {
        n: t.read().tobytes() for n, t in want.items()
    }


def noted(sizes: list[int], x: np.ndarray) -> np.ndarray:
    sizes.append(x.nbytes)
    return x


def test_a_failed_export_leaves_nothing(release, tmp_path, monkeypatch):
    convert.import_model(str(release), str(tmp_path / 'run'))
    (damaged,) = (tmp_path / 'run/checkpoints/0/arrays/params.head.w_VD').rglob('c/0/0')
    damaged.write_bytes(damaged.read_bytes()[:-8] + b'12345678')
    with pytest.raises(Exception, match=r'damaged: leaf params.head.w_VD'):
        convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert [p.name for p in tmp_path.iterdir() if 'out' in p.name] == []


# ---------------------------------------------------------------------------------------------
# Traps
# ---------------------------------------------------------------------------------------------


def test_a_transposed_view_is_written_as_it_looks(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    entry = ('x', x.dtype, (3, 2))
    safetensors.write_file(str(tmp_path / 'model.safetensors'), [entry], iter([x.T]))
    assert read_folder(str(tmp_path))['x'].read().tolist() == x.T.tolist()


@pytest.mark.parametrize('dtype', safetensors.DTYPES.values(), ids=str)
def test_all_types_are_written_and_read(dtype, tmp_path):
    x = np.arange(6).reshape(3, 2).astype(dtype)
    file = str(tmp_path / 'model.safetensors')
    safetensors.write_file(file, [('x', dtype, x.shape)], iter([x[:1], x[1:]]))
    tensor = read_header(file)['x']
    assert tensor.read().tobytes() == x.tobytes()
    assert tensor.read(slice(1, 3)).tobytes() == x[1:].tobytes()


def test_correction_biases_stay_in_float32(tmp_path):
    convert.import_model(str(RELEASED / 'deepseek_v3'), str(tmp_path / 'run'))
    convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'), dtype='bfloat16')
    got = read_folder(str(tmp_path / 'out'))
    want = read_folder(str(RELEASED / 'deepseek_v3'))
    (name,) = (name for name in got if name.endswith('e_score_correction_bias'))
    assert got[name].dtype == np.float32
    assert got[name].read().tobytes() == want[name].read().tobytes()
    assert np.any(got[name].read().astype(jnp.bfloat16) != got[name].read())
    assert {t.dtype for n, t in got.items() if n != name} == {np.dtype(jnp.bfloat16)}


def test_interleaved_pairs_become_halves():
    rule = Rule('w', 'x', '(n h) d -> d n h', {'h': halves_of_pairs(2, 6)})
    x = np.arange(2 * 8 * 3).reshape(16, 3)
    out = np.zeros((3, 2, 8), x.dtype)
    fill_leaf(rule, out, x)
    rows = [0, 1, 2, 4, 6, 3, 5, 7]
    assert out[1].tolist() == [[x[r, 1] for r in rows], [x[8 + r, 1] for r in rows]]
    back = np.zeros_like(x)
    fill_tensor(rule, back, out)
    assert np.array_equal(back, x)


@pytest.mark.parametrize('spelling', ['older', 'newer'])
def test_both_spellings_of_config_json_are_read(spelling):
    rope = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
            'original_max_position_embeddings': 8192}  # fmt: skip
    if spelling == 'older':
        config = {'rope_theta': 5e5, 'rope_scaling': rope | {'type': 'llama3'}, 'torch_dtype': 'x'}
    else:
        inner = rope | {'rope_type': 'llama3', 'rope_theta': 5e5}
        config = {'rope_parameters': inner, 'dtype': 'x'}
    found = fields.rope_fields(fields.Released(config, 'config.json'))
    assert found == {
        'rope_base': 5e5, 'rope_scaling': 'llama3', 'rope_factor': 8.0, 'rope_original_len': 8192,
        'rope_low_freq_factor': 1.0, 'rope_high_freq_factor': 4.0,
    }  # fmt: skip
    assert fields.dtype_of(config) == 'x'


def test_layers_that_predict_further_tokens_are_left_out_and_said(tmp_path, capsys):
    release = pathlib.Path(shutil.copytree(RELEASED / 'deepseek_v3', tmp_path / 'release'))
    name = 'model.layers.2.eh_proj.weight'
    file = release / 'further.safetensors'
    x = np.zeros((2, 2), np.float32)
    safetensors.write_file(str(file), [(name, x.dtype, x.shape)], iter([x]))
    index = release / 'model.safetensors.index.json'
    edit_json(index, lambda c: c['weight_map'].update({name: file.name}))
    convert.import_model(str(release), str(tmp_path / 'run'))
    said = f'left out: 1 tensors, multi-token prediction, as {name}'
    assert said in capsys.readouterr().out
    edit_json(release / 'config.json', lambda c: c.update(num_nextn_predict_layers=0))
    with pytest.raises(ConfigError, match=f'{name} in .*further.* belongs to no part'):
        convert.import_model(str(release), str(tmp_path / 'other'))


def test_copies_are_exact_whatever_the_strides():
    rng = np.random.default_rng(0)
    for shape in ((3,), (130, 257), (5, 130, 131), (2, 1, 150), (0, 3)):
        for order in (range(len(shape)), reversed(range(len(shape)))):
            axes = list(order)
            x = rng.integers(0, 2**16, np.array(shape)[axes]).astype(np.uint16)
            x = x.view(jnp.bfloat16).transpose(np.argsort(axes))
            out = np.zeros(shape, jnp.bfloat16)
            copy(out, x)
            assert out.tobytes() == np.ascontiguousarray(x).tobytes()
            wide = np.zeros(shape, np.float32)
            copy(wide, x)
            assert wide.tobytes() == x.astype(np.float32).tobytes()
