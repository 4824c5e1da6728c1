"""Scores of texts' last tokens: against full logits, on every mesh, whatever the rows hold."""

import json
import pathlib

import jax
import numpy as np
import pytest
from common import initial_params, kinds_config, on_mesh, on_one_device, set_up, small_config
from common_released import MODELS, RELEASED
from ml_collections import ConfigDict

from convert import import_model
from layers.cross_entropy import label_scores
from model import logits
from parallel import TP, P, make_mesh
from runtime import scoring
from runtime.evaluation import checkpoint_config
from runtime.resume import load_params
from runtime.scoring import Request, by_length, halved, make_scorer, row_lengths, with_rows
from train_step import abstract_state

# Of each length once, and a text twice.
LENGTHS = (2, 3, 5, 9, 16, 17, 25, 33, 33, 30, 12, 2, 20)


def requests(vocab_size: int = 64) -> list[Request]:
    rng = np.random.default_rng(0)
    made = []
    for n in LENGTHS:
        tokens = tuple(rng.integers(0, vocab_size, n).tolist())
        made.append(Request(tokens, int(rng.integers(1, n))))
    return [*made, made[3]]


def config_of(moe: bool = True, **model) -> ConfigDict:
    config = small_config(moe=moe, microbatches=2)
    config.seq_len = 32
    config.model.update(capacity_factor=0.8 if moe else 0.0, **model)
    return config


def scores_on(config: ConfigDict, sizes: tuple[int, ...]) -> list[scoring.Score]:
    s = set_up(on_mesh(config, sizes))
    params = initial_params(s.model, s.mesh, 0, s.config.pipeline.chunks)
    return make_scorer(s)(params, requests())


def plain_scores(config: ConfigDict) -> list[scoring.Score]:
    """Computes one text after the other from its logits, with the experts' capacity lifted."""
    config = config.copy_and_resolve_references()
    config.model.capacity_factor = 0.0
    cfg = set_up(config).model
    params = initial_params(cfg, make_mesh({}))
    found, of_row = [], on_one_device(lambda p, ids: logits(p, ids, cfg))
    for tokens, n_scored in requests():
        ids = np.zeros((1, 32), np.int32)
        ids[0, : len(tokens) - 1] = tokens[:-1]
        log_p = jax.nn.log_softmax(of_row(params, ids)[0, : len(tokens) - 1])[-n_scored:]
        labels = np.asarray(tokens[-n_scored:])
        own = np.asarray(log_p, np.float64)[np.arange(n_scored), labels].sum()
        found.append(scoring.Score(own, bool((np.argmax(log_p, -1) == labels).all())))
    return found


def close(got: list[scoring.Score], want: list[scoring.Score]) -> None:
    assert [x.greedy for x in got] == [x.greedy for x in want]
    np.testing.assert_allclose(
        [x.log_likelihood for x in got], [x.log_likelihood for x in want], rtol=1e-5
    )


def test_scores_are_those_of_the_logits():
    close(one_device(), plain_scores(config_of(attention_block=2, document_end=3)))


