"""Each schedule gives the loss and every gradient leaf of one device without a pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    TOLERANCE,
    assert_trees_close,
    batch_at,
    initial_params,
    kinds_config,
    set_up,
    small_config,
)

from config import model_config
from layers.dense import gain, linear, linear_weight_gradient, weight
from parallel import (
    AXES,
    BATCH,
    P,
    Param,
    Tree,
    free_axes,
    global_sum,
    init_params,
    make_mesh,
    map_params,
    normal,
    specs,
    stacked,
    sum_gradients,
    varying,
)
from pipeline.executor import Functions, run_pipeline
from pipeline.schedules import make_schedule
from runtime.config_checks import validate
from train_step import gradients, lower_train_step, make_eval_step, put_batch, setup

MESHES = {
    'pp2': {'pp': 2},
    'pp4': {'pp': 4},
    'pp2-dp2': {'pp': 2, 'dp': 2},
    'pp2-tp2': {'pp': 2, 'tp': 2},
    'pp2-fsdp2': {'pp': 2, 'fsdp': 2},
    'pp2-fsdp2-tp2': {'pp': 2, 'fsdp': 2, 'tp': 2},
    'pp4-tp2': {'pp': 4, 'tp': 2},
    'pp2-ep2': {'pp': 2, 'ep': 2},
    'pp2-ep2-tp2': {'pp': 2, 'ep': 2, 'tp': 2},
}


def config(microbatches: int, attention: str = 'mla', **model):
    c = small_config(attention, tied=attention == 'mla', microbatches=microbatches)
    c.model.update({'n_layers': 8, 'block': ('dense',), **model})
    return c


def run(c, mesh, name: str = '', chunks: int = 1, check_vma: bool = True):
    """Loss, gradients, those of the blocks as [blocks, ...], and router statistics; no name: no
    pipeline."""
    c = c.copy_and_resolve_references()
    c.mesh.update(mesh)
    c.pipeline.update(schedule=name or '1f1b', chunks=chunks)
    c.check_vma = check_vma
    validate(c, 8)
    s = set_up(c)
    stages = P('pp') if chunks == 1 else P(None, 'pp')
    sharded = jax.shard_map(
        lambda params, tokens: gradients(params, tokens, jax.random.key(1), s),
        mesh=s.mesh,
        in_specs=(specs(s.declared), P(None, BATCH)),
        out_specs=(specs(s.declared), {'loss': P(), 'router': stages}),
        check_vma=check_vma,
    )
    params = initial_params(s.model, s.mesh, chunks=chunks)
    grads, metrics = jax.jit(sharded)(params, put_batch(batch_at, 0, s))
    grads['blocks'], router = jax.tree.map(
        lambda x: np.asarray(x).reshape(s.model.n_blocks, *x.shape[1 + (chunks > 1) :]),
        (grads['blocks'], metrics['router']),
    )
    return float(metrics['loss']), grads, router


_references: dict[str, tuple[float, Tree]] = {}


def reference(c) -> tuple[float, Tree]:
    name = c.to_json()
    if name not in _references:
        _references[name] = run(c, {})
    return _references[name]


def check(c, mesh: str, name: str, **settings) -> None:
    loss, grads, router = run(c, MESHES[mesh], name, **settings)
    want_loss, want, want_router = reference(c)
    assert loss == pytest.approx(want_loss, rel=TOLERANCE)
    assert_trees_close(grads, want, TOLERANCE)
    assert_trees_close(router, want_router, TOLERANCE)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        if path[-1].key != 'bias':  # moved by the load
            assert np.abs(np.asarray(g)).max() > 0, f'{jax.tree_util.keystr(path)}: no gradient'


ROWS, D, BLOCKS = 8, 4, 8
TOY_BLOCK = {'w': weight((D, D), P(None, None), 0.5), 'gain': gain(D)}


def toy(schedule, stages: int, microbatches: int, check_vma: bool = True):
    """Gradients, loss and statistics of stages that have an auxiliary loss; `schedule` None: the
    microbatches run through all blocks, one after the other."""
    chunks = schedule.chunks if schedule else 1
    declared = {
        'blocks': stacked(TOY_BLOCK, BLOCKS, 'pp', chunks),
        'embed': Param((microbatches, ROWS, D), P(), normal(1.0)),
        'head': Param((D,), P(), normal(1.0)),
    }

    def stage(blocks, x, virtual, m):
        def block(x, params):
            y = x + jnp.tanh(linear(x, params['w'])) * params['gain']
            return y, (jnp.sum(y**2) * 0.01 * (m + 1), jnp.mean(y))

        y, (losses, means) = jax.lax.scan(block, x, blocks)
        return y, jnp.sum(losses), {'means': means * (virtual // stages + 1)}

    def last(shared, x_TD, m):
        loss = jnp.sum(jnp.sin(x_TD @ shared['head'])) * (m + 1)
        return loss, {'rows': jnp.zeros_like(loss) + len(x_TD)}

    def first(shared, m):
        return shared['embed'][m][None]

    def plain(params):
        losses, means = 0, 0
        for m in range(microbatches):
            y, loss, statistics = stage(params['blocks'], first(params, m), 0, m)
            losses += loss + last(params, y.reshape(ROWS, D), m)[0]
            means += statistics['means']
        return losses, means

    def run(params):
        params = map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)
        if schedule is None:
            (loss, means), grads = jax.value_and_grad(plain, has_aux=True)(params)
            return sum_gradients(grads, declared), global_sum(loss), means
        if chunks == 1:
            params |= {'blocks': jax.tree.map(lambda x: x[None], params['blocks'])}
        weight_gradient = functools.partial(
            linear_weight_gradient, cfg=model_config(small_config())
        )
        functions = Functions(first, stage, last, weight_gradient)
        grads, sums = run_pipeline(schedule, functions, params, TOY_BLOCK)
        means = sums.stage['means']
        if chunks == 1:
            grads |= {'blocks': jax.tree.map(lambda x: x[0], grads['blocks'])}
            means = means[0]
        return sum_gradients(grads, declared), global_sum(sums.loss), means

    mesh = make_mesh({'pp': stages})
    out = P(AXES) if chunks == 1 else P(None, AXES)
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(specs(declared),),
        out_specs=(specs(declared), P(), out),
        check_vma=check_vma,
    )
    grads, loss, means = jax.jit(sharded)(init_params(jax.random.key(0), declared, mesh))
    flat = functools.partial(map_params, lambda p, x: np.asarray(x).reshape(BLOCKS, *p.shape))
    grads['blocks'] = flat(TOY_BLOCK, grads['blocks'])
    means = np.asarray(means).reshape(chunks, -1)
    means = means / np.arange(1, chunks + 1)[:, None]  # a statistic is filed with its own chunk
    return {'grads': grads, 'loss': loss, 'means': means.reshape(-1)}


def check_toy(name, stages, microbatches, chunks, check_vma):
    schedule = make_schedule(name, stages, microbatches, chunks)
    got = toy(schedule, stages, microbatches, check_vma)
    assert_trees_close(got, toy(None, 1, microbatches), TOLERANCE)


@pytest.mark.parametrize(
    ('name', 'stages', 'microbatches', 'chunks', 'check_vma'),
    [('zero_bubble', 8, 3, 1, True), ('1f1b', 2, 5, 1, False), ('interleaved', 4, 4, 2, True)],
)
def test_auxiliary_loss_and_statistics(name, stages, microbatches, chunks, check_vma):
    check_toy(name, stages, microbatches, chunks, check_vma)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'stages', 'microbatches', 'chunks'),
    [
        *((name, 2, m, 1) for name in ('gpipe', '1f1b', 'zero_bubble') for m in (1, 2, 5)),
        *((name, 8, m, 1) for name in ('1f1b', 'zero_bubble') for m in (3, 8, 20)),
        ('1f1b', 1, 3, 1), ('interleaved', 2, 4, 2), ('interleaved', 4, 8, 2),
        ('interleaved', 2, 2, 4),
    ],
)  # fmt: skip
def test_auxiliary_loss_on_the_grid(name, stages, microbatches, chunks):
    check_toy(name, stages, microbatches, chunks, check_vma=True)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_1f1b_on_meshes(mesh):
    check(config(4), mesh, '1f1b')


@pytest.mark.slow
@pytest.mark.parametrize('microbatches', [2, 8])
def test_microbatches_below_and_above_the_stages(microbatches):
    check(config(microbatches), 'pp4', '1f1b')


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ('name', 'chunks', 'check_vma'),
    [
        ('1f1b', 1, True),
        ('zero_bubble', 1, True),
        ('zero_bubble', 1, False),
        pytest.param('1f1b', 1, False, marks=pytest.mark.slow),
        pytest.param('interleaved', 2, False, marks=pytest.mark.slow),
    ],
)
def test_all_axes(name, chunks, check_vma):
    check(config(4), 'pp2-fsdp2-tp2', name, chunks=chunks, check_vma=check_vma)


SCHEDULES = [('gpipe', 1), ('1f1b', 1), ('interleaved', 2), ('zero_bubble', 1)]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'chunks'), SCHEDULES)
@pytest.mark.parametrize('mesh', ['pp2-fsdp2-tp2', 'pp4'])
def test_documents(mesh, name, chunks):
    c = config(4, document_end=3)
    assert reference(c)[0] != reference(config(4))[0]
    check(c, mesh, name, chunks=chunks)


CUT = {'pp2-cp2': {'pp': 2, 'cp': 2}, 'pp2-cp4': {'pp': 2, 'cp': 4}}
CUT |= {'pp2-tp2-cp2': {'pp': 2, 'tp': 2, 'cp': 2}}
MESHES |= CUT


@pytest.mark.parametrize(
    ('mesh', 'name', 'chunks', 'style', 'attention', 'documents'),
    [
        ('pp2-tp2-cp2', 'zero_bubble', 1, 'ring', 'mla', True),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ('pp2-cp2', 'gpipe', 1, 'gather', 'mla', False),
                ('pp2-tp2-cp2', 'gpipe', 1, 'ring', 'gqa', True),
                ('pp2-cp4', '1f1b', 1, 'ring', 'mla', False),
                ('pp2-cp2', '1f1b', 1, 'ring', 'gqa', True),
                ('pp2-tp2-cp2', '1f1b', 1, 'gather', 'mla', True),
                ('pp2-cp2', 'interleaved', 2, 'ring', 'mla', True),
                ('pp2-tp2-cp2', 'interleaved', 2, 'ring', 'mla', False),
                ('pp2-cp4', 'interleaved', 2, 'gather', 'gqa', False),
                ('pp2-cp2', 'zero_bubble', 1, 'gather', 'gqa', False),
                ('pp2-cp4', 'zero_bubble', 1, 'ring', 'mla', True),
            )
        ),
    ],
)  # fmt: skip
def test_cut_sequences(mesh, name, chunks, style, attention, documents):
    """With the rule about the microbatch's tokens: the head is shared by the stages."""
    c = config(4, attention, attention_block=2, document_end=3 if documents else -1)
    c.cp_style = style
    check(c, mesh, name, chunks=chunks, check_vma=style == 'ring')


