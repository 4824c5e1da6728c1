"""Runs of one's own brought out, beside transformers; meshes, processes and memory of an import."""

import dataclasses
import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import on_one_device
from common_released import MODELS, RELEASED, close, golden, released_copy, restored
from training_worker import small_run

import convert
import train
from checkpoint import Checkpointer
from config import ConfigError, model_config
from families import exporting, fields, files, llama
from families.rules import tensor_shape
from families.table import FAMILIES, family_for
from machine.config_flag import load_config
from model import logits, model_params
from parallel import make_mesh, map_params, shardings
from runtime.config_checks import check_fields
from runtime.resume import load_params
from runtime.sampling import run_encoding
from storage import safetensors
from storage.safetensors import read_folder

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def release(tmp_path) -> pathlib.Path:
    return released_copy(tmp_path)


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
    # They are evaluated where they are, by their own vocabulary.
    found = [train.evaluate_only(own_config(tokens), str(x), i) for x, i in ((run, 2), (back, 0))]
    assert found[0] == found[1]
    (back / 'tokenizer.json').write_text(json.dumps({'name': 'bytes', 'fingerprint': '0' * 32}))
    with pytest.raises(ConfigError, match=f'step 0 of {back} was trained with the vocabulary'):
        train.evaluate_only(own_config(tokens), str(back), 0)


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


@pytest.mark.parametrize(
    ('kind', 'first', 'block'),
    [('dense', 0, ('dense', 'gqa+dense')), ('dense', 1, ('dense',)), ('moe', 1, ('moe',) * 2)],
)
def test_the_way_to_name_layers_makes_no_difference(kind, first, block):
    name = {'dense': 'qwen3', 'moe': 'qwen3_moe'}[kind]
    released = fields.read_config(str(RELEASED / name))
    released.config |= {'num_hidden_layers': first + 4, 'mlp_only_layers': [*range(first)]}
    plain = model_config(convert.imported_config(FAMILIES[name], released))
    own = dataclasses.replace(plain, first_dense=first, block=block)
    assert (own.first_dense, own.block) != (plain.first_dense, plain.block)
    assert FAMILIES[name].released_config(own) == FAMILIES[name].released_config(plain)
    got = files.exported_config(own, FAMILIES[name], dict(released.config), 64, -1)
    assert got == released.config
    names = [
        {x for leaf in FAMILIES[name].model_leaves(m) for x in leaf.names.values()}
        for m in (own, plain)
    ]
    assert names[0] == names[1]


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
    for other in ('none', 'run'):  # whose config.json is that of a run
        with pytest.raises(ConfigError, match=r'holds no config.json of a release'):
            convert.export_model(str(run), str(tmp_path / 'more'), like=str(tmp_path / other))
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
        folder, run = tmp_path / f'release{n_layers}', tmp_path / f'run{n_layers}'
        config = json.loads((RELEASED / 'llama2/config.json').read_text())
        config |= {'hidden_size': 2048, 'intermediate_size': 7168, 'num_hidden_layers': n_layers}
        m = model_config(convert.imported_config(llama.FAMILY, fields.Released(config, '')))
        entries = [
            (name, np.dtype(jnp.bfloat16), tensor_shape(p[0].leaf.rule, p[0].leaf.part))
            for name, p in exporting.tensors_of(llama.FAMILY.model_leaves(m)).items()
        ]
        folder.mkdir()
        (folder / 'config.json').write_text(json.dumps(config))
        zeros = (np.zeros(shape, dtype) for _, dtype, shape in entries)
        safetensors.write_file(str(folder / 'model.safetensors'), entries, zeros)
        line = command_of(f'--from_hf={folder}', f'--workdir={run}')
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
