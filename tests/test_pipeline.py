"""Each schedule gives the loss and every gradient leaf of one device without a pipeline."""

import functools

import jax
import numpy as np
import pytest
from test_parity import TOLERANCE, assert_trees_close, batch_at, small_config

from model import model_params
from parallel import BATCH, P, Tree, init_params, make_mesh, specs
from schedules import make_schedule
from train import gradients, model_config, pipeline_gradients, put_batch

MESHES = {
    'pp2': {'pp': 2},
    'pp4': {'pp': 4},
    'pp2-dp2': {'pp': 2, 'dp': 2},
    'pp2-tp2': {'pp': 2, 'tp': 2},
    'pp2-fsdp2': {'pp': 2, 'fsdp': 2},
    'pp2-fsdp2-tp2': {'pp': 2, 'fsdp': 2, 'tp': 2},
    'pp4-tp2': {'pp': 4, 'tp': 2},
}


def config(microbatches: int, attention: str = 'mla', **model):
    c = small_config(attention, tied=attention == 'mla', microbatches=microbatches)
    c.model.update(n_layers=8, block=('dense',), **model)
    return c


def run(c, mesh, name: str = '', chunks: int = 1, costs=(1, 1, 1), check_vma: bool = True):
    """Loss and gradients, those of the blocks as [layers, ...]; no name: no pipeline."""
    cfg, mesh = model_config(c), make_mesh(mesh)
    declared = model_params(cfg, chunks)
    compute = functools.partial(gradients, declared=declared, cfg=cfg)
    if name:
        schedule = make_schedule(name, mesh.shape['pp'], c.microbatches, chunks, costs)
        compute = functools.partial(
            pipeline_gradients, declared=declared, cfg=cfg, schedule=schedule
        )
    sharded = jax.shard_map(
        lambda params, tokens: compute(params, tokens, jax.random.key(1)),
        mesh=mesh,
        in_specs=(specs(declared), P(None, BATCH)),
        out_specs=(specs(declared), P()),
        check_vma=check_vma,
    )
    params = init_params(jax.random.key(0), declared, mesh)
    grads, metrics = jax.jit(sharded)(params, put_batch(batch_at, 0, c, mesh))
    grads['blocks'] = jax.tree.map(
        lambda x: np.asarray(x).reshape(cfg.n_blocks, *x.shape[1 + (chunks > 1) :]),
        grads['blocks'],
    )
    return float(metrics['loss']), grads


_references: dict[str, tuple[float, Tree]] = {}


def reference(c) -> tuple[float, Tree]:
    name = c.to_json()
    if name not in _references:
        _references[name] = run(c, {})
    return _references[name]


def check(c, mesh: str, name: str, **settings) -> None:
    loss, grads = run(c, MESHES[mesh], name, **settings)
    want_loss, want = reference(c)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE)
    assert_trees_close(grads, want, TOLERANCE)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(np.asarray(g)).max() > 0, f'{jax.tree_util.keystr(path)} has no gradient'


@pytest.mark.parametrize('mesh', MESHES)
def test_1f1b_on_meshes(mesh):
    check(config(4), mesh, '1f1b')


@pytest.mark.parametrize('microbatches', [2, 8])
def test_microbatches_below_and_above_the_stages(microbatches):
    check(config(microbatches), 'pp4', '1f1b')


@pytest.mark.parametrize(
    ('mesh', 'name', 'chunks', 'microbatches'),
    [
        ('pp4', 'gpipe', 1, 8),
        ('pp4', 'gpipe', 1, 2),
        ('pp2', 'interleaved', 2, 4),
        ('pp2-fsdp2-tp2', 'interleaved', 4, 2),
    ],
)
def test_other_schedules(mesh, name, chunks, microbatches):
    check(config(microbatches, 'gqa'), mesh, name, chunks=chunks)


@pytest.mark.parametrize(('name', 'chunks'), [('1f1b', 1), ('interleaved', 2)])
def test_without_check_vma(name, chunks):
    check(config(4), 'pp2-fsdp2-tp2', name, chunks=chunks, check_vma=False)


def test_dropout_and_remat():
    """Dropout keys know the microbatch and the layer, whatever stage it is on."""
    c = config(4, dropout=0.3)
    assert reference(c)[0] != reference(config(4))[0]
    c.model.remat = 'full'
    check(c, 'pp2-tp2', 'interleaved', chunks=2)


RECOMPUTE = (1, 2, 1)


@pytest.mark.parametrize(
    ('mesh', 'microbatches', 'costs'),
    [
        ('pp2', 4, (1, 1, 1)),
        ('pp4', 8, (1, 1, 1)),
        ('pp4', 2, RECOMPUTE),
        ('pp4-tp2', 4, RECOMPUTE),
        ('pp2-dp2', 4, RECOMPUTE),
        ('pp2-fsdp2-tp2', 4, (1, 1, 1)),
    ],
)
def test_zero_bubble(mesh, microbatches, costs):
    check(config(microbatches), mesh, 'zero_bubble', costs=costs)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_zero_bubble_without_check_vma(remat):
    c = config(4, 'gqa', remat=remat)
    check(c, 'pp2-fsdp2-tp2', 'zero_bubble', check_vma=False)