@pytest.mark.parametrize(
    ('kinds', 'mesh', 'name', 'chunks'),
    [
        ('both', 'pp2-tp2-cp2', 'zero_bubble', 1),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ('gqa', 'pp2-tp2-cp2', '1f1b', 1), ('mla', 'pp2-fsdp2-tp2', 'gpipe', 1),
                ('both', 'pp2-ep2-tp2', 'interleaved', 2), ('both', 'pp2-ep2-tp2', '1f1b', 1),
                ('mla', 'pp2-fsdp2-tp2', 'zero_bubble', 1),
                ('gqa', 'pp2-tp2-cp2', 'interleaved', 2),
            )
        ),
    ],
)  # fmt: skip
def test_kinds_of_layers(kinds, mesh, name, chunks):
    c = kinds_config(kinds, microbatches=2, moe='ep' in mesh)
    c.model.update(n_layers=4 * chunks + c.model.first_dense, attention_block=2)
    check(c, mesh, name, chunks=chunks, check_vma=kinds != 'mla')


@pytest.mark.slow
def test_dropout_and_remat():
    """Dropout keys know the microbatch and the layer, whatever stage it is on."""
    c = config(4, dropout=0.3)
    assert reference(c)[0] != reference(config(4))[0]
    c.model.remat = 'full'
    check(c, 'pp2-tp2', 'interleaved', chunks=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mesh', 'microbatches'),
    [('pp2', 4), ('pp4', 8), ('pp4', 2), ('pp4-tp2', 4), ('pp2-dp2', 4)],
)
def test_zero_bubble(mesh, microbatches):
    check(config(microbatches), mesh, 'zero_bubble')


