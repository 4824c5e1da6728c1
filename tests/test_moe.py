"""The MoE layer against a plain loop over tokens and experts; routing, capacity, dispatch."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    assert_trees_close,
    batch_at,
    cpu_model,
    initial_state,
    on_mesh,
    on_one_device,
    set_up,
    small_config,
)

import train_step
from layers.expert_kernels import BLOCK, EXPERT_KERNELS, grouped_swiglu
from layers.moe import (
    inverted,
    moe,
    moe_params,
    moe_rules,
    permute,
    rank_within,
    regroup,
    route,
    update_biases,
)
from parallel import AXES, P, count, global_sum, init_params, make_mesh, varying
from train_step import setup


def layer_config(**changes):
    config = small_config(moe=True)
    config.model.update(changes)
    return cpu_model(config)


def layer_params(cfg):
    """Returns initial parameters, but for biases, which are random too."""
    params = init_params(jax.random.key(0), moe_params(cfg), make_mesh({}))

    def draw(path, x):
        name = path[-1].key
        if name not in ('bias', 'router_bias', 'b_gate', 'b_up', 'b_down'):
            return x
        key = jax.random.fold_in(jax.random.key(5), len(name))
        return (0.05 if name == 'bias' else 1.0) * jax.random.normal(key, x.shape)

    params = jax.tree_util.tree_map_with_path(draw, params)
    return params | {'router': 3 * params['router']}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def swiglu(x, w_gate, w_up, w_down, b_gate=0, b_up=0, b_down=0, limit=0):
    gate, up = x @ w_gate + b_gate, x @ w_up + b_up
    if limit:
        gate = np.minimum(gate, limit)
        return (gate * sigmoid(1.702 * gate) * (np.clip(up, -limit, limit) + 1)) @ w_down + b_down
    return (gate * sigmoid(gate) * up) @ w_down + b_down


def plain_choice(scores, bias, cfg):
    groups = (scores + bias).reshape(cfg.n_expert_groups, -1)
    best = np.sort(groups, axis=1)[:, -2 if cfg.group_score == 'top2' else -1 :].sum(axis=1)
    out = np.argsort(-best)[cfg.n_top_groups :]
    groups[out] = -np.inf
    return np.argsort(-groups.reshape(-1), kind='stable')[: cfg.experts_per_token]


def plain_moe(params, x_BTD, cfg):
    """A loop over tokens and their experts, in float64 -> output, load, dropped."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    B, T, _ = x_BTD.shape
    capacity = np.inf
    if cfg.capacity_factor:
        capacity = np.ceil(cfg.capacity_factor * cfg.experts_per_token * T / cfg.n_experts)
    out, load, dropped = np.zeros_like(x_BTD), np.zeros(cfg.n_experts), 0
    for b in range(B):
        taken = np.zeros(cfg.n_experts)
        for t in range(T):
            x = x_BTD[b, t]
            logits = x @ params['router'] + params.get('router_bias', 0)
            if cfg.router == 'sigmoid':
                scores = 1 / (1 + np.exp(-logits))
            else:
                scores = np.exp(logits) / np.exp(logits).sum()
            chosen = plain_choice(scores, params['bias'], cfg)
            weights = scores[chosen]
            if cfg.normalize_weights:
                weights = weights / weights.sum()
            for e, weight in zip(chosen, weights * cfg.routed_scale, strict=True):
                load[e] += 1
                taken[e] += 1
                if taken[e] > capacity:
                    dropped += 1
                    continue
                w = {name: m[e] for name, m in params['experts'].items()}
                out[b, t] += weight * swiglu(x, **w, limit=cfg.swiglu_limit)
            if cfg.n_shared_experts:
                gate = sigmoid(x @ params['shared_gate']) if cfg.shared_gate else 1
                out[b, t] += gate * swiglu(x, **params['shared'], limit=cfg.swiglu_limit)
    return out, load, dropped


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'router': 'softmax', 'normalize_weights': False},
        {'n_expert_groups': 1, 'n_top_groups': 1, 'n_shared_experts': 0},
        {'n_shared_experts': 2, 'experts_per_token': 1},
        {'capacity_factor': 0.5},
        {'shared_gate': True, 'router': 'softmax', 'group_score': 'max'},
        {'router_bias': True, 'expert_bias': True, 'swiglu_limit': 0.5, 'capacity_factor': 0.5},
    ],
    ids=str,
)
def test_layer_is_a_loop_over_tokens_and_experts(changes):
    cfg = layer_config(**changes)
    params = layer_params(cfg)
    x = np.random.default_rng(0).standard_normal((3, 16, cfg.d_model))
    want, load, dropped = plain_moe(params, x, cfg)
    got, stats = on_one_device(lambda p, x: moe(p, x, cfg))(params, jnp.float32(x))
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(stats['load'], load)
    assert stats['dropped'] == dropped
    assert (dropped > 0) == bool(cfg.capacity_factor)


