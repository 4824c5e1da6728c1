"""The kernel that makes heads of latents, interpreted, against the formula; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import small_config

from config import ConfigError
from layers import kernels
from layers.attention_kernels import ATTENTION_KERNELS
from layers.latent_kernel import Latents, heads_of_step, latent_attention, latent_rules, rotation
from layers.rope import Positions, rope
from machine.chips import CHIPS
from parallel import P, Param, make_mesh, ones, sum_gradients
from planning.hlo import Instruction
from planning.prices import KERNEL_EFFICIENCY, latent_flops, tpu_price
from train_step import varying_params

B, T, N, RANKS, NOPE, VALUE = 2, 16, 4, (6, 8), 4, 64


def example(half: int) -> tuple[Latents, tuple, jax.Array]:
    """Latents of heads of 4 + 2 · half numbers, angles, and the gradient of the output."""
    draw = iter(jax.random.split(jax.random.key(half), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(draw), shape)

    H = NOPE + 2 * half
    shared = normal(B, T, H).at[..., :NOPE].set(0)
    w_k = normal(N, RANKS[1], H).at[..., NOPE:].set(0)
    angles = normal(T, half)
    x = Latents(
        normal(B, T, RANKS[0]), normal(B, T, RANKS[1]), shared, normal(N, RANKS[0], H), w_k,
        normal(N, RANKS[1], VALUE),
    )  # fmt: skip
    return x, (jnp.cos(angles), jnp.sin(angles)), normal(B, T, N * VALUE)


def plain(x: Latents, table: tuple, scale: float) -> jax.Array:
    q = rope(jnp.einsum('btr,nrh->bnth', x.queries, x.w_q), Positions(*table))
    k = jnp.einsum('btr,nrh->bnth', x.keys, x.w_k) + x.shared[:, None]
    v = jnp.einsum('btr,nrh->bnth', x.keys, x.w_v)
    scores = jnp.einsum('bnth,bnsh->bnts', q, k) * scale
    scores = jnp.where(np.tri(T, dtype=bool), scores, -jnp.inf)
    out = jnp.einsum('bnts,bnsv->btnv', jax.nn.softmax(scores), v)
    return out.reshape(B, T, -1)


@pytest.mark.parametrize('half', [2, 0], ids=['rotary', 'nope'])
def test_heads_of_latents_are_softmax_attention(half):
    """Four blocks of a sequence, two heads a step, and two steps whose gradients add up."""
    x, table, d_out = example(half)
    assert heads_of_step(N, VALUE) == 2
    turn = rotation(*table, NOPE + 2 * half)
    assert (turn is None) == (half == 0)
    got, pull = jax.vjp(lambda x: latent_attention(x, turn, half, 0.3, 4, True), x)
    with jax.default_matmul_precision('highest'):
        want, plain_pull = jax.vjp(lambda x: plain(x, table, 0.3), x)
        wanted = plain_pull(d_out)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(pull(d_out)[0], wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_bfloat16_is_as_near_as_its_products():
    """Sums are float32, so that the error is that of rounding what is multiplied."""
    x, table, _ = example(2)
    turn = rotation(*table, NOPE + 4)
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), x)
    got = latent_attention(low, turn, 2, 0.1, 4, True)
    assert got.dtype == jnp.bfloat16
    want = plain(jax.tree.map(lambda a: a.astype(jnp.float32), low), table, 0.1)
    assert np.linalg.norm(got.astype(jnp.float32) - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize(('heads', 'size', 'group'), [(12, 64, 2), (8, 128, 1), (3, 64, 3)])
def test_a_step_has_heads_that_fill_lanes(heads, size, group):
    assert heads_of_step(heads, size) == group


def kernel_config(**changes):
    config = small_config()
    config.seq_len = 512
    config.model.attention_block = 128
    config.update({name: value for name, value in changes.items() if name != 'model'})
    config.model.update(changes.get('model', {}))
    return config


@pytest.mark.parametrize(
    ('changes', 'part'),
    [
        ({'model': {'attention': 'gqa'}}, "'mla' in every layer"),
        ({'model': {'attention_block': 64}}, 'makes 8 of 64'),
        ({'seq_len': 640}, 'makes 5 of 128'),
        ({'model': {'attention_block': 384}}, 'makes 1.33333 of 384'),
        ({'model': {'window': 5}}, 'a window'),
        ({'model': {'attention_sinks': True}}, 'sinks'),
        ({'data': {'isolate_documents': True}}, 'documents'),
        ({'model': {'document_end': 3}}, 'documents'),
        ({'mesh': {'cp': 2}}, 'mesh.cp'),
        ({'model': {'kv_rank': 8192}}, 'MiB'),
    ],
)
def test_what_the_kernel_does_not_take(changes, part):
    assert not list(latent_rules(kernel_config(), 8))
    found = list(latent_rules(kernel_config(**changes), 8))
    assert len(found) == 1
    assert part in found[0]


def test_it_is_taken_by_name_alone():
    layers = [(kernel_config(check_vma=False), 8)]
    assert kernels.choose(ATTENTION_KERNELS, 'auto', layers, 'tpu') == 'splash'
    for name, platform in (('latent', 'tpu'), ('latent_interpreted', 'cpu')):
        assert kernels.choose(ATTENTION_KERNELS, 'latent', layers, platform) == name
    checked = [(kernel_config(), 8)]
    assert kernels.choose(ATTENTION_KERNELS, 'latent', checked, 'tpu') == 'latent'
    with pytest.raises(ConfigError, match='use check_vma=False'):
        kernels.choose(ATTENTION_KERNELS, 'latent', checked, 'cpu')


@pytest.mark.parametrize(('name', 'scores', 'passes'), [('forward', 2, 1), ('backward', 5, 3)])
def test_its_price(name, scores, passes):
    """The causal half of the matmuls of scores, and those that make heads of latents."""
    arguments = (
        'bf16[8,1024,96]{2,1,0}, bf16[8,1024,128]{2,1,0}, bf16[8,1024,80]{2,1,0}, '
        'bf16[12,96,80]{2,1,0}, bf16[12,128,80]{2,1,0}, bf16[12,128,64]{2,1,0}, f32[1024,80]{1,0}'
    )
    text = (
        f'custom-call(%a), custom_call_target="tpu_custom_call", '
        f'operand_layout_constraints={{{arguments}}}'
    )
    call = Instruction(f'%latent_attention_{name}.3', 'bf16[8,1024,768]', 'custom-call', text)
    pairs, tokens = 8 * 12 * 1024 * 1024 / 2, 8 * 1024 * 12
    heads = 96 * 80 + 128 * 80 + 128 * 64
    want = 2 * pairs * 80 * scores + 2 * tokens * heads * passes
    assert latent_flops(call) == want
    price = tpu_price(call, None, CHIPS['v4'])
    assert price.unpriced == 0
    assert price.seconds == want / (CHIPS['v4'].flops * KERNEL_EFFICIENCY)
    other = Instruction('%fusion.3', call.shape, call.op, text)
    assert latent_flops(other) == 0


@pytest.mark.parametrize('half', [32, 0], ids=['rotary', 'nope'])
def test_it_lowers_for_tpu(half):
    """With its replication types checked."""
    H = 64 + 2 * half
    shapes = [(2, 512, 128)] * 2 + [(2, 512, H)] + [(12, 128, H)] * 2 + [(12, 128, 64)]
    x = Latents(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))
    turn = rotation(jnp.ones((512, half)), jnp.ones((512, half)), H)

    def gradient(x: Latents) -> Latents:
        def loss(x: Latents) -> jax.Array:
            return latent_attention(x, turn, half, 0.1, 128).astype(jnp.float32).sum()

        return sum_gradients(jax.grad(loss)(varying_params(x, declared)), declared)

    declared = jax.tree.map(lambda a: Param(a.shape, P(), ones), x)
    checked = jax.shard_map(gradient, mesh=make_mesh({}), in_specs=P(), out_specs=P())
    text = jax.jit(checked).trace(x).lower(lowering_platforms=('tpu',)).as_text()
    for name in ('forward', 'backward'):
        assert f'latent_attention_{name}' in text
