"""Peak memory is measured, and errors of too little memory come with remedies."""

import jax
import jax.numpy as jnp
import pytest
from common import on_mesh, small_config

from machine.memory import OutOfMemoryError, memory_use, out_of_memory_explained, remedies
from parallel import make_mesh
from train_step import lower_train_step, setup


def test_memory_use_grows_with_what_is_held():
    before = memory_use()['host_bytes']
    x = jnp.ones(before // 4, jnp.float32).block_until_ready()
    assert memory_use()['host_bytes'] > before + 0.4 * x.nbytes
    assert 'device_bytes' not in memory_use()  # not reported on CPU


def test_an_array_that_has_no_room_brings_remedies():
    with (
        pytest.raises(OutOfMemoryError, match='out of memory: RESOURCE_EXHAUSTED') as caught,
        out_of_memory_explained(small_config()),
    ):
        jnp.zeros((10**7, 10**7)).block_until_ready()
    text = str(caught.value)
    assert 'microbatches=1: with more of them, up to 16' in text
    assert "model.remat='none'" in text
    assert 'mesh.fsdp=1' in text


def test_other_errors_pass():
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_explained(small_config()):
        raise jax.errors.JaxRuntimeError('INTERNAL: something else')


def test_what_is_turned_already_is_no_remedy():
    config = on_mesh(small_config(microbatches=4), (1, 4, 1))
    config.model.update(remat='full')
    config.compute_dtype = 'bfloat16'
    assert [remedy.partition('=')[0] for remedy in remedies(config)] == ['mesh.fsdp']
    config.fsdp_gather = 'step'
    assert "'layer' gathers one layer at a time" in next(remedies(config))


@pytest.mark.tpu
def test_a_program_that_does_not_fit_brings_remedies(tpu_devices):
    config = small_config()
    config.batch_size, config.seq_len = 8192, 2048
    config.model.update(d_model=1024, d_ff=4096, n_layers=16)
    mesh = make_mesh({}, tpu_devices('v5e:2x2')[:1])
    with (
        pytest.raises(OutOfMemoryError, match=r'HBM(.|\n)*microbatches=1: with more'),
        out_of_memory_explained(config),
    ):
        lower_train_step(setup(config, mesh)).compile()