def experts_on_mesh(cfg, params, x, ep):
    """The layer with its experts spread over `ep` devices, each with its rows of x."""

    def body(params, x):
        others = tuple(axis for axis in AXES if axis != 'ep')
        split = {'x': x, 'experts': params['experts']}
        alike = {name: p for name, p in params.items() if name != 'experts'}
        split = jax.tree.map(lambda y: varying(y, others), split)
        alike = jax.tree.map(lambda y: varying(y, AXES), alike)
        y, stats = moe(alike | {'experts': split['experts']}, split['x'], cfg)
        return y, global_sum(stats['dropped'])

    specs = {'router': P(), 'bias': P(), 'shared': P(), 'experts': P('ep')}
    f = jax.shard_map(
        body,
        mesh=make_mesh({'ep': ep}),
        in_specs=(specs, P('ep')),
        out_specs=(P(('ep', 'pp', 'dp', 'fsdp', 'cp', 'tp')), P()),
    )
    return jax.jit(f)(*jax.device_get((params, x)))


@pytest.mark.parametrize('buffer_factor', [0.0, 1.0, 8.0])
def test_buffers_drop_only_what_does_not_fit(buffer_factor):
    """All tokens want the experts of one peer: exact buffers take them, even ones a quarter."""
    cfg = layer_config(
        n_expert_groups=1, n_top_groups=1, experts_per_token=2, buffer_factor=buffer_factor
    )
    params = layer_params(cfg)
    params['bias'] = jnp.zeros(8).at[:2].set(10.0)
    x = jax.random.normal(jax.random.key(1), (4, 16, cfg.d_model))
    got, dropped = experts_on_mesh(cfg, params, x, 4)
    want, _, _ = plain_moe(params, np.asarray(x, np.float64), cfg)
    if buffer_factor == 1.0:
        assert dropped == 4 * 16 * 2 * 3 / 4
        # first come, first served: the positions of each device that fit are exact
        np.testing.assert_allclose(got[:, :4], want[:, :4], rtol=2e-4, atol=2e-5)
        assert np.abs(got[:, 4:] - want[:, 4:]).max() > 0.01
    else:
        assert dropped == 0
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('changes', [{'capacity_factor': 0.5}, {'buffer_factor': 1.0}], ids=str)
def test_drops_are_causal(changes):
    """Later positions change nothing before them, though choices are dropped."""
    cfg = layer_config(**changes)
    params = layer_params(cfg)
    a = jax.random.normal(jax.random.key(1), (4, 16, cfg.d_model))
    b = a.at[:, 9:].set(jax.random.normal(jax.random.key(2), (4, 7, cfg.d_model)))
    (out_a, dropped), (out_b, _) = (experts_on_mesh(cfg, params, x, 4) for x in (a, b))
    assert dropped > 0
    np.testing.assert_array_equal(out_a[:, :9], out_b[:, :9])


