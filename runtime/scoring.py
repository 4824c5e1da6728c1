"""Log-likelihoods of texts' last tokens, in batches of a few lengths on a run's mesh."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from config import ConfigError, without_schedule
from parallel import Tree
from runtime.config_checks import validate
from runtime.evaluation import in_turn
from train_step import Setup, make_score_step, put_batch, setup

SHORTEST = 16  # positions of the shortest rows
FEW = 8  # batches: rows of another length are not compiled for, to save so few of them


class Request(NamedTuple):
    """A text whose last tokens are to be scored, after at least one that is read alone."""

    tokens: tuple[int, ...]  # at most seq_len + 1
    n_scored: int


class Score(NamedTuple):
    """The log-likelihood (nats) of a request's scored tokens, and whether greedy decoding gives
    them."""

    log_likelihood: float
    greedy: bool


Between = Callable[[], None]
ToldProgress = Callable[[int, int], None]
Scorer = Callable[..., list[Score]]


def _nothing(*_: int) -> None:
    pass


def row_lengths(config: ConfigDict, n_devices: int) -> list[int]:
    """Lists the lengths of rows that the mesh and the kernels take, the shortest first: seq_len,
    its half, and so on."""
    lengths = [config.seq_len]
    while (T := lengths[0] // 2) >= SHORTEST and config.seq_len % T == 0:
        if not fits(with_rows(config, T), n_devices):
            break
        lengths.insert(0, T)
    return lengths


def with_rows(config: ConfigDict, T: int) -> ConfigDict:
    """Returns the config with rows of T tokens, as many as hold a batch's tokens."""
    config = config.copy_and_resolve_references()
    config.batch_size *= config.seq_len // T
    config.seq_len = T
    return config


def fits(config: ConfigDict, n_devices: int) -> bool:
    try:
        validate(config, n_devices, needs_data=False)
    except ConfigError:
        return False
    return True


def halved(config: ConfigDict, n: int, n_devices: int) -> ConfigDict:
    """Returns the config with the batch halved while it holds n rows and the mesh takes it."""
    while config.batch_size % 2 == 0 and config.batch_size // 2 >= n:
        smaller = config.copy_and_resolve_references()
        smaller.batch_size //= 2
        if not fits(smaller, n_devices):
            break
        config = smaller
    return config


def by_length(lengths: Sequence[int], rows: Sequence[int], batch_tokens: int) -> dict[int, list]:
    """Sorts rows by the shortest of the lengths that holds them: {length: indices of rows}.

    Those that would take less than FEW batches more in rows of the next length go there.
    """
    found: dict[int, list[int]] = {T: [] for T in lengths}
    for i, n in enumerate(rows):
        found[next(T for T in lengths if n <= T)].append(i)
    filled = [T for T in lengths if found[T]]
    for T, longer in itertools.pairwise(filled):
        if len(found[T]) * (longer - T) < FEW * batch_tokens:
            found[longer] += found.pop(T)
    return {T: indices for T, indices in found.items() if indices}


def make_scorer(s: Setup) -> Scorer:
    """Returns (params, requests) -> their scores, in order.

    As keyword arguments it takes `between`, which is called after each batch, and stops the scoring
    by an exception, and `progress`, which is told (texts under way, texts). Equal requests are
    computed once. The scores depend on the mesh only by float32's rounding. With several processes
    all call it, with the same requests.
    """
    n_devices, config = s.mesh.size, without_schedule(s.config)
    lengths = row_lengths(config, n_devices)

    @functools.cache
    def step_for(T: int, n: int) -> tuple[Setup, Callable]:
        own = setup(halved(with_rows(config, T), n, n_devices), s.mesh, s.model.document_end)
        return own, make_score_step(own)

    def score(
        params: Tree,
        requests: Sequence[Request],
        between: Between = _nothing,
        progress: ToldProgress = _nothing,
    ) -> list[Score]:
        distinct = list(dict.fromkeys(requests))
        check_requests(distinct, s)
        found: dict[Request, Score] = {}
        batch_tokens = config.batch_size * config.seq_len
        rows = [len(request.tokens) - 1 for request in distinct]
        groups = by_length(lengths, rows, batch_tokens)
        for T in sorted(groups, reverse=True):  # what takes most memory first
            group = [distinct[i] for i in groups[T]]
            own, step = step_for(T, power_of_two(len(group)))
            done = len(found)

            def after(n: int, done: int = done) -> None:
                between()
                progress(done + n, len(distinct))

            scores = score_group(step, own, params, group, after)
            found |= dict(zip(group, scores, strict=True))
        return [found[request] for request in requests]

    return score


def power_of_two(n: int) -> int:
    """Returns the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def score_group(
    step: Callable,
    s: Setup,
    params: Tree,
    group: Sequence[Request],
    after: Callable[[int], None],
) -> list[Score]:
    """Scores requests in rows of one length; `after` each batch it is told how many are under
    way."""
    B, T = s.config.batch_size, s.config.seq_len

    def batch_at(i: int, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(B)
        batch = np.full((last - first, T + 1), -1, np.int32)
        asked = group[i * B + first : i * B + last]
        for row, (tokens, n_scored) in zip(batch, asked, strict=False):  # the last rows are empty
            row[: len(tokens)] = tokens
            context = row[: len(tokens) - n_scored]
            context[:] = -2 - context
        return batch

    found = in_turn(
        lambda i: step(params, put_batch(batch_at, i, s)),
        -(-len(group) // B),
        lambda i: after(min((i + 1) * B, len(group))),
    )
    nats, missed = (
        np.concatenate([np.asarray(sums[name]).reshape(-1) for sums in found])[: len(group)]
        for name in ('nats', 'missed')
    )
    return [Score(-float(n), not m) for n, m in zip(nats, missed, strict=True)]


def check_requests(requests: Sequence[Request], s: Setup) -> None:
    """Raises ValueError for requests that rows cannot hold, or with ids beyond the vocabulary."""
    for tokens, n_scored in requests:
        if not 0 < n_scored < len(tokens) <= s.config.seq_len + 1:
            raise ValueError(
                f'{n_scored} of {len(tokens)} tokens cannot be scored with a seq_len of '
                f'{s.config.seq_len}: at least one comes before them'
            )
        if not 0 <= min(tokens) <= max(tokens) < s.model.vocab_size:
            raise ValueError(f'ids from {min(tokens)} to {max(tokens)} are none of the vocabulary')
