"""Topologies by name, of devices that need not be there."""

import importlib.util
import math
import re

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from config import ConfigError
from machine.chips import CHIPS
from parallel import FSDP, all_gather, make_mesh
from planning import report, topology
from planning.topology import (
    check_topology,
    compiler_versions,
    slice_arguments,
    topology_devices,
)


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


@pytest.mark.parametrize(
    ('name', 'wrap'),
    [
        ('v4:2x4x4', '000'),
        ('v5p:2x2x2', '000'),
        ('v4:4x4x4', '111'),
        ('v5p:4x4x8_twisted', '111'),
        ('v5p:16x16x24', '111'),
        ('tpu7x:2x4x4', '000'),
        ('tpu7x:4x4x12', '111'),
        ('v5e:4x4', '000'),
        ('v6e:8x8', '000'),
        ('v6e:8x16', '010'),
        ('v5e:16x16', '110'),
    ],
)
def test_links_join_the_ends_of_whole_cubes_and_of_dimensions_of_16(name, wrap):
    # As listed in accelerator_to_spec_map.py of MaxText 0.2.5, and at cloud.google.com/tpu/docs.
    given = slice_arguments(name)
    assert given['wrap'] == tuple(c == '1' for c in wrap)
    assert ('chip_config_name' in given) == name.startswith('v4:')


@pytest.mark.parametrize(
    ('shape', 'chips'), [('1x1', 1), ('2x2', 4), ('2x4', 8), ('4x4', 4), ('2x2x2', 4)]
)
def test_chips_of_a_host(shape, chips):
    chip = 'v5p' if shape.count('x') == 2 else 'v6e'
    assert math.prod(slice_arguments(f'{chip}:{shape}')['chips_per_host_bounds']) == chips


@pytest.mark.parametrize(
    ('version', 'other'), [('0.0.42.1', False), ('0.0.52', True), ('0.0.421', True)]
)
def test_a_compiler_that_jax_is_not_made_for_is_named(version, other, monkeypatch):
    needs = ['jaxlib==1.0', 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(topology.importlib.metadata, 'requires', lambda _: needs)
    text = report.compiler_text({'libtpu': version, 'jax': '1.0'})
    assert text.startswith(f'libtpu {version}, jax 1.0')
    assert ('made for libtpu 0.0.42: pip install' in text) == other


def test_the_compiler_for_gpus_is_named_by_its_plugin(monkeypatch):
    installed = {'jax': '1.0', 'jax-cuda12-plugin': '1.0', 'libtpu': '0.0.1'}
    monkeypatch.setattr(topology, '_version', installed.get)
    compiler = compiler_versions('gpu')
    assert compiler == {'jax-cuda12-plugin': '1.0', 'jax': '1.0'}
    assert report.compiler_text(compiler) == 'jax-cuda12-plugin 1.0, jax 1.0'


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


@pytest.mark.tpu
@pytest.mark.parametrize(('name', 'hosts'), [('v5e:2x4', 1), ('v6e:4x4', 4), ('v5p:4x4x4', 16)])
def test_devices_are_listed_host_by_host(name, hosts, tpu_devices):
    found = [d.process_index for d in tpu_devices(name)]
    assert found == sorted(found)
    assert len(set(found)) == hosts


@pytest.mark.tpu
def test_a_gather_over_a_whole_cube_stays_one(tpu_devices):
    """Without links that join its ends the compiler takes an all-reduce of the whole array."""

    def collectives(**more) -> set[str]:
        mesh = make_mesh({FSDP: 64}, tpu_devices('v5p:4x4x4', **more))
        sharding = NamedSharding(mesh, P(FSDP))
        x, w = (
            jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=sharding)
            for shape in ((64 * 256, 1024), (1024, 4096))
        )
        product = jax.shard_map(
            lambda x, w: x @ all_gather(w, FSDP, 0),
            mesh=mesh, in_specs=P(FSDP), out_specs=P(FSDP),
        )  # fmt: skip
        text = jax.jit(product).lower(x, w).compile().as_text()
        return set(re.findall(r'(?<= )(?:all-gather|all-reduce)(?=\()', text))

    assert collectives() == {'all-gather'}
    assert collectives(wrap=(False, False, False)) == {'all-reduce'}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('name', 'kind'),
    [('h100:4x8', 'H100'), ('a100:8', 'A100'), ('b200:8', 'B200'), ('gb200:8', 'GB200')],
)
def test_gpus_of_nodes(name, kind, gpu_compiler):
    devices = topology_devices(name)
    assert len(devices) == (32 if '4x8' in name else 8)
    assert all(kind in d.device_kind and d.platform == 'gpu' for d in devices)
