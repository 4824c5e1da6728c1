"""Eight simulated CPU devices for every test: set before jax starts."""

import os

# Most of the time goes into compiling small programs that run for milliseconds: LLVM's part of
# that is halved. XLA's own passes, which decide what is computed, stay as they are.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture
def tpu_devices():
    """name of a topology -> its devices, which can be compiled for but are not there."""
    pytest.importorskip('libtpu', reason='needs libtpu: pip install -r requirements-tpu.txt')
    from jax.experimental import topologies

    return lambda name: topologies.get_topology_desc(platform='tpu', topology_name=name).devices