def experts_config(microbatches: int):
    c = small_config(moe=True, microbatches=microbatches)
    c.model.update(n_layers=9, remat='full')
    return c


@pytest.mark.parametrize(
    ('name', 'chunks'), [('1f1b', 1), pytest.param('interleaved', 2, marks=pytest.mark.slow)]
)
def test_experts(name, chunks):
    """Loads, balance losses and leading dense layers as without a pipeline."""
    check(experts_config(2), 'pp2-ep2-tp2', name, chunks=chunks)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gpipe', 'zero_bubble'])
def test_experts_on_other_schedules(name):
    check(experts_config(4), 'pp2-ep2', name)


@pytest.mark.parametrize('name', ['1f1b', pytest.param('zero_bubble', marks=pytest.mark.slow)])
def test_weights_gathered_once_a_step(name):
    c = config(4)
    c.fsdp_gather = 'step'
    check(c, 'pp2-fsdp2-tp2', name)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_zero_bubble_rematerialized(remat):
    c = config(4, 'gqa', remat=remat)
    check(c, 'pp2-fsdp2-tp2', 'zero_bubble', check_vma=False)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='4 stages and the mesh pp=2; make the schedule for'):
        toy(make_schedule('1f1b', 4, 4), 2, 4)


@pytest.mark.parametrize('chunks', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_evaluation(chunks):
    """The forward schedule gives the nats of a mesh without stages."""
    c = experts_config(4)
    nats = []
    for mesh, n in (({}, 1), ({'pp': 2, 'ep': 2}, chunks)):
        d = c.copy_and_resolve_references()
        d.mesh.update(mesh)
        d.pipeline.update(schedule='1f1b' if n == 1 else 'interleaved', chunks=n)
        s = set_up(d)
        params = initial_params(s.model, s.mesh, chunks=n)
        sums = make_eval_step(s)(params, put_batch(batch_at, 0, s), np.ones(64, int))
        nats.append(float(sums['nats']))
        assert sums['targets'] == sums['bytes'] > 0
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


@pytest.mark.tpu
def test_step_compiles_for_tpu(tpu_devices):
    """With experts, whose exchange the CPU does not have, on pp 2 x ep 2 x tp 2."""
    c = experts_config(4)
    c.compute_dtype = 'bfloat16'
    c.mesh.update(pp=2, ep=2, tp=2)
    c.pipeline.schedule = 'zero_bubble'
    lowered = lower_train_step(setup(c, make_mesh(c.mesh, tpu_devices('v5e:2x4'))))
    assert 'ragged_all_to_all' in lowered.as_text()
    text = lowered.compile().as_text()
    assert 'conditional' in text  # idle slots are skipped, not computed and thrown away
    assert 'collective-permute' in text


@pytest.mark.tpu
def test_a_ring_within_stages_compiles_for_tpu(tpu_devices):
    """By ragged all-to-alls, which the CPU does not have: idle stages of other rings skip them."""
    c = config(4, 'mla', document_end=3, attention_block=4)
    c.compute_dtype = 'bfloat16'
    c.mesh.update(pp=2, cp=2, tp=2)
    c.pipeline.schedule = 'zero_bubble'
    validate(c, 8)
    compiled = lower_train_step(setup(c, make_mesh(c.mesh, tpu_devices('v5e:2x4')))).compile()
    text = compiled.as_text()
    assert 'ragged-all-to-all' in text
    assert 'conditional' in text
