"""Each verb's layout and transpose: with shares that add up, gradients are those of the sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parallel
from config import ConfigError
from parallel import AXES, P, Param, device_grid, make_mesh, normal, stacked, unshard, varying

MESH = {'dp': 2, 'fsdp': 2, 'tp': 2}


def on_mesh(f, in_specs, out_specs, check_vma):
    return jax.jit(
        jax.shard_map(
            f, mesh=make_mesh(MESH), in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
        )
    )


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('verb', ['all_gather', 'reduce_scatter', 'psum', 'local_slice'])
def test_gradient_of_the_summed_shares(verb, check_vma):
    """d/dx of Σ over devices of <weight of the device, verb(x)>, against a finite difference."""
    apply = {
        'all_gather': lambda x: parallel.all_gather(x, 'tp', 0),
        'reduce_scatter': lambda x: parallel.reduce_scatter(x, 'tp', 0),
        'psum': lambda x: parallel.psum(x, 'tp'),
        'local_slice': lambda x: parallel.local_slice(x, 'tp', 0),
    }[verb]

    def share(x):
        y = apply(x)
        weight = jnp.arange(y.size, dtype=jnp.float32) + 1 + 10 * jax.lax.axis_index(AXES)
        return jnp.sum(jnp.square(y.reshape(-1)) * weight)

    def total(x):  # x differs on each device
        return parallel.global_sum(share(x[0]))

    def gradient(x):
        return jax.grad(lambda x: share(x[0]))(x)

    spec = P(AXES)
    x = jax.random.normal(jax.random.key(0), (8, 4))
    grad = on_mesh(gradient, (spec,), spec, check_vma)(x)
    f = on_mesh(total, (spec,), P(), check_vma)
    direction = jax.random.normal(jax.random.key(1), x.shape)
    difference = (f(x + 0.05 * direction) - f(x - 0.05 * direction)) / 0.1  # exact for squares
    assert float(jnp.vdot(grad, direction)) == pytest.approx(float(difference), rel=1e-3)


def test_unshard_casts_matrices_then_gathers_fsdp_only():
    declared = {
        'w': Param((8, 4), P('fsdp', 'tp'), normal(1.0)),
        'gain': Param((3,), P(None), parallel.ones, matrix=False),
    }
    shapes = {}

    def f(params):
        w = unshard(params, declared, jnp.bfloat16)
        shapes.update({k: (x.shape, x.dtype) for k, x in w.items()})
        return parallel.varying(w['w'], ('pp', 'dp', 'ep'))[None]

    mesh = make_mesh(MESH)
    params = parallel.init_params(jax.random.key(0), declared, mesh)
    out_spec = P(('pp', 'dp', 'fsdp', 'ep'), None, 'tp')
    out = on_mesh(f, (parallel.specs(declared),), out_spec, True)(params)
    assert shapes == {'w': ((8, 2), jnp.bfloat16), 'gain': ((3,), jnp.float32)}
    for copy in out:
        np.testing.assert_array_equal(copy, params['w'].astype(jnp.bfloat16))
    program = jax.jit(
        jax.shard_map(
            lambda p: f(p).sum(keepdims=True)[0],
            mesh=mesh,
            in_specs=(parallel.specs(declared),),
            out_specs=P(AXES),
        )
    ).lower(params)
    gathers = [line for line in program.as_text().splitlines() if '"stablehlo.all_gather"' in line]
    assert gathers, 'no all-gather in the program'
    assert all('bf16' in line for line in gathers if 'f32' in line or 'bf16' in line)


def test_replication_is_checked():
    """A gradient that is not summed over an axis cannot leave as replicated over it."""
    with pytest.raises(ValueError, match='dp'):
        on_mesh(lambda x: varying(x, AXES), (P(),), P(), True)(jnp.ones(2))


def test_stacked_layers_differ_and_are_sharded_over_pp():
    p = stacked(Param((4, 2), P('fsdp', None), normal(1.0)), 3, 'pp')
    assert p.shape == (3, 4, 2)
    assert p.spec == P('pp', 'fsdp', None)
    x = parallel.init_params(jax.random.key(0), {'p': p}, make_mesh({}))['p']
    assert not np.array_equal(x[0], x[1])
    assert float(jnp.std(x)) == pytest.approx(1, abs=0.4)


def test_layers_of_chunks_are_those_without():
    """In their order, and each drawn anew: a stage's chunks are no copies of each other."""
    p = Param((4, 2), P('fsdp', None), normal(1.0))
    whole, cut = (stacked(p, 6, 'pp', chunks) for chunks in (1, 3))
    assert (cut.shape, cut.spec) == ((3, 2, 4, 2), P(None, 'pp', 'fsdp', None))
    x, y = (
        parallel.init_params(jax.random.key(0), {'p': q}, make_mesh({}))['p'] for q in (whole, cut)
    )
    np.testing.assert_array_equal(np.reshape(y, x.shape), x)
    assert len(np.unique(x)) == x.size


def test_axes_of_a_spec():
    assert parallel.spec_axes(P('tp', None, ('dp', 'fsdp'))) == ('tp', 'dp', 'fsdp')
    assert parallel.free_axes(P('tp', None, ('dp', 'fsdp'))) == ('pp', 'ep', 'cp')


@pytest.mark.tpu
def test_a_mesh_axis_may_split_a_dimension_of_the_torus(tpu_devices):
    mesh = make_mesh({'pp': 2, 'fsdp': 8, 'tp': 2}, tpu_devices('v5p:2x4x4'))
    assert mesh.devices.shape == (2, 1, 8, 1, 1, 2)
    assert len({device.id for device in mesh.devices.flat}) == 32


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that `device_grid` reads."""

    id: int
    slice_index: int
    platform: str = 'cpu'
    device_kind: str = 'none'
    process_index: int = 0


def slices_of(shape: tuple[int, ...], devices: list[Device]) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(device_grid(shape, devices))


def test_dp_alone_crosses_slices():
    # Devices of a slice need not be numbered consecutively.
    devices = [Device(i, slice_index=i % 2) for i in range(16)]
    shape = (2, 4, 1, 1, 1, 2)  # pp dp fsdp ep cp tp
    grid = device_grid(shape, devices)
    assert grid.shape == shape
    assert sorted(device.id for device in grid.flat) == list(range(16))
    found = slices_of(shape, devices)
    assert (found[:, :2] == 0).all()
    assert (found[:, 2:] == 1).all()


def test_slices_that_dp_cannot_cross():
    devices = [Device(i, slice_index=i // 8, platform='tpu') for i in range(16)]
    with pytest.raises(ConfigError, match=r'mesh\.dp=1; use all devices .* a multiple of 2'):
        device_grid((1, 1, 8, 1, 1, 2), devices)
    with pytest.raises(ConfigError, match=r'takes \{0: 8, 1: 4\} devices'):
        device_grid((1, 2, 6, 1, 1, 1), devices[:12])
    # GPUs of several nodes keep their order.
    gpus = [Device(i, slice_index=i // 8, platform='gpu') for i in range(16)]
    assert [device.id for device in device_grid((1, 1, 8, 1, 1, 2), gpus).flat] == list(range(16))
    assert (slices_of((1, 2, 4, 1, 1, 2), gpus)[:, 1] == 1).all()


@pytest.mark.tpu
def test_dp_alone_crosses_the_slices_of_a_topology(tpu_devices):
    found = slices_of((1, 4, 2, 1, 1, 2), tpu_devices('v5e:2x4', num_slices=2))
    assert (found[:, :2] == 0).all()
    assert (found[:, 2:] == 1).all()
