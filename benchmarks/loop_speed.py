"""What the training loop costs beside its compiled step: data, logging, watching.

    python benchmarks/loop_speed.py
    python benchmarks/loop_speed.py --writers=tensorboard --json

The same compiled step runs alternately bare, on one batch again and again, and in `train.train`
with its default logging, without evaluation or checkpoints but the last. The loop's time is the one
that metrics.jsonl reports, without the first interval. The model: configs/tiny.py, 2 layers of
D 128, 16 sequences x 128 tokens, so that a step takes tens of milliseconds: the loop's cost does
not grow with the model, its share of the step falls.
"""

import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from absl import app, flags

import data
import steps
import train
from configs import tiny
from parallel import make_mesh

FLAGS = flags.FLAGS


def configure():
    c = tiny.get_config()
    c.batch_size, c.seq_len, c.steps = 16, 128, FLAGS.steps
    c.model.update(n_layers=2, d_model=128, d_expert=128, d_ff=384)
    c.eval.every = c.checkpoint.every = 0
    c.log.writers, c.peak_flops = tuple(FLAGS.writers), 1e12
    return c


class Compiled:
    """Stands for the lowered step, already compiled."""

    def __init__(self, step):
        self.compile = lambda: step


def bare(step, config, mesh) -> float:
    """Seconds a step."""
    state = steps.init_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, 4096, (config.batch_size, config.seq_len + 1))
    batch = steps.put_batch(lambda _, rows: tokens[rows].astype(np.int32), 0, config, mesh)
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(config.steps):
        state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    return (time.perf_counter() - start) / config.steps


def loop(config) -> float:
    """Seconds a step of a run in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        train.train(config.copy_and_resolve_references(), folder)
        lines = pathlib.Path(folder, 'metrics.jsonl').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    logged = [r for r in records if 'tokens_per_second' in r]
    step_tokens = config.batch_size * config.seq_len
    pairs = itertools.pairwise(logged)
    seconds = sum((b['tokens'] - a['tokens']) / b['tokens_per_second'] for a, b in pairs)
    return seconds / ((logged[-1]['tokens'] - logged[0]['tokens']) / step_tokens)


def main(_) -> None:
    train.keep_freed_memory()
    config = configure()
    mesh = make_mesh(config.mesh)
    data.stdlib_corpus(config.data.tokenizer)
    step = steps.lower_train_step(config, mesh).compile()
    train.lower_train_step = lambda *_: Compiled(step)
    rounds = []
    with open(os.devnull, 'w') as nowhere:
        for i in range(FLAGS.rounds + 1):
            standard, sys.stdout = sys.stdout, nowhere
            try:
                measured = bare(step, config, mesh), loop(config)
            finally:
                sys.stdout = standard
            if i:  # the first one warms up
                rounds.append(measured)
                print(f'bare {measured[0] * 1e3:8.2f} ms   loop {measured[1] * 1e3:8.2f} ms')
    bare_s, loop_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    overhead = statistics.median(b / a - 1 for a, b in rounds)
    print(f'the loop adds {overhead:.1%} of a step (median of {len(rounds)} rounds)')
    if FLAGS.json:
        print(json.dumps({'bare_s': bare_s, 'loop_s': loop_s, 'overhead': overhead}))


if __name__ == '__main__':
    flags.DEFINE_integer('steps', 60, 'Steps a round.')
    flags.DEFINE_integer('rounds', 5, 'Rounds that count.')
    flags.DEFINE_list('writers', [], 'log.writers.')
    flags.DEFINE_bool('json', False, 'Print one JSON object last.')
    app.run(main)
