"""Scoring of tasks beside the forward pass of training, at equal lengths, in turns.

    python benchmarks/task_speed.py
    python benchmarks/task_speed.py --config=configs/tiny.py --length=64 --json

Both take the same number of random rows of the same length, with random weights. The forward pass
is `train_step.make_eval_step`'s: the loss of training, with no dropout and no gradient, its batches
on the device before the clock starts. Scoring is `scoring.make_scorer`'s, with all that it does on
the host: it compares requests, sorts them by length, makes their rows and fetches their scores. A
request asks for its last quarter.
"""

import common
import jax
import numpy as np
from absl import flags

from config import ConfigError
from machine import command
from parallel import P, init_params, make_mesh
from runtime.scoring import Request, make_scorer, row_lengths, with_rows
from train_step import make_eval_step, put_batch, setup

FLAGS = flags.FLAGS


def main() -> common.Figures:
    common.prepare_devices(FLAGS.cpu_devices)
    config = FLAGS.config
    lengths = row_lengths(config, 1)
    length = FLAGS.length or config.seq_len
    if length not in lengths:
        raise ConfigError(f'--length={length}: rows of this config have {lengths} tokens; use one')
    config = with_rows(config, length)
    s = setup(config, make_mesh(config.mesh))
    params = init_params(jax.random.key(0), s.declared, s.mesh)
    B, T, n = config.batch_size, config.seq_len, FLAGS.batches
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, (n * B, T + 1), np.int32)
    requests = [Request(tuple(row), (T + 1) // 4) for row in rows.tolist()]
    batches = [put_batch(lambda i, part: rows[i * B : (i + 1) * B][part], i, s) for i in range(n)]
    sizes = jax.device_put(
        np.ones(config.model.vocab_size, np.int32), jax.sharding.NamedSharding(s.mesh, P())
    )
    forward, score = make_eval_step(s), make_scorer(s)
    seconds = common.best_seconds(
        {
            'forward': lambda: [forward(params, batch, sizes) for batch in batches],
            'scoring': lambda: score(params, requests),
        },
        FLAGS.rounds,
    )
    tokens = n * B * T
    return {
        'tokens': tokens,
        'forward_tokens_per_second': tokens / seconds['forward'],
        'scoring_tokens_per_second': tokens / seconds['scoring'],
        'scoring_over_forward': seconds['forward'] / seconds['scoring'],
    }


if __name__ == '__main__':
    command.DEFINE_config('config', 'Config file; its model, batch and length of rows.')
    flags.FLAGS.set_default('config', 'configs/tiny_dense.py')
    flags.DEFINE_integer('length', 0, 'Tokens of a row; by default seq_len.', lower_bound=0)
    flags.DEFINE_integer('batches', 8, 'Batches of each.', lower_bound=1)
    flags.DEFINE_integer('rounds', 5, 'Rounds, of which the fastest counts.', lower_bound=1)
    flags.DEFINE_integer('cpu_devices', 0, 'Devices to simulate on the CPU.', lower_bound=0)
    common.run(main)
