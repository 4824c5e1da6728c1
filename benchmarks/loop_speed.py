"""The training loop's cost beside its compiled step: data, logging, watching.

    python benchmarks/loop_speed.py
    python benchmarks/loop_speed.py --writers=tensorboard --json

One run of `train.train` with its default logging, without evaluation or checkpoints but the last.
Each step is waited for before the loop may go on, so that none of the loop's own work is hidden
behind it, as it is in a real run: what is measured is a bound, and the machine's drift cancels,
since both parts are of the same moments. The model: configs/tiny.py, 2 layers of D 128, 16
sequences x 128 tokens, a step of a fraction of a second: the loop's cost does not grow with the
model, its share of the step falls.
"""

import tempfile
import time
from typing import Any

import common
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import train
from config import ConfigError
from configs import tiny
from train_step import Setup

FLAGS = flags.FLAGS


def configure() -> ConfigDict:
    c = tiny.get_config()
    c.batch_size, c.seq_len, c.steps = 16, 128, FLAGS.steps
    c.model.update(n_layers=2, d_model=128, d_expert=128, d_ff=384)
    c.eval.every = c.checkpoint.every = 0
    c.log.writers, c.peak_flops = tuple(FLAGS.writers), 1e12
    return c


class TimedStep:
    """The lowered and then the compiled step of a run. A call returns when its results are
    computed, and adds its start and end to `times`."""

    def __init__(self, lowered: jax.stages.Lowered):
        self.lowered = lowered
        self.times: list[tuple[float, float]] = []

    def compile(self, *args: Any, **kwargs: Any) -> 'TimedStep':
        self.compiled = self.lowered.compile(*args, **kwargs)
        return self

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        done = jax.block_until_ready(self.compiled(*args))
        self.times.append((start, time.perf_counter()))
        return done


def step_times() -> np.ndarray:
    """Trains and returns the start and end of each step, in seconds: [steps, 2]."""
    steps: list[TimedStep] = []
    lower = train.lower_train_step

    def lower_timed(s: Setup) -> TimedStep:
        steps.append(TimedStep(lower(s)))
        return steps[-1]

    train.lower_train_step = lower_timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            train.train(configure(), folder)
    finally:
        train.lower_train_step = lower
    return np.array(steps[0].times)


def main() -> common.Figures:
    if not 0 <= FLAGS.warmup <= FLAGS.steps - 2:
        raise ConfigError(
            f'--warmup={FLAGS.warmup} leaves less than two of --steps={FLAGS.steps}; use more steps'
        )
    common.prepare_devices()
    times = step_times()[FLAGS.warmup :]
    step = float(np.mean(times[:, 1] - times[:, 0]))
    loop = float(np.mean(times[1:, 0] - times[:-1, 1]))
    return {'step_ms': 1e3 * step, 'loop_ms': 1e3 * loop, 'share': loop / step}


if __name__ == '__main__':
    flags.DEFINE_integer('steps', 120, 'Steps of the run.')
    flags.DEFINE_integer('warmup', 10, 'The first of them, which do not count.')
    flags.DEFINE_list('writers', [], 'log.writers.')
    common.run(main)
