"""The options and programs of the train step: for the compilers of TPUs and GPUs."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    assert_trees_close,
    batch_at,
    initial_state,
    on_mesh,
    set_up,
    small_config,
)

import train_step
from checkpoint import Checkpointer
from machine.chips import CHIPS
from parallel import make_mesh
from planning.compiled import read_cost
from planning.roofline import estimate
from planning.topology import topology_devices
from runtime.config_checks import validate
from runtime.resume import restore_state
from train_step import (
    COMPILER_OPTIONS,
    abstract_state,
    compiler_options,
    init_state,
    lower_train_step,
    make_train_step,
    put_batch,
    setup,
)

ATTENTION_AGAIN = 'custom_call_target="__cudnn[$]fmhaSoftmax".*rematted_computation'


def test_documents_end_with_the_token_of_the_data_if_they_are_isolated():
    config = small_config()
    assert setup(config, make_mesh({}), 7).model.document_end == -1
    config.data.isolate_documents = True
    assert setup(config, make_mesh({}), 7).model.document_end == 7
    config.model.document_end = 3
    assert setup(config, make_mesh({}), 7).model.document_end == 3


def test_skipped_steps_do_not_count_for_the_moments(monkeypatch):
    """Adam's first update moves each number by the rate, whatever was skipped before it."""
    compute = train_step.accumulated

    def poisoned(params, tokens_MBT, *args):
        grads, nll, stats = compute(params, tokens_MBT, *args)
        bad = jnp.any(tokens_MBT == -2)
        return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads), nll, stats

    def poison(step, rows):
        return np.where(batch_at(step, rows) < 0, -2, batch_at(step, rows))

    monkeypatch.setattr(train_step, 'accumulated', poisoned)
    config = small_config('gqa')
    config.model.update(n_layers=1, block=('dense',))
    config.optimizer.update(warmup_steps=10, weight_decay=0.0, clip_norm=0.0)
    s = set_up(config)
    state, step = initial_state(s), make_train_step(s)
    for _ in range(3):
        state, metrics = step(state, put_batch(poison, 0, s))
    assert (int(metrics['skipped']), int(state['step'])) == (3, 3)
    before = jax.device_get(state['params'])
    state, metrics = step(state, put_batch(batch_at, 0, s))
    assert float(metrics['lr']) == pytest.approx(4e-4)  # the schedule goes by steps
    moved = jax.tree.map(lambda x, y: np.abs(x - y), jax.device_get(state['params']), before)
    for leaf in jax.tree.leaves(moved):
        assert np.median(leaf) == pytest.approx(4e-4, rel=2e-3)


def test_averaged_weights_start_with_the_first_update():
    """Their mean has no share of the initial values, and skipped steps add nothing to it."""
    config = small_config('gqa', moe=True)
    config.optimizer.update(ema=0.9, warmup_steps=1)
    config.guard.update(history=1, spike_factor=1.001)
    s = set_up(config)
    state, step = initial_state(s), make_train_step(s)
    seen, skipped = [], 0
    for i in range(5):
        state, metrics = step(state, put_batch(batch_at, i, s))
        if int(metrics['skipped']) == skipped:
            seen.append(jax.device_get(state['params']))
        skipped = int(metrics['skipped'])
    assert 0 < skipped < 4
    weights = 0.9 ** np.arange(len(seen))[::-1]
    mean = jax.tree.map(lambda *x: np.average(x, axis=0, weights=weights), *seen)
    assert_trees_close(state['moments']['ema'], mean, 1e-6)


def test_compiler_options_override_the_table():
    name = 'xla_enable_async_all_gather'
    options = compiler_options(f'{name}=false xla_other=1', 'tpu')
    assert options == COMPILER_OPTIONS['tpu'] | {name: False, 'xla_other': '1'}
    assert compiler_options('', 'cpu') == {}


def test_compiler_options_reach_the_compiler():
    config = small_config()
    config.compiler_options = 'xla_no_such_option=1'
    with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
        lower_train_step(set_up(config)).compile()


@pytest.mark.tpu
def test_splash_and_offload_compile_for_tpu(tpu_devices):
    config = small_config()
    config.seq_len, config.compute_dtype, config.check_vma = 256, 'bfloat16', False
    config.mesh.update(fsdp=2, tp=2)
    config.model.update(
        attention_block=128, remat='full', remat_keep=('attention',), remat_offload=('residual',)
    )
    validate(config, 4)
    mesh = make_mesh(config.mesh, tpu_devices('v5e:2x2'))
    text = lower_train_step(setup(config, mesh)).compile().as_text()
    assert 'splash_mha_dkv' in text
    assert 'S(5)' in text, 'nothing lies in host memory'


