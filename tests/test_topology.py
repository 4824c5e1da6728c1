"""Topologies by name, of devices that need not be there."""

import importlib.util

import pytest

from config import ConfigError
from machine.chips import CHIPS
from planning import topology
from planning.topology import check_topology, topology_devices


@pytest.mark.parametrize('shape', ['', '0', 'x8', '4x', 'eight', '2x2x2'])
def test_a_shape_that_is_no_number_of_gpus_is_refused(shape):
    with pytest.raises(ConfigError, match='use h100:8'):
        topology_devices(f'h100:{shape}')


@pytest.mark.parametrize(
    'name',
    ['v4:2x2x1', 'v4:4x4x2', 'v4:16x16x16', 'v5e:1x1', 'v5e:8x4', 'v6e:16x16', 'v5p:4x4x4',
     'v5p:16x16x24', 'v5p:4x4x8_twisted', 'v5p:4x8x8_untwisted', 'tpu7x:2x2x1', 'tpu7x:16x16x36',
     'h100:8', 'a100:16x4', 'b200:8', 'gb200:72', 'gb200:4x72'],
)  # fmt: skip
def test_a_topology_that_machines_have_is_known(name):
    check_topology(name)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v6e:32x32', 'slices of v6e are 1x1, .*16x16'),
        ('v5e:2x2x2', 'slices of v5e are 1x1'),
        ('v5e:2x2_twisted', 'slices of v5e are 1x1'),
        ('v5p:2x2x3', 'multiples of 4'),
        ('v5p:4x4', 'multiples of 4'),
        ('v5p:16x16x28', 'up to 6,144 chips'),
        ('v5p:4x4x4_twisted', 'no machine has'),
        ('tpu7x:2x2', 'slices of tpu7x are 2x2x1'),
        ('tpu7x:', 'slices of tpu7x are 2x2x1'),
        ('v4:17', 'slices of v4 are 2x2x1'),
        ('h100:16', 'at most 8 GPUs; name several nodes, as in h100:2x8'),
        ('gb200:73', 'at most 72'),
        ('v3:2x2', 'use a chip of v4, .*tpu7x.*gb200'),
        ('h100-96gb:8', 'use a chip of'),
        ('cpu', 'use a chip of'),
    ],
)
def test_a_topology_that_no_machine_has_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        check_topology(name)


def test_a_device_of_tpu7x_is_half_of_a_chip():
    chip = CHIPS['tpu7x']
    assert chip.of_chip == 2
    assert chip.flops * chip.of_chip == 2307e12
    assert all(c.of_chip == 1 for name, c in CHIPS.items() if name != 'tpu7x')


@pytest.mark.skipif(
    importlib.util.find_spec('jax_cuda12_plugin') is not None, reason='the compiler is here'
)
def test_the_missing_compiler_is_named():
    with pytest.raises(ConfigError, match='requirements/gpu'):
        topology_devices('h100:8')


@pytest.mark.tpu
def test_a_topology_that_libtpu_does_not_know_is_refused(tpu_devices):
    with pytest.raises(ConfigError, match='use one as v4:2x4x4'):
        topology.tpu_devices('v4:17')


@pytest.mark.tpu
@pytest.mark.parametrize(('name', 'count'), [('tpu7x:2x2x1', 8), ('v5e:2x4', 8), ('v4:2x2x1', 4)])
def test_a_slice_has_the_devices_of_its_chips(name, count, tpu_devices):
    devices = topology_devices(name)
    assert len(devices) == count
    assert {d.device_kind for d in devices} <= set(CHIPS[name.partition(':')[0]].kinds)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('name', 'kind'),
    [('h100:4x8', 'H100'), ('a100:8', 'A100'), ('b200:8', 'B200'), ('gb200:8', 'GB200')],
)
def test_gpus_of_nodes(name, kind, gpu_compiler):
    devices = topology_devices(name)
    assert len(devices) == (32 if '4x8' in name else 8)
    assert all(kind in d.device_kind and d.platform == 'gpu' for d in devices)
