"""Loss and bits a byte on the fixed validation set of each source."""

import functools
import os
import zlib
from collections.abc import Callable

import jax
import numpy as np
import tiktoken
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import data
from checkpoint import Checkpointer
from config import check_alike, saved_config
from parallel import P, Tree
from tokenizer import token_bytes
from train_step import make_eval_step, put_batch


def make_evaluation(
    config: ConfigDict, mesh: Mesh, encoding: tiktoken.Encoding
) -> Callable[[Tree, data.EvaluationSet], dict[str, float]]:
    """(params, a fixed evaluation set) -> mean loss (nats a token) and bits a byte of its text."""
    step = make_eval_step(config, mesh)
    bytes_V = np.zeros(config.model.vocab_size, np.int32)
    bytes_V[: encoding.n_vocab] = token_bytes(encoding)
    bytes_V = jax.device_put(bytes_V, NamedSharding(mesh, P()))

    def evaluate(params: Tree, batches: data.EvaluationSet) -> dict[str, float]:
        put = functools.partial(put_batch, config=config, mesh=mesh)
        sums = [step(params, put(batches.batch_at, i), bytes_V) for i in range(batches.n_batches)]
        nats, targets, n_bytes = (
            sum(float(s[name]) for s in sums) for name in ('nats', 'targets', 'bytes')
        )
        return {'eval_loss': nats / targets, 'eval_bits_per_byte': nats / np.log(2) / n_bytes}

    return evaluate


def zlib_bits_per_byte(batches: data.EvaluationSet, encoding: tiktoken.Encoding) -> float:
    """What zlib at level 9 makes of the very text that evaluation predicts."""
    targets = np.concatenate(
        [batches.batch_at(i)[:, 1:].reshape(-1) for i in range(batches.n_batches)]
    )
    targets = targets[targets >= 0]
    text = encoding.decode_bytes(targets[token_bytes(encoding)[targets] > 0].tolist())
    return 8 * len(zlib.compress(text, 9)) / len(text)


def over_sources(
    sources: list[data.Source], measure: Callable[[data.EvaluationSet], dict[str, float]]
) -> dict[str, float]:
    """What `measure` says, as the mean over the sources by their share of the training rows; with
    several sources also that of each, as name/source."""
    results = [measure(source.evaluation) for source in sources]
    shares = [source.share for source in sources]
    out = {
        name: sum(share * result[name] for share, result in zip(shares, results, strict=True))
        for name in results[0]
    }
    for source, result in zip(sources, results, strict=True):
        if len(sources) > 1:
            out |= {f'{name}/{source.name}': value for name, value in result.items()}
    return out


def checkpoint_config(
    workdir: str, step: int | None, given: ConfigDict | None
) -> tuple[int, ConfigDict]:
    """Which step of a run to evaluate, None being the newest, and with what config: the given one,
    which has to be of the same model, or else the run's own.

    Raises ValueError if there is no such checkpoint. All processes have to call this.
    """
    with Checkpointer(os.path.join(workdir, 'checkpoints')) as checkpoints:
        if step is None:
            step = checkpoints.latest_step()
        if step is None:
            raise ValueError(
                f'the config cannot run: {workdir} holds no checkpoint to evaluate; use the '
                f'--workdir of a run that has saved one'
            )
        try:
            saved = checkpoints.metadata(step)['config']
        except ValueError as error:
            raise ValueError(f'the config cannot run: --eval_only={step}: {error}') from error
    if given is None:
        return step, saved_config(saved)
    check_alike(saved, given, ('model.',), f'{workdir} holds a model')
    return step, given