@pytest.mark.tpu
def test_kernels_of_latents_and_experts_compile_for_tpu(tpu_devices):
    """Gradients are summed beside other work, and no query or key of 256 positions is in memory.

    What is kept is not computed again: there are three kinds of layers, and of the experts' eight
    matmuls and three gradients two are again, gate and up.
    """
    config = small_config(moe=True)
    config.seq_len, config.compute_dtype, config.check_vma = 256, 'bfloat16', False
    config.mesh.fsdp, config.fsdp_reduce = 4, 'all_to_all'
    config.model.update(
        d_model=256, d_expert=256, n_heads=2, q_rank=128, kv_rank=128, nope_dim=64, rope_dim=64,
        v_dim=64, attention_block=128, attention_kernel='latent', expert_kernel='megablox',
        remat='full', remat_keep=('attention', 'experts'),
    )  # fmt: skip
    validate(config, 4)
    mesh = make_mesh(config.mesh, tpu_devices('v4:2x2x1'))
    text = lower_train_step(setup(config, mesh)).compile().as_text()
    calls = re.findall(r'%(\w+?)[.\d]* = .*"tpu_custom_call"', text)
    assert collections.Counter(calls) == {
        'latent_attention_forward': 3, 'latent_attention_backward': 3, 'gmm': 8, 'tgmm': 3,
    }  # fmt: skip
    assert 'all-to-all-start' in text
    assert not re.search(r'(reduce-scatter|all-reduce)[.\d]* = bf16', text)
    assert not re.search(r'bf16\[\d+,2,256,128\]', text)


def gpu_config(ep: int):
    config = small_config(moe=True)
    config.seq_len, config.compute_dtype, config.check_vma = 256, 'bfloat16', False
    config.mesh.update(fsdp=2, ep=ep, tp=2)
    config.model.update(d_model=256, d_expert=512, remat='full')
    return config


@pytest.mark.gpu
def test_cudnn_exchange_and_offload_compile_for_gpu(gpu_compiler):
    """Attention that is kept is not computed again."""
    config = gpu_config(ep=2)
    config.model.update(remat_keep=('attention',), remat_offload=('residual', 'hidden'))
    validate(config, 8)
    mesh = make_mesh(config.mesh, topology_devices('h100:8'))
    text = lower_train_step(setup(config, mesh)).compile().as_text()
    assert '__cudnn$fmhaSoftmaxBackward' in text
    assert not re.search(ATTENTION_AGAIN, text)
    assert 'ragged-all-to-all' in text
    assert 'S(5)' in text, 'nothing lies in host memory'


@pytest.mark.gpu
def test_experts_of_gpus_meet_their_own_rows_only(gpu_compiler):
    """The matmuls are those of the estimate, where `lax.ragged_dot` would do six times as many."""
    h100, config = CHIPS['h100'], gpu_config(ep=1)
    mesh = make_mesh(config.mesh, topology_devices('h100:4'))
    text = lower_train_step(setup(config, mesh)).compile().as_text()
    expected = sum(w.flops for w in estimate(config, h100).work)
    assert read_cost(text, mesh, h100).flops == pytest.approx(expected, rel=0.05)
    assert re.search(ATTENTION_AGAIN, text)


def test_a_step_is_compiled_once(tmp_path):
    """A new state, one that a step returns and a restored one are laid out alike: jit compiles a
    program for each layout."""
    s = set_up(on_mesh(small_config(), (1, 2, 2)))
    batch = put_batch(functools.partial(batch_at, seq_len=s.config.seq_len), 0, s)
    new = init_state(s)
    first = jax.tree.map(lambda x: (x.sharding, x.committed), new)

    def check(state):
        for x, (sharding, committed) in zip(
            jax.tree.leaves(state),
            jax.tree.leaves(first, is_leaf=lambda x: isinstance(x, tuple)),
            strict=True,
        ):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
            assert x.committed == committed

    state, _ = make_train_step(s)(new, batch)
    check(state)
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        check(restore_state(checkpoints, 1, abstract_state(s)))
