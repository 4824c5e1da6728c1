"""What the training loop costs beside its compiled step: data, logging, watching.

    python benchmarks/loop_speed.py
    python benchmarks/loop_speed.py --writers=tensorboard --json

One run of `train.train` with its default logging, without evaluation or checkpoints but the last.
Each step is waited for before the loop may go on, so that none of the loop's own work is hidden
behind it, as it is in a real run: what is measured is a bound, and the machine's drift cancels,
since both parts are of the same moments. The model: configs/tiny.py, 2 layers of D 128, 16
sequences x 128 tokens, a step of a fraction of a second: the loop's cost does not grow with the
model, its share of the step falls.
"""

import json
import os
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from absl import app, flags

import train
from configs import tiny
from machine.memory import keep_freed_memory

FLAGS = flags.FLAGS


def configure():
    c = tiny.get_config()
    c.batch_size, c.seq_len, c.steps = 16, 128, FLAGS.steps
    c.model.update(n_layers=2, d_model=128, d_expert=128, d_ff=384)
    c.eval.every = c.checkpoint.every = 0
    c.log.writers, c.peak_flops = tuple(FLAGS.writers), 1e12
    return c


class WaitedFor:
    """Stands for the lowered step; its compiled one returns when it is done, and notes when."""

    def __init__(self, lowered: jax.stages.Lowered):
        self.lowered, self.times = lowered, []

    def compile(self):
        step = self.lowered.compile()

        def waited_for(state, batch):
            start = time.perf_counter()
            done = jax.block_until_ready(step(state, batch))
            self.times.append((start, time.perf_counter()))
            return done

        return waited_for


def main(_) -> None:
    keep_freed_memory()
    steps_seen: list[WaitedFor] = []
    lower = train.lower_train_step

    def lower_and_note(*args) -> WaitedFor:
        steps_seen.append(WaitedFor(lower(*args)))
        return steps_seen[-1]

    train.lower_train_step = lower_and_note
    with tempfile.TemporaryDirectory() as folder:
        train.train(configure(), folder)
    times = np.array(steps_seen[0].times[FLAGS.warmup :])
    step_s = float(np.mean(times[:, 1] - times[:, 0]))
    loop_s = float(np.mean(times[1:, 0] - times[:-1, 1]))
    result = {'step_ms': 1e3 * step_s, 'loop_ms': 1e3 * loop_s, 'share': loop_s / step_s}
    for name, value in result.items():
        print(f'{name:>30}  {value:,.4f}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_integer('steps', 120, 'Steps of the run.')
    flags.DEFINE_integer('warmup', 10, 'The first of them, which do not count.')
    flags.DEFINE_list('writers', [], 'log.writers.')
    flags.DEFINE_bool('json', False, 'Print one JSON object last.')
    app.run(main)