@pytest.mark.parametrize(
    'kernel', ['blocks', 'ragged_dot', 'pallas_interpreted', 'megablox_interpreted']
)
@pytest.mark.parametrize('sizes', [(0, 0, 0), (300, 0, 5), (128, 256, 1), (1, 2, 3)], ids=str)
def test_grouped_swiglu_and_its_gradients(sizes, kernel):
    check_grouped_swiglu(sizes, kernel, {}, 0.0)


BIASES = {'b_gate': (3, 5), 'b_up': (3, 5), 'b_down': (3, 6)}


@pytest.mark.parametrize(
    'kernel', ['blocks', 'ragged_dot', 'pallas_interpreted', 'megablox_interpreted']
)
@pytest.mark.parametrize(
    ('sizes', 'biases', 'limit'), [((130, 0, 5), BIASES, 1.5), ((1, 2, 3), BIASES, 0.0)], ids=str
)
def test_grouped_swiglu_with_biases_and_a_limit(sizes, biases, limit, kernel):
    check_grouped_swiglu(sizes, kernel, biases, limit)


def check_grouped_swiglu(sizes, kernel, biases, limit):
    """Compares with a SwiGLU of each row by the matrices of its group, and its autodiff."""
    rows = sum(sizes) + 7  # of no group
    keys = jax.random.split(jax.random.key(0), 5)
    behind = EXPERT_KERNELS[kernel].compute.behind(rows)
    x = jnp.pad(jax.random.normal(keys[0], (rows, 6)), ((0, behind), (0, 0)))
    shapes = {'w_gate': (3, 6, 5), 'w_up': (3, 6, 5), 'w_down': (3, 5, 6)}
    w = {n: jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys[1:], strict=False)}
    keys_b = jax.random.split(jax.random.key(1), 3)
    w |= {n: jax.random.normal(k, s) for (n, s), k in zip(biases.items(), keys_b, strict=False)}
    group = np.repeat(np.arange(4), [*sizes, 7 + behind])
    d = jnp.where((group < 3)[:, None], jax.random.normal(keys[4], (len(group), 6)), 0)

    def plain(x, w):
        w = jax.tree.map(lambda w: jnp.concatenate((w, jnp.zeros_like(w[:1])))[group], w)
        gate, up = (
            jnp.einsum('gd,gdf->gf', x, w[f'w_{name}']) + w.get(f'b_{name}', 0)
            for name in ('gate', 'up')
        )
        if limit:
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            h = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
        else:
            h = jax.nn.silu(gate) * up
        return jnp.einsum('gf,gfd->gd', h, w['w_down']) + w.get('b_down', 0)

    def grouped(x, w):
        return grouped_swiglu(x, w, jnp.array(sizes), kernel, limit)

    got, got_vjp = jax.vjp(grouped, x, w)
    want, want_vjp = jax.vjp(plain, x, w)
    np.testing.assert_allclose(got[group < 3], want[group < 3], rtol=1e-5, atol=1e-4)
    (dx, dw), (want_dx, want_dw) = got_vjp(d), want_vjp(d)
    np.testing.assert_allclose(dx[group < 3], want_dx[group < 3], rtol=1e-5, atol=1e-4)
    assert dw.keys() == want_dw.keys()
    for name, g in dw.items():
        np.testing.assert_allclose(g, want_dw[name], rtol=1e-4, atol=1e-3, err_msg=name)


def test_parameters_are_those_counted_by_hand():
    cfg = layer_config(
        d_model=7, n_experts=8, experts_per_token=2, d_expert=5, n_shared_experts=3,
        router_bias=True, expert_bias=True, shared_gate=True,
    )  # fmt: skip
    router, gate, correction = 7 * 8 + 8, 7, 8
    expert, shared = 3 * 7 * 5 + 5 + 5 + 7, 3 * 7 * 15
    assert count(moe_params(cfg)) == router + gate + correction + shared + 8 * expert
    active = count(moe_params(cfg), active=True)
    assert active == router + gate + correction + shared + 2 * expert