# (dp, fsdp, tp, ep, pp, cp)
SLOW_MESHES = [
    (8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 1, 1, 8), (2, 1, 1, 1, 2, 2),
    (1, 1, 2, 2, 1, 2), (2, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize(
    'sizes',
    [
        (1, 2, 1, 2, 2, 1),
        (2, 1, 2, 1, 1, 2),
        *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW_MESHES),
    ],
    ids=str,
)
def test_scores_are_those_of_one_device(sizes):
    """The experts' capacity, which is a share of a row, does not count: rows are filled up."""
    config = config_of(attention_block=2, document_end=3)
    close(scores_on(config, sizes), one_device())


_one: list[scoring.Score] = []


def one_device() -> list[scoring.Score]:
    if not _one:
        _one.extend(scores_on(config_of(attention_block=2, document_end=3), (1, 1, 1)))
    return _one


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gqa', 'both'])
def test_scores_of_other_layers_are_those_of_one_device(name):
    config = kinds_config(name, microbatches=2, moe=True)
    config.seq_len, config.model.attention_block, config.check_vma = 32, 2, False
    close(scores_on(config, (1, 1, 2, 1, 2, 2)), scores_on(config, (1, 1, 1)))


@pytest.mark.slow
def test_scores_through_interleaved_stages_are_those_of_one_device():
    config = config_of(n_layers=9, attention_block=2)
    want = scores_on(config, (1, 1, 1))
    config.pipeline.update(schedule='interleaved', chunks=2)
    close(scores_on(config, (1, 2, 1, 1, 2)), want)


def test_the_first_of_equal_logits_is_the_greedy_one():
    """As jnp.argmax takes it, whose devices of tp each hold a part of the vocabulary."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((8, 4)).astype(np.float32)
    w[[1, 2, 6]] = 3 * np.abs(w[1])  # three tokens alike, over two devices
    x = np.abs(rng.standard_normal((8, 4))).astype(np.float32)
    labels = np.array([1, 2, 6, 0, 1, 6, -1, -5])

    sharded = jax.shard_map(
        lambda *shards: label_scores(*shards, 4),
        mesh=make_mesh({'tp': 2}), in_specs=P(TP), out_specs=P(TP), check_vma=False,
    )  # fmt: skip
    nats, missed = jax.jit(sharded)(x, w, labels)
    log_p = jax.nn.log_softmax(x @ w.T)
    valid = labels >= 0
    assert missed.tolist() == (valid & (np.argmax(log_p, -1) != labels)).tolist()
    assert missed[:3].tolist() == [False, True, True]
    want = np.where(valid, -np.asarray(log_p)[np.arange(8), labels], 0)
    np.testing.assert_allclose(nats, want, rtol=1e-5, atol=1e-6)


def test_a_model_of_nan_gives_nothing_greedily():
    x, w = np.full((2, 4), np.nan, np.float32), np.ones((8, 4), np.float32)
    sharded = jax.shard_map(
        lambda *shards: label_scores(*shards, 4),
        mesh=make_mesh({}), in_specs=P(TP), out_specs=P(TP), check_vma=False,
    )  # fmt: skip
    nats, missed = jax.jit(sharded)(x, w, np.array([0, 7]))
    assert np.isnan(nats).all()
    assert missed.all()


def test_rows_of_few_lengths_hold_all_requests():
    lengths = [16, 32, 64]
    few = by_length(lengths, [3, 16, 17, 64, 40], batch_tokens=128)
    assert few == {64: [3, 4, 2, 0, 1]}
    rows = [10] * 200 + [33] * 100 + [20]
    many = by_length(lengths, rows, batch_tokens=64)
    assert many == {16: [*range(200)], 64: [*range(200, 301)]}
    config = small_config()
    config.seq_len = 128
    config.model.attention_block = 32
    assert row_lengths(config, 1) == [16, 32, 64, 128]
    cut = on_mesh(config, (1, 1, 2, 1, 1, 4))  # each of 8 parts takes a block of 32, or its part
    assert row_lengths(cut, 8) == [16, 32, 64, 128]
    assert with_rows(config, 32).batch_size == 64
    assert halved(with_rows(config, 32), 5, 1).batch_size == 8
    spread = on_mesh(config, (4, 2, 1))
    assert halved(with_rows(spread, 32), 5, 8).batch_size == 8


def test_requests_that_no_row_holds_are_refused():
    score = make_scorer(set_up(config_of()))
    for tokens, n_scored in (((1, 2), 2), ((1, 2), 0), ((1,) * 34, 1), ((64, 1), 1), ((-1, 1), 1)):
        with pytest.raises(ValueError, match=r'cannot be scored with|are none of'):
            score(None, [Request(tokens, n_scored)])


# ---------------------------------------------------------------------------------------------
# Beside transformers, on the same weights
# ---------------------------------------------------------------------------------------------

SCORES = json.loads((pathlib.Path(__file__).parent / 'golden' / 'scores.json').read_text())
BY_DEFAULT = ('llama2', 'deepseek_v3')


@pytest.mark.parametrize(
    'name',
    [pytest.param(m, marks=() if m in BY_DEFAULT else pytest.mark.slow) for m in MODELS],
)
def test_scores_are_those_of_transformers(name, tmp_path):
    import_model(str(RELEASED / name), str(tmp_path / 'run'))
    step, config = checkpoint_config(str(tmp_path / 'run'), None, None)
    config.update(compute_dtype='float32', batch_size=4)
    config.mesh.tp = 2
    s = set_up(config)
    path = tmp_path / 'run' / 'checkpoints' / str(step)
    params = load_params(str(path), abstract_state(s)['params'])
    asked = [
        Request((*pair['context'], *pair['continuation']), len(pair['continuation']))
        for pair in SCORES[name]
    ]
    want = [scoring.Score(pair['log_likelihood'], pair['greedy']) for pair in SCORES[name]]
    assert {x.greedy for x in want} == {True, False}
    close(make_scorer(s)(params, asked), want)
