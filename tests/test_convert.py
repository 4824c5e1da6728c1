"""Released weights in and out, beside tiny models of transformers (golden/make_released.py)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import on_one_device
from common_released import MODELS, RELEASED, close, golden, restored

from config import ModelConfig
from convert import export_model, import_model
from decoding import Sampling, generate
from families.fields import read_config
from families.rules import fill_tensor, tensor_shape
from families.table import family_of
from model import logits, loss
from parallel import Tree
from storage.safetensors import read_folder


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
    """Returns a function: name of a golden model -> the workdir of its import."""

    @functools.cache
    def make(name: str) -> pathlib.Path:
        workdir = tmp_path_factory.mktemp(name) / 'run'
        import_model(str(RELEASED / name), str(workdir))
        return workdir

    return make


@pytest.mark.parametrize('name', MODELS)
def test_an_imported_model_computes_what_transformers_does(name, imported):
    params, cfg = restored(imported(name))
    want = golden(name)
    tokens = jnp.asarray(want['tokens'])

    def mean_loss(params: Tree, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, (nll, *_) = loss(params, tokens, cfg, jax.random.key(0))
        return total / tokens[:, 1:].size, nll / tokens[:, 1:].size

    def computed(params: Tree, tokens: jax.Array) -> tuple:
        found = jax.value_and_grad(mean_loss, has_aux=True)(params, tokens)
        return *found, logits(params, tokens[:, :-1], cfg)

    (_, nll), grads, got = on_one_device(computed)(params, tokens)
    close(got, want['logits'], 'logits')
    close(nll, want['loss'], 'loss')
    found = by_tensor(grads, name, cfg)
    compared = [key for key in want if key.startswith('grad/')]
    assert len(compared) >= 6
    for key in compared:
        close(found[key.removeprefix('grad/')], want[key], key)


def by_tensor(tree: Tree, name: str, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree as the tensors of a release."""
    family = family_of(read_config(str(RELEASED / name)))
    flat = {
        '.'.join(k.key for k in path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    found: dict[str, np.ndarray] = {}
    for leaf in family.model_leaves(cfg):
        for place, tensor in leaf.names.items():
            shape = tensor_shape(leaf.rule, leaf.part)
            out = found.setdefault(tensor, np.zeros(shape, np.float32))
            fill_tensor(leaf.rule, out, flat[leaf.name.replace('%2B', '+')][place])
    return found


@pytest.mark.parametrize('name', MODELS)
def test_greedy_tokens_are_those_of_transformers(name, imported):
    params, cfg = restored(imported(name))
    want = golden(name)
    prompt = want['tokens'][0, :3].tolist()
    (got,) = generate(params, cfg, [prompt], 30, 40, sampling=Sampling(temperature=0))
    assert np.asarray(got)[:30].tolist() == want['greedy'].tolist()


@pytest.mark.parametrize('name', MODELS)
def test_import_and_export_give_the_same_bits(name, imported, tmp_path):
    export_model(str(imported(name)), str(tmp_path / 'out'), most_bytes=8000)
    want, got = (read_folder(str(folder)) for folder in (RELEASED / name, tmp_path / 'out'))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert got[key].read().tobytes() == tensor.read().tobytes(), key
    config = json.loads((tmp_path / 'out/config.json').read_text())
    source = json.loads((RELEASED / name / 'config.json').read_text())
    assert config == source | {k: 0 for k in source if k == 'num_nextn_predict_layers'}
    index = json.loads((tmp_path / 'out/model.safetensors.index.json').read_text())
    assert len(set(index['weight_map'].values())) > 1