def test_permute_is_a_gather_both_ways():
    x = jax.random.normal(jax.random.key(0), (5, 3))
    index = jnp.array([7, 2, 99, 0, 9, 1])  # copies of rows; one out of range
    inverse = inverted(index, 10)
    got, vjp = jax.vjp(lambda x: permute(x, index, inverse, 2), x)
    rows = np.array([3, 1, -1, 0, 4, 0])
    np.testing.assert_array_equal(got, np.where(rows[:, None] < 0, 0, np.asarray(x)[rows]))
    d = jax.random.normal(jax.random.key(1), got.shape)
    want = np.zeros((5, 3), np.float32)
    for row, cotangent in zip(rows, np.asarray(d), strict=True):
        if row >= 0:
            want[row] += cotangent
    np.testing.assert_allclose(vjp(d)[0], want, rtol=1e-6)


def test_rank_within():
    group = np.random.default_rng(0).integers(0, 4, 50)
    want = [int(np.sum(group[:i] == g)) for i, g in enumerate(group)]
    np.testing.assert_array_equal(rank_within(jnp.array(group)), want)


def test_regroup_sorts_by_expert_and_peer():
    received = np.array([[2, 0, 1], [0, 3, 1]])  # of two peers, for three experts
    dest, sizes = regroup(jnp.array(received), slots=5)
    np.testing.assert_array_equal(sizes, [2, 3, 2])
    outside = 10 + BLOCK
    want = [0, 1, 5, outside, outside, 2, 3, 4, 6, outside]
    np.testing.assert_array_equal(dest, want)


def test_biases_move_towards_the_mean_load():
    params = {'0_moe': {'ffn': {'bias': jnp.zeros((1, 3)), 'router': 1}}, '1_dense': {'ffn': 2}}
    new = update_biases(params, {'0_moe': {'load': jnp.array([[1.0, 2.0, 3.0]])}}, 0.1)
    np.testing.assert_allclose(new['0_moe']['ffn']['bias'], [[0.1, 0, -0.1]])
    assert new['1_dense'] == params['1_dense']
    assert new['0_moe']['ffn']['router'] == 1


@pytest.mark.parametrize('bias_rate', [0.0, 0.02])
def test_biases_balance_a_skewed_router(bias_rate):
    """Tokens of one frequent word go to the same experts until the biases spread them."""
    config = small_config(moe=True)
    config.batch_size, config.steps = 4, 60
    config.model.update(
        n_layers=1, first_dense=0, block=('moe',), bias_rate=bias_rate, balance_loss=0.0,
        n_expert_groups=1, n_top_groups=1,
    )  # fmt: skip
    config.optimizer.update(peak_lr=1e-6, final_lr=1e-6)
    s = set_up(config)
    state, step = initial_state(s), train_step.make_train_step(s)
    ffn = state['params']['blocks']['0_moe']['ffn']
    ffn['router'] = ffn['router'] + jnp.linspace(0, 0.3, 8)  # acts with the tokens' mean
    for i in range(60):
        state, metrics = step(state, train_step.put_batch(batch_at, i, s))
    load = np.asarray(metrics['router']['0_moe']['load'][0])
    balanced = load.max() / load.mean() < 1.5
    assert balanced == bool(bias_rate), load


def test_sequence_balance_loss_is_lowest_when_even():
    """Uniform probabilities give exactly the weight of the loss: Σ f P = 1."""
    cfg = layer_config(router_z_loss=0.0, balance_loss=0.5, n_shared_experts=0)
    params = layer_params(cfg) | {'router': jnp.zeros((cfg.d_model, 8))}
    x = jax.random.normal(jax.random.key(1), (2, 16, cfg.d_model))
    loss = on_one_device(lambda p, x: moe(p, x, cfg)[1]['loss'])
    assert float(loss(params, x)) == pytest.approx(0.5, rel=1e-5)
    skewed = layer_params(cfg)
    skewed['router'] = 10 * skewed['router']
    skewed['bias'] = jnp.zeros(8)
    assert float(loss(skewed, x)) > 0.5


