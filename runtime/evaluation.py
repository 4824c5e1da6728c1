"""Loss and bits per byte on the fixed validation set of each source."""

import os
import zlib
from collections.abc import Callable

import jax
import numpy as np
import tiktoken
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from checkpoint import Checkpointer
from config import ConfigError, check_alike, saved_config
from data import EvaluationSet, Source
from parallel import P, Tree
from runtime.workdir import CHECKPOINTS
from tokenizer import token_bytes
from train_step import Setup, make_eval_step, put_batch

Evaluate = Callable[..., dict[str, float]]
AHEAD = 2  # batches that are queued on the devices


def _nothing() -> None:
    pass


def in_turn(compute: Callable[[int], Tree], n: int, after: Callable[[int], None]) -> list[Tree]:
    """Returns compute(0) to compute(n - 1), of which AHEAD are queued on the devices at a time.

    Calls after(i) once i is queued.
    """
    found = []
    for i in range(n):
        found.append(compute(i))
        if i >= AHEAD:
            jax.block_until_ready(found[i - AHEAD])
        after(i)
    return found


def make_evaluation(s: Setup, encoding: tiktoken.Encoding) -> Evaluate:
    """Returns (params, a fixed evaluation set) -> mean loss (nats per token) and bits per byte.

    As keyword argument it takes `between`, which is called after each batch, and stops the
    evaluation by an exception.
    """
    step = make_eval_step(s)
    bytes_V = np.zeros(s.model.vocab_size, np.int32)
    bytes_V[: encoding.n_vocab] = token_bytes(encoding)
    bytes_V = jax.device_put(bytes_V, NamedSharding(s.mesh, P()))

    def evaluate(
        params: Tree, batches: EvaluationSet, between: Callable[[], None] = _nothing
    ) -> dict[str, float]:
        def sums_of(i: int) -> Tree:
            return step(params, put_batch(batches.batch_at, i, s), bytes_V)

        found = in_turn(sums_of, batches.n_batches, lambda _: between())
        nats, targets, n_bytes = (
            sum(float(sums[name]) for sums in found) for name in ('nats', 'targets', 'bytes')
        )
        return {'eval_loss': nats / targets, 'eval_bits_per_byte': nats / np.log(2) / n_bytes}

    return evaluate


def zlib_bits_per_byte(encoding: tiktoken.Encoding, batches: EvaluationSet) -> dict[str, float]:
    """Returns the bits per byte of zlib at level 9 on the very text that evaluation predicts."""
    targets = np.concatenate(
        [batches.batch_at(i)[:, 1:].reshape(-1) for i in range(batches.n_batches)]
    )
    targets = targets[targets >= 0]
    text = encoding.decode_bytes(targets[token_bytes(encoding)[targets] > 0].tolist())
    return {'zlib_bits_per_byte': 8 * len(zlib.compress(text, 9)) / len(text)}


def over_sources(
    sources: list[Source], measure: Callable[[EvaluationSet], dict[str, float]]
) -> dict[str, float]:
    """Averages `measure` over the sources, by their share of the training rows.

    With several sources, also returns the result of each, as name/source. Sources without
    validation documents are left out; without any, the result is empty.
    """
    measured = [source for source in sources if source.evaluation is not None]
    if not measured:
        return {}
    results = [measure(source.evaluation) for source in measured]
    shares = [source.share for source in measured]
    if len(measured) < len(sources):
        shares = [share / sum(shares) for share in shares]
    out = {
        name: sum(share * result[name] for share, result in zip(shares, results, strict=True))
        for name in results[0]
    }
    for source, result in zip(measured, results, strict=True):
        if len(sources) > 1:
            out |= {f'{name}/{source.name}': value for name, value in result.items()}
    return out


def checkpoint_config(
    workdir: str, step: int | None, given: ConfigDict | None, flag: str = '--eval_only'
) -> tuple[int, ConfigDict]:
    """Returns the step of a run to evaluate, None being the newest, and the config for it.

    That is the given one, which has to be of the same model, or else the run's own. Raises
    ConfigError, with the flag that named the step, if there is no such checkpoint. All processes
    have to call this.
    """
    with Checkpointer(os.path.join(workdir, CHECKPOINTS)) as checkpoints:
        if step is None:
            step = checkpoints.latest_step()
        if step is None:
            raise ConfigError(
                f'{workdir} holds no checkpoint to evaluate; use the --workdir of a run that has '
                f'saved one'
            )
        try:
            saved = checkpoints.metadata(step)['config']
        except ConfigError as error:
            raise ConfigError(f'{flag}={step}: {error}') from error
    if given is None:
        return step, saved_config(saved)
    check_alike(saved, given, ('model.', 'data.isolate_documents'), f'{workdir} holds a model')
    return step, given
