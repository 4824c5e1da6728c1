"""Matmuls in 8 bits: rounding, products and gradients by hand, kernels, meshes, and a short run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import batch_at, initial_state, set_up, small_config
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from config import ConfigError, ModelConfig, model_config
from layers import float8
from layers.attention import mla_params
from layers.dense import linear, weight, weights
from layers.expert_kernels import EXPERT_KERNELS, grouped_swiglu
from machine.chips import CHIPS
from parallel import FSDP, TP, P, Param, Tree, make_mesh, normal
from planning.roofline import Estimate, estimate
from runtime.config_checks import validate
from train_step import make_train_step, put_batch

TOP = {float8.E4M3: 240.0, float8.E5M2: 57344.0}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# ---------------------------------------------------------------------------------------------
# Rounding
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('kind', TOP)
def test_scales_are_the_largest_powers_of_two_that_fit(kind, dtype):
    for size in (1.0, 1.75, 1.7578125, 1.875, 1.8828125, 2.0**-40, 3e30, 1e-30, 240, 449):
        x = jnp.array([size, -size / 3, size / 200, 0], dtype)
        found = float8.round_all(x, kind)
        scale, largest = float(found.scale), float(x[0])
        assert np.log2(scale) % 1 == 0
        assert largest / scale <= TOP[kind] < 2 * largest / scale
        # rounded as another library rounds
        want = (np.asarray(x, np.float64) / scale).astype(kind).astype(np.float64) * scale
        np.testing.assert_array_equal(np.asarray(found.wide(), np.float64), want)


@pytest.mark.parametrize(('kind', 'alike', 'most'), [(float8.E4M3, 12, 16), (float8.E5M2, 28, 31)])
def test_scales_of_their_own_round_alike(kind, alike, most):
    """A larger number beside them changes numbers that it makes subnormal, and those little."""
    x = 2.0 ** jnp.linspace(-40, 0, 9999)
    for largest in (1.0, 1.75, 1.7578125, 1.875, 1.8828125):
        own, shared = (
            np.asarray(float8.rounded(x, kind, n * largest).wide())
            for n in (jnp.float32(1), jnp.float32(8))
        )
        far, size = np.abs(own - shared) / (8 * largest), np.asarray(x) / (8 * largest)
        assert 0 < far.max() < 2.0**-most
        assert (far[size >= 2.0**-alike] == 0).all()
        assert (far[size < 2.0 ** (-alike - 3)] > 0).any()


def test_zeros_stay_zeros_and_what_is_not_finite_shows():
    np.testing.assert_array_equal(float8.as_e4m3(jnp.zeros((2, 3))), 0)
    for bad in (np.inf, -np.inf, np.nan):
        for as_kind in (float8.as_e4m3, float8.as_e5m2):
            rows = as_kind(jnp.array([[1.0, bad], [1.0, 2.0]]))
            assert not np.isfinite(rows[0, 1])
            np.testing.assert_array_equal(rows[1], [1.0, 2.0])


def test_what_rematerialization_saves_is_what_was_rounded():
    """Its reduce_precision makes NaN of the upper numbers of e4m3; TOP stays below them."""

    def f(x):
        saved = checkpoint_name(float8.round_all(x, float8.E4M3), 'saved')
        return jnp.sum(saved.wide() * x)

    save = jax.checkpoint_policies.save_only_these_names('saved')
    x = jnp.linspace(-1, 1, 999)
    value, gradient = jax.jit(jax.value_and_grad(jax.checkpoint(f, policy=save)))(x)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


# ---------------------------------------------------------------------------------------------
# Linear layers
# ---------------------------------------------------------------------------------------------


def model_of(matmul_type: str) -> ModelConfig:
    return dataclasses.replace(model_config(small_config()), matmul_type=matmul_type)


def by_hand(x: np.ndarray, kind: jnp.dtype, axis: int | None) -> np.ndarray:
    """The definition in float64, with the casts of ml_dtypes."""
    x = np.asarray(x, np.float64)
    scale = 2.0 ** np.floor(np.log2(TOP[kind] / np.abs(x).max(axis=axis, keepdims=True)))
    return (x * scale).astype(kind).astype(np.float64) / scale


def on_a_mesh(declared: Param, sizes: dict[str, int]):
    """Returns (x, w, d) -> output and both gradients of a linear layer, whose numbers are whole
    here and sharded over fsdp and tp there. The batch is cut over fsdp."""
    mesh = make_mesh(sizes)
    takes = declared.spec[0] == TP  # its input is cut over tp, and its output a partial sum
    x_spec, y_spec = P(FSDP, None, TP if takes else None), P(FSDP, None, None if takes else TP)

    def f(x, w, d):
        def share(x, w):
            return linear(x, weights({'w': w}, {'w': declared}, x.dtype, model_of('fp8'))['w'])

        y, (dx, dw) = (lambda y, pull: (y, pull(d)))(*jax.vjp(share, x, w))
        return (jax.lax.psum(y, TP) if takes else y), (dx if takes else jax.lax.psum(dx, TP)), dw

    specs = (x_spec, declared.spec, y_spec)
    run = jax.shard_map(
        f, mesh=mesh, in_specs=specs, out_specs=(y_spec, x_spec, declared.spec), check_vma=False
    )
    put = [NamedSharding(mesh, spec) for spec in specs]
    return lambda *arrays: jax.jit(run)(*(jax.device_put(a, s) for a, s in zip(arrays, put)))  # noqa: B905


UP, DOWN = weight((24, 32), P(FSDP, TP), 1.0), weight((24, 32), P(TP, FSDP), 1.0)


def inputs() -> tuple[jax.Array, ...]:
    """Tokens and gradients whose sizes differ by orders of magnitude."""
    sizes = 10.0 ** jnp.arange(-3, 3)[None, :, None]
    return draw(4, 6, 24) * sizes, draw(24, 32, seed=1), draw(4, 6, 32, seed=2) * sizes[:, ::-1]


def test_products_and_gradients_are_those_of_the_rounded_numbers():
    x, w, d = inputs()
    y, dx, dw = on_a_mesh(UP, {})(x, w, d)
    x8, w8 = by_hand(x, float8.E4M3, -1), by_hand(w, float8.E4M3, None)
    d8, d8_all = by_hand(d, float8.E5M2, -1), by_hand(d, float8.E5M2, -1)
    assert distance(y, x8 @ w8) < 1e-6
    assert distance(dx, d8 @ w8.T) < 1e-6
    assert distance(dw, np.einsum('bti,bto->io', x8, d8_all)) < 1e-6
    # and these differ from the exact ones by the formats' errors: 2^-4 and 2^-3 at most a number
    assert 0.01 < distance(y, x @ w) < 2**-4
    assert 0.02 < distance(dx, d @ w.T) < 2**-3
    assert 0.02 < distance(dw, jnp.einsum('bti,bto->io', x, d)) < 2**-3


@pytest.mark.parametrize('declared', [UP, DOWN], ids=['up', 'down'])
@pytest.mark.parametrize('sizes', [{'fsdp': 4}, {'tp': 4}, {'fsdp': 2, 'tp': 4}], ids=str)
def test_every_mesh_rounds_alike(declared, sizes):
    """The largest number of the weight lies on one device alone, and so do those of activations."""
    x, w, d = inputs()
    w, x, d = w.at[0, 0].set(9.0), x.at[:, :, 1].multiply(8), d.at[:, :, 2].multiply(8)
    want, got = on_a_mesh(declared, {})(x, w, d), on_a_mesh(declared, sizes)(x, w, d)
    for a, b in zip(got, want, strict=True):
        assert distance(a, b) < 2e-5


def test_rematerialization_changes_no_gradient():
    """Of what it saves, numbers below 2^-6 of e4m3 would be zeros, were they floats."""
    x, w, d = draw(2, 4, 24), draw(24, 32, seed=1), draw(2, 4, 32, seed=2)
    x, w = x.at[..., 1:9].multiply(2.0**-12), w.at[1:9].multiply(2.0**-12)

    def gradients(wrap):
        def f(x, w):
            w = weights({'w': w}, {'w': UP}, x.dtype, model_of('fp8'))['w']
            return jnp.sum(linear(x, w) * d)

        f = wrap(f)
        run = jax.shard_map(
            jax.grad(f, (0, 1)), mesh=make_mesh({}), in_specs=P(), out_specs=P(), check_vma=False
        )
        return jax.jit(run)(x, w)

    save = jax.checkpoint_policies.everything_saveable
    want, got = gradients(lambda f: f), gradients(functools.partial(jax.checkpoint, policy=save))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)
    assert np.abs(want[1][1:9]).min() > 0


def test_no_mesh_decides_what_is_multiplied_in_8_bits():
    """A ring over cp uses what makes values of latents several times over."""
    found = []
    for cp, style in ((1, 'ring'), (2, 'ring'), (2, 'gather')):
        cfg = dataclasses.replace(model_of('fp8'), cp=cp, cp_style=style)
        found.append({name: p.multiplied for name, p in mla_params(cfg).items()})
    assert found[1] == found[2] == found[0]
    assert found[0]['w_kv_down']
    assert found[0]['w_o']


# ---------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------

SIZES = (3, 0, 9, 20)


def of_experts(kernel: str, matmul_type: str) -> tuple[jax.Array, Tree]:
    """Returns the result of four experts, one of them without rows, and the gradients of rows and
    matrices. Rows of no group hold what no kernel may read."""
    up, down = (
        Param((4, 8, 16), P(None, None, None), normal(1.0), inputs=1, outputs=1, linear=True),
        Param((4, 16, 8), P(None, None, None), normal(1.0), inputs=1, outputs=1, linear=True),
    )
    declared = {'w_gate': up, 'w_up': up, 'w_down': down}
    w = {name: draw(*p.shape, seed=i) for i, (name, p) in enumerate(declared.items())}
    rows = sum(SIZES)
    behind = EXPERT_KERNELS[kernel].compute.behind(rows)
    x = jnp.pad(draw(rows, 8, seed=4), ((0, behind), (0, 0)), constant_values=1e4)
    sizes = jnp.array(SIZES)

    def f(x, w):
        w = weights(w, declared, x.dtype, model_of(matmul_type))
        y = grouped_swiglu(x, w, sizes, kernel)[:rows]
        return jnp.vdot(y, draw(*y.shape, seed=5)), y

    @functools.partial(
        jax.shard_map, mesh=make_mesh({}), in_specs=P(), out_specs=P(), check_vma=False
    )
    def run(x, w):
        return jax.grad(f, (0, 1), has_aux=True)(x, w)

    (dx, dw), y = jax.jit(run)(x, w)
    return y, {'x': dx[:rows]} | dw


@pytest.mark.parametrize(
    'kernel', ['blocks', 'ragged_dot', 'pallas_interpreted', 'megablox_interpreted']
)
def test_kernels_of_experts_round_alike(kernel):
    y, gradients = of_experts(kernel, 'fp8')
    exact_y, exact = of_experts('blocks', 'compute')
    want_y, want = of_experts('blocks', 'fp8')
    assert distance(y, want_y) < 1e-5
    assert 0.01 < distance(y, exact_y) < 2**-3
    for name, gradient in gradients.items():
        assert distance(gradient, want[name]) < 1e-5, name
        assert 0.02 < distance(gradient, exact[name]) < 2**-2, name


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def losses(matmul_type: str, steps: int = 30) -> np.ndarray:
    """Trains on one batch over and over, in bfloat16."""
    config = small_config('gqa')
    config.model.update(n_layers=2, block=('dense',))
    config.compute_dtype, config.model.matmul_type = 'bfloat16', matmul_type
    config.optimizer.update(clip_norm=1.0, peak_lr=1e-2)
    s = set_up(config)
    state, step = initial_state(s), make_train_step(s)
    batches = functools.partial(batch_at, seq_len=config.seq_len)
    batch = put_batch(batches, 0, s)
    found = []
    for _ in range(steps):
        state, metrics = step(state, batch)
        found.append(float(metrics['loss']))
    return np.array(found)


def test_a_run_learns_as_in_bfloat16():
    want, got = losses('compute'), losses('fp8')
    assert want[-1] < want[0] - 0.5
    np.testing.assert_allclose(got, want, rtol=1e-2)
    assert np.abs(got / want - 1).max() > 1e-5  # and it is not the same


def h100_config(**model) -> ConfigDict:
    config = small_config('gqa', **model)
    config.data.path = 'none'
    config.mesh.fsdp = 4
    return config


def test_a_chip_without_these_matmuls_is_refused():
    config = small_config()
    config.model.matmul_type = 'fp8'
    validate(config, 1)
    for name in ('v4', 'v5p', 'v6e', 'a100'):
        with pytest.raises(
            ConfigError, match=f'{CHIPS[name].name} does no faster.*H100.*TPU7x|TPU7x'
        ):
            estimate(config, CHIPS[name])
    config.model.matmul_type = 'int8'
    with pytest.raises(
        ConfigError, match=r"model\.matmul_type='int8' is unknown; use one of compute"
    ):
        validate(config, 1)


@pytest.mark.parametrize('gather', ['layer', 'step'])
def test_plans_count_bytes_and_matmuls_in_8_bits(gather):
    """The head and the embedding stay as they are; so do weights that are gathered ahead."""

    def of(matmul_type: str):
        config = h100_config(moe=True)
        config.compute_dtype, config.fsdp_gather = 'bfloat16', gather
        config.model.matmul_type = matmul_type
        return estimate(config, CHIPS['h100'])

    def gathered(e: Estimate) -> float:
        return next(t.bytes for t in e.transfers if t.purpose == 'weights, gathered')

    chip, wide, narrow = CHIPS['h100'], of('compute'), of('fp8')
    blocks, head = (
        [w.matmul_seconds(chip) for e in (wide, narrow) for w in e.work if w.part == part]
        for part in ('blocks', 'head')
    )
    assert blocks[1] < 0.75 * blocks[0]
    assert head[1] == head[0]
    assert narrow.memory.gathered < wide.memory.gathered or gather == 'step'
    assert 0.5 < gathered(narrow) / gathered(wide) < (0.75 if gather == 'layer' else 1)
