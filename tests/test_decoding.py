"""Decoding with a cache gives what the whole model gives, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import cpu_model, initial_params, kinds_config, small_config
from jax import lax

import decoding
from config import ModelConfig
from decoding import (
    ROWS,
    Sampling,
    decode_logits,
    decoding_config,
    generate,
    next_starts,
    prefill_logits,
    weight_types,
)
from layers import mask
from model import logits, model_for, model_params
from parallel import (
    AXES,
    TP,
    P,
    free_axes,
    is_param,
    make_mesh,
    map_params,
    specs,
    varying,
)

CONTEXT = 32
PROMPTS = [[1, 2, 3], list(range(20, 42)), [7], [9, 9, 7, 9] * 4, [5, 4, 3, 7]]
MESHES = [{}, {'fsdp': 2, 'ep': 2, 'tp': 2}, {'dp': 2, 'ep': 4}, {'pp': 2, 'tp': 4}]


def config_of(name: str) -> ModelConfig:
    config = small_config('mla' if 'mla' in name else 'gqa', tied='tied' in name, moe='moe' in name)
    if 'multi-query' in name:
        config.model.n_kv_heads = 1
    if 'whole query' in name:
        config.model.update(q_rank=0, rope_scaling='yarn', rope_factor=4.0)
    if 'biases' in name:
        config.model.update(router_bias=True, expert_bias=True, swiglu_limit=0.5)
    if 'gate' in name:
        config.model.update(
            shared_gate=True, group_score='max', router='softmax', rope_scaling='llama3',
            rope_factor=4.0, latent_norm_eps=0.01,
        )  # fmt: skip
    if 'capacity' in name:
        config.model.update(capacity_factor=0.5, dropout=0.5)
    if 'kinds' in name:
        moe = 'moe' in name
        config = kinds_config(name.split()[0], moe=moe)
        if not moe:
            config.model.n_layers = 2 * len(config.model.block)
        if 'short' in name:
            config.model.delta_conv = 1
    if 'documents' in name:
        config.model.document_end = 7  # occurs in the prompts
    return cpu_model(config)


@functools.cache
def params_of(cfg: ModelConfig, sizes: tuple = (), chunks: int = 1):
    """Returns initial parameters, but for learned biases, which are random too."""

    def draw(path: tuple, x: jax.Array) -> jax.Array:
        name = path[-1].key
        if name not in ('router_bias', 'b_gate', 'b_up', 'b_down'):
            return x
        values = np.random.default_rng(len(name)).normal(0, 0.5, x.shape)
        return jax.device_put(values.astype(np.float32), x.sharding)

    params = initial_params(cfg, make_mesh(dict(sizes)), chunks=chunks)
    return jax.tree_util.tree_map_with_path(draw, params)


@functools.cache
def whole_model(cfg: ModelConfig):
    """jitted ids [8, CONTEXT] -> logits of all positions, on one device and without a cache."""

    def body(params, ids_BT):
        params, ids_BT = jax.tree.map(lambda x: varying(x, AXES), (params, ids_BT))
        return logits(params, ids_BT, cfg)

    sharded = jax.shard_map(body, mesh=make_mesh({}), in_specs=(P(), P()), out_specs=P(AXES))
    return functools.partial(jax.jit(sharded), params_of(cfg))


def cached_logits(params, ids_BT, lengths_B, *, cfg, n):
    """Logits after each of n tokens from the end of each prompt on: [n, B, V]."""
    declared = model_params(cfg)
    params = map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)
    ids_BT, lengths_B = varying(ids_BT, TP), varying(lengths_B, TP)
    first_BV, cache = prefill_logits(params, ids_BT, lengths_B, cfg, CONTEXT)
    rows = jnp.arange(len(lengths_B))

    def step(cache, i):
        positions_B = lengths_B + i
        starts_B = next_starts(ids_BT, positions_B, cfg)
        logits_BV, cache = decode_logits(
            params, cache, ids_BT[rows, positions_B], positions_B, starts_B, cfg
        )
        return cache, logits_BV

    _, rest_TBV = lax.scan(step, cache, jnp.arange(n - 1))
    return jnp.concatenate((first_BV[None], rest_TBV))


def test_kernels_that_cannot_be_checked_are_for_training():
    config = small_config(moe=True)
    config.check_vma = False
    on_gpu, on_tpu = (decoding_config(model_for(config, name)) for name in ('gpu', 'tpu'))
    assert (on_gpu.attention_kernel, on_gpu.expert_kernel) == ('blockwise', 'blocks')
    assert (on_tpu.attention_kernel, on_tpu.expert_kernel) == ('blockwise', 'ragged_dot')


@pytest.mark.parametrize(
    ('name', 'sizes'),
    [
        pytest.param('mla moe tied', {}, marks=pytest.mark.slow),
        ('mla moe tied', {'fsdp': 2, 'tp': 2, 'ep': 2}),
        pytest.param('mla whole query', {'dp': 2, 'tp': 4}, marks=pytest.mark.slow),
        pytest.param('mla moe capacity', {'tp': 2, 'pp': 2}, marks=pytest.mark.slow),
        pytest.param('gqa moe', {'fsdp': 2, 'ep': 2}, marks=pytest.mark.slow),
        pytest.param('gqa documents tied', {'fsdp': 2, 'tp': 4}, marks=pytest.mark.slow),
        ('mla documents', {}),
        ('mla moe gate biases', {'tp': 2, 'ep': 2, 'pp': 2}),
        pytest.param('gqa multi-query', {'fsdp': 2, 'tp': 2}, marks=pytest.mark.slow),
        ('gqa kinds documents', {'fsdp': 2, 'tp': 2}),
        ('mla kinds', {'tp': 4}),
        pytest.param('both kinds moe', {'pp': 2, 'tp': 2, 'ep': 2}, marks=pytest.mark.slow),
        ('delta kinds documents', {'fsdp': 2, 'tp': 2}),
        pytest.param('delta kinds short', {'tp': 2}, marks=pytest.mark.slow),
        pytest.param('delta kinds moe', {'pp': 2, 'tp': 2, 'ep': 2}, marks=pytest.mark.slow),
        pytest.param('mla kinds moe documents', {'dp': 2, 'ep': 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cached_logits_are_the_uncached_ones(name, sizes):
    cfg = decoding_config(config_of(name))
    params = params_of(cfg, tuple(sizes.items()))
    ids = np.random.default_rng(0).integers(0, 64, (8, CONTEXT)).astype(np.int32)
    ids[np.arange(8), np.arange(8) * 3 + 2] = 7  # a document ends in the prompt or after it
    lengths = np.array([1, 5, 12, 20, 3, 8, 15, 19], np.int32)  # n more fit the context
    sharded = jax.shard_map(
        functools.partial(cached_logits, cfg=cfg, n=12),
        mesh=make_mesh(sizes),
        in_specs=(specs(model_params(cfg)), P(ROWS), P(ROWS)),
        out_specs=P(None, AXES),
    )
    got = np.asarray(jax.jit(sharded)(params, ids, lengths))
    # tp devices hold the same rows
    tp = sizes.get('tp', 1)
    got = got.reshape(12, -1, tp, 8 * tp // make_mesh(sizes).size, 64)
    want_BTV = np.asarray(whole_model(cfg)(ids))
    want = np.stack([want_BTV[np.arange(8), lengths - 1 + i] for i in range(12)])
    assert want.std() > 0.1
    for i in range(tp):
        np.testing.assert_allclose(got[:, :, i].reshape(want.shape), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['gqa documents', 'mla'])
def test_an_edit_of_the_mask_reaches_training_prefill_and_decoding(name, monkeypatch):
    """A sliding window, made in the one place that says what a query sees."""
    cfg = decoding_config(config_of(name))
    ids = np.random.default_rng(0).integers(0, 64, (8, CONTEXT)).astype(np.int32)
    lengths = np.arange(1, 16, 2, dtype=np.int32)
    whole = np.asarray(whole_model(cfg)(ids))
    causal = mask.visible

    def visible(q_position, k_position, q_document, k_document, cfg):
        seen = causal(q_position, k_position, q_document, k_document, cfg)
        return seen & (q_position - k_position < 4)

    monkeypatch.setattr(mask, 'visible', visible)
    want_BTV = np.asarray(whole_model.__wrapped__(cfg)(ids))
    np.testing.assert_allclose(want_BTV[:, :4], whole[:, :4], rtol=1e-5, atol=1e-5)
    assert np.abs(want_BTV[:, 4:] - whole[:, 4:]).max() > 0.01
    sharded = jax.shard_map(
        functools.partial(cached_logits, cfg=cfg, n=8),
        mesh=make_mesh({}),
        in_specs=(specs(model_params(cfg)), P(ROWS), P(ROWS)),
        out_specs=P(None, AXES),
    )
    got = jax.jit(sharded)(params_of(cfg), ids, lengths)
    want = np.stack([want_BTV[np.arange(8), lengths - 1 + i] for i in range(8)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def without_cache(cfg: ModelConfig, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Greedy continuations by running the whole model for each token."""
    forward = whole_model(decoding_config(cfg))
    rows = [list(prompt) for prompt in prompts]
    for _ in range(n):
        ids = np.zeros((8, CONTEXT), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
        chosen = np.argmax(forward(ids), axis=-1)
        rows = [[*row, int(chosen[i, len(row) - 1])] for i, row in enumerate(rows)]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@pytest.mark.parametrize(
    ('name', 'meshes'),
    [
        ('mla moe tied', MESHES[:2]),
        pytest.param('gqa documents', [{}, {'dp': 2, 'pp': 2, 'tp': 2}], marks=pytest.mark.slow),
        pytest.param('mla moe', MESHES, marks=pytest.mark.slow),
        pytest.param('gqa moe', MESHES, marks=pytest.mark.slow),
        pytest.param('mla kinds moe', MESHES, marks=pytest.mark.slow),
        pytest.param('both kinds', [MESHES[0], MESHES[3]], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_greedy_continuations_are_the_same_however_they_are_made(name, meshes):
    cfg = config_of(name)
    want = without_cache(cfg, PROMPTS, 10)
    assert len({tuple(row) for row in want}) >= 4
    for sizes in meshes:
        params = params_of(cfg, tuple(sizes.items()))
        assert generate(params, cfg, PROMPTS, 10, CONTEXT) == want, sizes
    alone = [generate(params_of(cfg), cfg, [prompt], 10, CONTEXT)[0] for prompt in PROMPTS]
    assert alone == want


@pytest.mark.slow
def test_stages_of_several_chunks_decode_alike():
    config = small_config('gqa')
    config.model.update(block=('dense',), n_layers=8)
    cfg = cpu_model(config)
    want = generate(params_of(cfg), cfg, PROMPTS, 6, CONTEXT)
    params = params_of(cfg, (('pp', 2),), chunks=2)
    assert generate(params, cfg, PROMPTS, 6, CONTEXT) == want
    assert generate(params_of(cfg, (), chunks=2), cfg, PROMPTS, 6, CONTEXT) == want


def test_samples_follow_from_the_seed_on_every_mesh():
    cfg = config_of('gqa tied')
    draw = functools.partial(generate, sampling=Sampling(temperature=1.0))
    one = draw(params_of(cfg), cfg, PROMPTS, 10, CONTEXT, seed=3)
    assert draw(params_of(cfg, (('fsdp', 2), ('tp', 2))), cfg, PROMPTS, 10, CONTEXT, seed=3) == one
    assert draw(params_of(cfg), cfg, PROMPTS[:1], 10, CONTEXT, seed=3) == one[:1]
    assert draw(params_of(cfg), cfg, PROMPTS, 10, CONTEXT, seed=4) != one
    twice = draw(params_of(cfg), cfg, [PROMPTS[0]] * 2, 10, CONTEXT, seed=3)
    assert twice[0] != twice[1]


def test_rows_end_at_the_stop_token_the_limit_and_the_context():
    cfg = config_of('gqa tied')
    whole = generate(params_of(cfg), cfg, PROMPTS, 20, CONTEXT)
    assert [len(row) for row in whole] == [20, CONTEXT - 22, 20, 16, 20]
    assert [row[:1] for row in whole] == generate(params_of(cfg), cfg, PROMPTS, 1, CONTEXT)
    stop = whole[0][4]
    cut = generate(params_of(cfg), cfg, PROMPTS, 20, CONTEXT, stop=stop)
    assert cut == [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    allowed = np.arange(cfg.vocab_size) != stop
    without = generate(params_of(cfg), cfg, PROMPTS, 20, CONTEXT, allowed=allowed)
    assert all(stop not in row for row in without)


def test_nothing_compiles_anew_for_other_lengths_positions_or_seeds(monkeypatch):
    cfg, traced = config_of('gqa tied'), []

    def counted(name):
        f = getattr(decoding, name)

        def wrapper(*args, **kwargs):
            traced.append(name)
            return f(*args, **kwargs)

        monkeypatch.setattr(decoding, name, wrapper)

    counted('_prefill')
    counted('_decode')
    for prompt, max_tokens, seed in [([1], 20, 0), ([1] * 9, 5, 1), ([1] * 16, 16, 2)]:
        generate(params_of(cfg), cfg, [prompt], max_tokens, CONTEXT, seed=seed, n_tokens=3)
        assert traced == ['_prefill', '_decode']
    generate(params_of(cfg), cfg, [[1] * 17], 5, CONTEXT, n_tokens=3)
    assert traced == ['_prefill', '_decode', '_prefill']


def test_the_cache_holds_what_attention_needs_and_is_updated_in_place():
    for name, numbers in (('mla moe tied', 16 + 4), ('gqa', 2 * 8 * 8)):
        cfg = decoding_config(config_of(name))
        mesh = make_mesh({})
        prefill, decode = decoding.programs(cfg, 1, mesh, Sampling(), CONTEXT, 8)
        like = functools.partial(jax.ShapeDtypeStruct, dtype=np.int32)
        rules = {'seed': np.uint32(0), 'stop': np.int32(-1), 'allowed': np.ones(64, bool)}
        state, _ = jax.eval_shape(
            prefill, params_of(cfg), like((1, 16)), like((1,)), like((1,)), rules
        )
        cached = sum(x.size for x in jax.tree.leaves(state['cache']))
        assert cached == CONTEXT * cfg.n_layers * numbers
        memory = decode.lower(params_of(cfg), state, rules).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= 4 * cached


def test_the_cache_of_a_window_layer_holds_its_window():
    cfg = decoding_config(config_of('gqa kinds'))
    rows = jax.ShapeDtypeStruct((2,), np.int32)
    ids = jax.ShapeDtypeStruct((2, 16), np.int32)
    run = jax.shard_map(
        functools.partial(prefill_logits, cfg=cfg, context=CONTEXT),
        mesh=make_mesh({}),
        in_specs=(specs(model_params(cfg)), P(ROWS), P(ROWS)),
        out_specs=(P(AXES), P(None, AXES)),
    )
    declared = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, np.float32), model_params(cfg))
    _, cache = jax.eval_shape(run, declared, ids, rows)
    shapes = {x.shape for x in jax.tree.leaves(cache)}
    assert shapes == {(cfg.n_blocks, 2, cfg.n_kv_heads, cfg.window, cfg.head_dim)}


@pytest.mark.parametrize(
    ('prompts', 'message'),
    [
        ([], 'there is no prompt'),
        ([[1], []], 'prompt 1 is empty'),
        ([[1] * CONTEXT], 'prompt 0 has 32 tokens, and the context of 32'),
        ([[1, 64]], 'outside of the vocabulary of 64'),
        ([[-1]], 'outside of the vocabulary of 64'),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts, message):
    cfg = config_of('gqa')
    with pytest.raises(ValueError, match=message):
        generate(params_of(cfg), cfg, prompts, 10, CONTEXT)


def test_no_tokens_asked_for():
    with pytest.raises(ValueError, match='max_tokens=0 is below 1'):
        generate(params_of(config_of('gqa')), config_of('gqa'), [[1]], 0, CONTEXT)


@pytest.mark.parametrize(
    'bad', [{'temperature': -1.0}, {'top_k': -1}, {'top_p': 0.0}, {'top_p': 1.1}, {'min_p': 2.0}]
)
def test_sampling_out_of_range(bad):
    with pytest.raises(ValueError, match=f'{next(iter(bad))}=.* is out of range'):
        Sampling(**bad)


def test_filters_keep_the_likeliest():
    probs = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
    keys = jax.random.split(jax.random.key(0), 2000)

    def drawn(**options) -> np.ndarray:
        draw = functools.partial(decoding.sample, jnp.log(probs), sampling=Sampling(**options))
        return np.bincount(jax.jit(jax.vmap(draw))(keys), minlength=5) / len(keys)

    def kept(**options) -> list[int]:
        return np.flatnonzero(drawn(temperature=1.0, **options)).tolist()

    np.testing.assert_allclose(drawn(temperature=1.0), probs, atol=0.04)
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=100) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.71) == [1, 3, 4]
    assert kept(top_p=0.01) == [1]
    assert kept(top_k=3, top_p=0.8) == [1, 3]  # 0.4 and 0.3 of 0.85
    assert kept(min_p=0.3) == [1, 3, 4]
    assert drawn(temperature=0.0)[1] == 1
    sharp = probs**2 / np.sum(probs**2)
    np.testing.assert_allclose(drawn(temperature=0.5), sharp, atol=0.04)


def test_what_decides_is_computed_in_float32():
    """Routers and the shared experts' gate; of the matrices no other."""
    config = small_config(moe=True)
    config.compute_dtype = 'bfloat16'
    config.model.update(shared_gate=True, router_bias=True)
    cfg = cpu_model(config)
    declared = model_params(cfg)
    types = weight_types(declared, cfg)
    wide = {
        path[-1].key
        for (path, p), dtype in zip(
            jax.tree_util.tree_leaves_with_path(declared, is_leaf=is_param),
            jax.tree.leaves(types),
            strict=True,
        )
        if p.matrix and dtype == np.float32
    }
    assert wide == {'router', 'shared_gate'}
