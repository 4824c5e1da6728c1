"""What convert.py refuses, the traps of released weights, and runs of one's own brought out."""

import json
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import on_one_device
from test_convert import MODELS, RELEASED, close, golden, restored
from training_worker import small_run

import convert
import train
from checkpoint import Checkpointer, CheckpointError
from config import ConfigError, model_config
from families import exporting, fields, llama
from families.rules import Rule, copy, fill_leaf, fill_tensor, halves_of_pairs, tensor_shape
from families.table import FAMILIES, family_for
from machine.config_flag import load_config
from model import logits, model_params
from parallel import make_mesh, map_params, shardings
from runtime.config_checks import check_fields
from runtime.resume import load_params
from runtime.sampling import run_encoding
from storage import leaves, safetensors
from storage.safetensors import Tensor, read_folder, read_header

ROOT = pathlib.Path(__file__).parent.parent
NORM = 'model.norm.weight'


@pytest.fixture
def release(tmp_path) -> pathlib.Path:
    """Returns a copy of a golden model in several files, to be damaged."""
    return pathlib.Path(shutil.copytree(RELEASED / 'llama2', tmp_path / 'release'))


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
        ({'quantization_config': {'quant_method': 'fp8'}}, r'the weights are quantized \(fp8\)'),
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


# ---------------------------------------------------------------------------------------------
# Runs of one's own
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def run(tokens, tmp_path_factory) -> pathlib.Path:
    """Returns the workdir of a run of Llama's layers."""
    workdir = tmp_path_factory.mktemp('own') / 'run'
    train.train(own_config(tokens), str(workdir))
    return workdir


@pytest.fixture(scope='module')
def own_release(run, tmp_path_factory) -> pathlib.Path:
    """Returns the run's weights, brought out."""
    folder = tmp_path_factory.mktemp('own') / 'released'
    convert.export_model(str(run), str(folder))
    return folder


def own_config(tokens: pathlib.Path, **more):
    return small_run(
        tokens, steps=2, model__attention='gqa', model__n_kv_heads=2, model__head_dim=8,
        model__tie_embeddings=False, model__dropout=0.0, **more,
    )  # fmt: skip


def test_a_run_goes_out_and_in_again_with_the_same_numbers(
    run, own_release, tokens, tmp_path, capsys
):
    released, back = own_release, tmp_path / 'back'
    config = json.loads((released / 'config.json').read_text())
    assert (config['model_type'], config['torch_dtype']) == ('llama', 'float32')
    assert (released / 'generation_config.json').exists()
    assert config['eos_token_id'] == 256  # of the run's vocabulary
    convert.import_model(str(released), str(back))
    with Checkpointer(f'{run}/checkpoints') as checkpoints:
        wanted = map_params(
            lambda p: jax.ShapeDtypeStruct(p.shape, np.float32),
            model_params(model_config(own_config(tokens))),
        )
        want = checkpoints.restore(2, {'params': wanted})['params']
    got, _ = restored(back)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(a, b)
    # Another run starts from it, and what differs is said.
    capsys.readouterr()
    train.train(own_config(tokens, model__norm_eps=1e-5), str(tmp_path / 'next'), str(back))
    assert 'model.norm_eps: 1e-06 there, 1e-05 here' in capsys.readouterr().out
    other = own_config(tokens, model__d_ff=96)
    with pytest.raises(ConfigError, match=r'another model\n(.*\n)*  - model.d_ff: 48 there, 96'):
        train.train(other, str(tmp_path / 'other'), str(back))
    with pytest.raises(ConfigError, match=rf'released weights.*--init_from={back}'):
        train.train(own_config(tokens), str(back))


def test_a_config_is_written_for_the_user(release, tmp_path):
    config = convert.import_model(str(release), str(tmp_path / 'run'))
    (tmp_path / 'mine.py').write_text(convert.config_text(config, 'llama', 'runs/x'))
    _, loaded = load_config(str(tmp_path / 'mine.py'))
    check_fields(loaded)
    assert loaded.model.to_dict() == config.model.to_dict()
    assert (loaded.seq_len, loaded.compute_dtype) == (config.seq_len, 'bfloat16')


def test_a_run_that_no_family_computes_is_refused_with_what_differs(run):
    c = small_run('none', model__attention_gate=True)
    with pytest.raises(ConfigError) as caught:
        family_for(model_config(c))
    assert all(name in str(caught.value) for name in FAMILIES)
    c = small_run('none', model__attention='gqa', model__qk_norm=True, model__head_dim=8)
    assert family_for(model_config(c)).name == 'qwen3'
    c.model.attention_sinks = True
    with pytest.raises(ConfigError, match=r'model.attention_sinks=True, and a qwen3 model has F'):
        family_for(model_config(c), 'qwen3')


def test_biases_without_a_tensor_are_refused(tmp_path):
    convert.import_model(str(RELEASED / 'mixtral'), str(tmp_path / 'run'))
    (chunk,) = (tmp_path / 'run/checkpoints/0/arrays').glob('*ffn.bias/c/0/0')
    assert not any(chunk.read_bytes()[:-4])
    params, _ = restored(tmp_path / 'run')
    bias = params['blocks']['0_moe']['ffn']['bias']
    params['blocks']['0_moe']['ffn']['bias'] = bias + 1
    with Checkpointer(f'{tmp_path}/run/checkpoints') as checkpoints:
        config = checkpoints.metadata(0)['config']
        checkpoints.save(1, {'params': params}, config)
    with pytest.raises(ConfigError, match=r'blocks.0_moe.ffn.bias is not all zeros'):
        convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'))


