"""Topologies by name, of devices that need not be there."""

import importlib.util

import pytest

from config import ConfigError
from planning.topology import topology_devices


@pytest.mark.parametrize('shape', ['', '0', 'x8', '4x', 'eight', '2x2x2'])
def test_a_shape_that_is_no_number_of_gpus_is_refused(shape):
    with pytest.raises(ConfigError, match='use h100:8'):
        topology_devices(f'h100:{shape}')


@pytest.mark.skipif(
    importlib.util.find_spec('jax_cuda12_plugin') is not None, reason='the compiler is here'
)
def test_the_missing_compiler_is_named():
    with pytest.raises(ConfigError, match='requirements/gpu'):
        topology_devices('h100:8')


@pytest.mark.tpu
def test_a_topology_that_libtpu_does_not_know_is_refused(tpu_devices):
    with pytest.raises(ConfigError, match='use one as v4:2x4x4'):
        topology_devices('v4:17')


@pytest.mark.gpu
@pytest.mark.parametrize(('name', 'kind'), [('h100:4x8', 'H100'), ('a100:8', 'A100')])
def test_gpus_of_nodes(name, kind, gpu_compiler):
    devices = topology_devices(name)
    assert len(devices) == (32 if '4x8' in name else 8)
    assert all(kind in d.device_kind and d.platform == 'gpu' for d in devices)
