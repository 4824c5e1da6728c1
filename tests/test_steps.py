"""What the train step asks of the compiler."""

import jax
import pytest
from common import small_config

from parallel import make_mesh
from steps import COMPILER_OPTIONS, compiler_options, lower_train_step
from validation import validate


def test_compiler_options_override_the_table():
    name = 'xla_enable_async_all_gather'
    options = compiler_options(f'{name}=false xla_other=1', 'tpu')
    assert options == COMPILER_OPTIONS['tpu'] | {name: False, 'xla_other': '1'}
    assert compiler_options('', 'cpu') == {}


def test_compiler_options_reach_the_compiler():
    config = small_config()
    config.compiler_options = 'xla_no_such_option=1'
    with pytest.raises(jax.errors.JaxRuntimeError, match='xla_no_such_option'):
        lower_train_step(config, make_mesh(config.mesh)).compile()


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
    text = lower_train_step(config, mesh).compile().as_text()
    assert 'splash_mha_dkv' in text
    assert 'S(5)' in text, 'nothing lies in host memory'