def test_the_layout_of_a_pipeline_makes_no_difference(tmp_path):
    convert.import_model(str(RELEASED / 'qwen3'), str(tmp_path / 'run'))
    params, _ = restored(tmp_path / 'run')
    params['blocks'] = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), params['blocks'])
    with Checkpointer(f'{tmp_path}/run/checkpoints') as checkpoints:
        config = checkpoints.metadata(0)['config']
        checkpoints.save(1, {'params': params}, config)
    convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'), dtype='bfloat16')
    want = read_folder(str(RELEASED / 'qwen3'))
    for name, tensor in read_folder(str(tmp_path / 'out')).items():
        assert tensor.read().tobytes() == want[name].read().tobytes()


def test_released_weights_are_the_same_on_every_mesh(tmp_path):
    convert.import_model(str(RELEASED / 'qwen3_moe'), str(tmp_path / 'run'))
    want, cfg = restored(tmp_path / 'run')
    declared = model_params(cfg)
    mesh = make_mesh({'fsdp': 2, 'ep': 2, 'tp': 2})
    shapes = map_params(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, np.float32, sharding=sharding),
        declared,
        shardings(declared, mesh),
    )
    got = load_params(str(tmp_path / 'run'), shapes)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.sharding.mesh == mesh
        assert np.array_equal(a, b)


def test_the_vocabulary_and_the_release_go_with_the_weights(release, tmp_path):
    style = json.loads((RELEASED.parent / 'tokenizers.json').read_text())['styles']['llama3']
    (release / 'tokenizer.json').write_text(json.dumps(style['file']))
    (release / 'LICENSE').write_text('as released')
    run, out = tmp_path / 'run', tmp_path / 'out'
    convert.import_model(str(release), str(run))
    assert run_encoding(str(run)).name == f'{run}/release/tokenizer.json'
    convert.export_model(str(run), str(out))
    for name in ('tokenizer.json', 'LICENSE', 'generation_config.json'):
        assert (out / name).read_bytes() == (release / name).read_bytes()
    # Another run of the same weights names the release whose files it takes.
    shutil.rmtree(run / 'release')
    with pytest.raises(ConfigError, match=r'holds no config.json'):
        convert.export_model(str(run), str(tmp_path / 'more'), like=str(tmp_path / 'none'))
    convert.export_model(str(run), str(tmp_path / 'more'), like=str(release))
    assert (tmp_path / 'more/tokenizer.json').read_text() == json.dumps(style['file'])


# ---------------------------------------------------------------------------------------------
# Processes of their own
# ---------------------------------------------------------------------------------------------


def command_of(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / 'convert.py'), *arguments]


@pytest.mark.slow
def test_two_processes_import_each_its_part(tmp_path):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    base = command_of(f'--from_hf={RELEASED / "deepseek_v3"}', f'--workdir={tmp_path}/run')
    base += [f'--coordinator={address}', '--num_processes=2']
    running = [subprocess.Popen([*base, f'--process_id={i}']) for i in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    (tmp_path / 'run/checkpoints/0/written/1').read_bytes()  # what process 1 has written
    convert.import_model(str(RELEASED / 'deepseek_v3'), str(tmp_path / 'alone'))
    got, want = (restored(tmp_path / name)[0] for name in ('run', 'alone'))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    def peak(n_layers: int) -> float:
        """Returns the most memory that an import of so many layers of 100 MB and more has."""
        release, run = tmp_path / f'release{n_layers}', tmp_path / f'run{n_layers}'
        config = json.loads((RELEASED / 'llama2/config.json').read_text())
        config |= {'hidden_size': 2048, 'intermediate_size': 7168, 'num_hidden_layers': n_layers}
        m = model_config(convert.imported_config(llama.FAMILY, fields.Released(config, '')))
        entries = [
            (name, np.dtype(jnp.bfloat16), tensor_shape(p[0].leaf.rule, p[0].leaf.part))
            for name, p in exporting.tensors_of(llama.FAMILY.model_leaves(m)).items()
        ]
        release.mkdir()
        (release / 'config.json').write_text(json.dumps(config))
        zeros = (np.zeros(shape, dtype) for _, dtype, shape in entries)
        safetensors.write_file(str(release / 'model.safetensors'), entries, zeros)
        line = command_of(f'--from_hf={release}', f'--workdir={run}')
        said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        return float(re.search(r'at most ([\d.]+) GB', said)[1])

    assert peak(10) < peak(2) + 0.75  # of 0.9 GB more: windows of 0.25 GB to read and to write


# ---------------------------------------------------------------------------------------------
# transformers itself
# ---------------------------------------------------------------------------------------------


@pytest.mark.live
@pytest.mark.parametrize('name', MODELS)
def test_transformers_loads_what_is_exported(name, tmp_path):
    convert.import_model(str(RELEASED / name), str(tmp_path / 'run'))
    convert.export_model(str(tmp_path / 'run'), str(tmp_path / 'out'), dtype='float32')
    want = golden(name)
    close(logits_of(tmp_path / 'out', want['tokens'][:, :-1]), want['logits'], 'logits')


@pytest.mark.live
def test_transformers_computes_what_a_run_does(own_release, tmp_path):
    convert.import_model(str(own_release), str(tmp_path / 'back'))
    params, cfg = restored(tmp_path / 'back')
    ids = np.random.default_rng(0).integers(0, 264, (2, 16)).astype(np.int32)
    want = on_one_device(lambda params, ids: logits(params, ids, cfg))(params, ids)
    close(logits_of(own_release, ids), np.asarray(want, np.float64), 'logits')


def logits_of(folder: pathlib.Path, ids: np.ndarray) -> np.ndarray:
    """Returns what transformers computes with the weights in a folder; none may be left over."""
    torch = pytest.importorskip('torch', reason='needs pip install -r requirements/hf.txt')
    transformers = pytest.importorskip('transformers')
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
    )
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids).long()).logits.numpy()