@pytest.mark.parametrize(
    ('remat', 'keep', 'again'),
    [('none', (), False), ('full', ('hidden',), False), ('full', (), True)],
)
@pytest.mark.parametrize('ep', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_experts_are_computed_again_only_where_asked(remat, keep, again, ep):
    """Loops and branches hide results from a policy of rematerialization: names show them."""
    config = small_config(moe=True)
    config.model.update(remat=remat, remat_keep=keep)
    config.mesh.update(ep=ep)
    text = train_step.lower_train_step(set_up(config)).compile().as_text()
    matmuls = re.findall(r'op_name="[^"]*/experts/[^"]*dot_general"', text)
    assert len(matmuls) >= 3 + 6
    assert any('rematted_computation' in name for name in matmuls) == again


# ---------------------------------------------------------------------------------------------
# The router alone. With the identity as its matrix, a token is its own logits.
# ---------------------------------------------------------------------------------------------


def route_logits(logits_BTE, cfg, of=lambda found: found):
    """Returns what `of` takes of `route`, as a function of the logits, and its value there."""
    E = logits_BTE.shape[-1]
    params = {'router': jnp.eye(E), 'bias': jnp.linspace(-3, 3, E)}
    f = on_one_device(lambda logits_BTE, params: of(route(params, logits_BTE, cfg)))

    def call(logits_BTE):
        return f(logits_BTE, params)

    return call, call(jnp.float32(logits_BTE))


GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden' / 'balance_loss.json').read_text())


@pytest.mark.parametrize('case', GOLDEN['cases'], ids=lambda case: case['router'])
def test_balance_loss_is_that_of_another_trainer(case):
    """By the code of Megatron-Core: tests/golden/make_balance_loss.py. It counts the best scores,
    whatever biases and groups make of the choice."""
    cfg = layer_config(
        router=case['router'], n_experts=8, experts_per_token=case['experts_per_token'],
        n_expert_groups=4, n_top_groups=2, balance_loss=1.0, router_z_loss=0.0,
    )  # fmt: skip
    logits_BTE = jnp.float32(case['logits'])
    f, loss = route_logits(logits_BTE, cfg, lambda found: found[2]['loss'])
    assert float(loss) == pytest.approx(case['loss'], rel=1e-5)
    np.testing.assert_allclose(jax.grad(f)(logits_BTE), case['gradient'], rtol=1e-4, atol=1e-7)


RELEASED = json.loads((pathlib.Path(__file__).parent / 'golden' / 'experts.json').read_text())


def arrays(tree):
    """Returns the arrays of a golden file."""
    if 'numbers' in tree:
        return jnp.float32(tree['numbers']).reshape(tree['shape'])
    return {name: arrays(x) for name, x in tree.items()}


@pytest.mark.parametrize('name', RELEASED['cases'])
def test_layer_is_that_of_released_models(name):
    """Output, load and gradients by the code of transformers: tests/golden/make_experts.py."""
    case = RELEASED['cases'][name]
    alone = {'n_expert_groups': 1, 'n_top_groups': 1, 'routed_scale': 1.0}
    cfg = layer_config(**RELEASED['sizes'] | alone | case['fields'])
    params, x_BTD, d_BTD = (arrays(case[part]) for part in ('params', 'x', 'cotangent'))
    bias = {} if 'bias' in params else {'bias': jnp.zeros(cfg.n_experts)}
    f = on_one_device(lambda p, x: moe(p, x, cfg))

    def total(params, x_BTD):
        out_BTD, stats = f(params | bias, x_BTD)
        return jnp.vdot(out_BTD, d_BTD), (out_BTD, stats['load'])

    (dw, dx), (out_BTD, load) = jax.grad(total, (0, 1), has_aux=True)(params, x_BTD)
    np.testing.assert_array_equal(load, case['load'])
    np.testing.assert_allclose(out_BTD, arrays(case['output']), rtol=1e-4, atol=1e-5)
    bias_gradient = {'bias': 0 * params['bias']} if 'bias' in params else {}
    want = arrays(case['gradients']) | bias_gradient  # it enters the choice and no weight
    assert_trees_close(dw | {'x': dx}, want, 1e-5)


@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('router', ['sigmoid', 'softmax'])
def test_router_is_exact_for_any_logits(router, normalize):
    """Weights, entropy and gradients, where scores underflow and where they saturate."""
    cfg = layer_config(
        router=router, normalize_weights=normalize, n_expert_groups=1, n_top_groups=1,
        balance_loss=1.0, router_z_loss=1e-9, routed_scale=1.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    sizes = np.array([1, 50, 100, 1000, 1e4])[:, None]
    shifts = np.array([-1e4, -1000, -100, -45, 0, 100, 1e4])[:, None]
    near = np.clip(shifts + rng.normal(size=(7, 8)), -1e4, 1e4)
    rows = [*sizes * rng.uniform(-1, 1, (5, 8)), *near]
    logits_BTE = np.float32(rows)[None]
    f, (expert_BTC, weight_BTC, stats) = route_logits(logits_BTE, cfg)
    x = np.float64(logits_BTE)
    log_score = -np.logaddexp(0, -x)
    if router == 'softmax':
        log_score = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
    log_prob = log_score - np.logaddexp.reduce(log_score, axis=-1, keepdims=True)
    log_weight = np.take_along_axis(log_score, np.asarray(expert_BTC), axis=-1)
    if normalize:
        log_weight -= np.logaddexp.reduce(log_weight, axis=-1, keepdims=True)
        np.testing.assert_allclose(np.sum(weight_BTC, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(weight_BTC, np.exp(log_weight), rtol=2e-5, atol=1e-30)
    entropy = -np.sum(np.exp(log_prob) * log_prob)
    assert float(stats['entropy']) == pytest.approx(entropy, rel=1e-5)

    def total(logits_BTE):
        _, weight_BTC, stats = f(logits_BTE)
        return jnp.sum(weight_BTC * jnp.arange(1.0, 4)) + stats['loss']

    gradient = np.asarray(jax.grad(total)(jnp.float32(logits_BTE)))
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0, 0]).max() > 0.01


@pytest.mark.parametrize('scale', [1.5, 0.0])
@pytest.mark.parametrize(('n_experts', 'experts_per_token'), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize('router', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('normalize', [True, False])
def test_a_router_without_gradient_is_refused(
    normalize, router, n_experts, experts_per_token, scale
):
    """And no other one: the rule is compared with the gradient of the weights."""
    config = small_config(moe=True)
    config.model.update(
        normalize_weights=normalize, router=router, n_experts=n_experts, n_expert_groups=1,
        experts_per_token=experts_per_token, n_top_groups=1, balance_loss=0.0, router_z_loss=0.0,
        routed_scale=scale,
    )  # fmt: skip
    errors = [e for e in moe_rules(config) if 'router no gradient' in e]
    logits_BTE = jax.random.normal(jax.random.key(0), (1, 4, n_experts))
    f, _ = route_logits(
        logits_BTE, cpu_model(config), lambda found: jnp.sum(found[1] * jnp.cos(found[0]))
    )
    gradient = float(jnp.abs(jax.grad(f)(logits_BTE)).max())
    assert len(errors) == (gradient < 1e-6), (gradient, errors)
    assert all('use ' in error for error in errors)


@pytest.mark.tpu
def test_step_compiles_for_tpu(tpu_devices):
    """With the grouped-matmul kernel and the ragged exchange, which the CPU does not have."""
    config = on_mesh(small_config(moe=True), (1, 2, 1, 2))
    mesh = make_mesh(config.mesh, tpu_devices('v5e:2x2'))
    lowered = train_step.lower_train_step(setup(config, mesh))
    assert 'ragged_all_to_all' in lowered.as_text()
    assert lowered.compile().memory_analysis().temp_size_in_bytes > 0
