"""Scores of texts' last tokens: against full logits, on every mesh, whatever the rows hold."""

import jax
import numpy as np
import pytest
from common import initial_params, on_mesh, on_one_device, set_up, small_config
from ml_collections import ConfigDict

from model import logits
from parallel import make_mesh
from runtime import scoring
from runtime.scoring import Request, make_scorer

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
    config.model.update(capacity_factor=0.0, attention_block=1, document_end=-1)
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
    close(scores_on(config_of(), (1, 1, 1)), plain_scores(config_of()))


# (dp, fsdp, tp, ep, pp, cp)
@pytest.mark.parametrize('sizes', [(1, 2, 1, 2, 2, 1), (2, 1, 2, 1, 1, 2)], ids=str)
def test_scores_are_those_of_one_device(sizes):
    config = config_of(attention_block=2)
    close(scores_on(config, sizes), scores_on(config, (1, 1, 1)))
