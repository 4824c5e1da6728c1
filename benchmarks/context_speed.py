"""The step with sequences cut over cp, beside rows spread over dp, at equal tokens and in turns.

    python benchmarks/context_speed.py
    python benchmarks/context_speed.py --devices=4 --attention=gqa --documents=8 --json

Simulated devices share this machine's cores, so all rows compute alike, and what differs is what
cutting costs: keys and values that are made on every device, copies between devices, and devices
that wait. `documents` are the documents of a sequence, of which blocks see their own alone.
`times_dp` is the time of a step over that of dp.
"""

import common
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import default
from layers.attention import ATTENTION
from layers.context_parallel import STYLES
from parallel import make_mesh
from runtime.config_checks import validate
from train_step import init_state, lower_train_step, put_batch, setup

FLAGS = flags.FLAGS


def configure(axis: str, style: str) -> ConfigDict:
    c = default.get_config()
    c.batch_size, c.seq_len, c.cp_style = FLAGS.devices, FLAGS.seq_len, style
    c.model.update(attention=FLAGS.attention, n_layers=2, document_end=0 if FLAGS.documents else -1)
    c.mesh[axis] = FLAGS.devices
    validate(c, jax.device_count(), needs_data=False)
    return c


def batch_at(_: int, rows: slice) -> np.ndarray:
    """Draws tokens; each document of a sequence ends with token 0."""
    tokens = np.random.default_rng(0).integers(1, 4096, (FLAGS.devices, FLAGS.seq_len + 1))
    if FLAGS.documents:
        tokens[:, FLAGS.seq_len // FLAGS.documents - 1 :: FLAGS.seq_len // FLAGS.documents] = 0
    return tokens[rows].astype(np.int32)


class Run:
    """A step that has been compiled, with its state."""

    def __init__(self, axis: str, style: str) -> None:
        self.s = setup(configure(axis, style), make_mesh({axis: FLAGS.devices}))
        self.state, self.step = init_state(self.s), lower_train_step(self.s).compile()
        self.batch = put_batch(batch_at, 0, self.s)
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes

    def __call__(self) -> jax.Array:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics['loss']


def main() -> list[common.Figures]:
    common.prepare_devices(FLAGS.devices)
    runs = {'dp': Run('dp', STYLES[0])} | {f'cp, {style}': Run('cp', style) for style in STYLES}
    losses = {name: float(run()) for name, run in runs.items()}
    assert np.allclose([*losses.values()], losses['dp'], rtol=1e-5), losses
    seconds = common.best_seconds(runs, FLAGS.rounds)
    tokens = FLAGS.devices * FLAGS.seq_len
    return [
        {
            'axis': name,
            'seconds': seconds[name],
            'tokens_per_second': tokens / seconds[name],
            'temp_mb': run.temporaries / 1e6,
            'times_dp': seconds[name] / seconds['dp'],
        }
        for name, run in runs.items()
    ]


if __name__ == '__main__':
    flags.DEFINE_integer('devices', 2, 'Simulated devices, and sequences.', lower_bound=2)
    flags.DEFINE_integer('seq_len', 8192, 'Tokens of a sequence.')
    flags.DEFINE_integer('documents', 0, 'Documents of a sequence; 0: no masks.', lower_bound=0)
    flags.DEFINE_integer('rounds', 3, 'Rounds of which the best counts.', lower_bound=1)
    flags.DEFINE_enum('attention', 'mla', [*ATTENTION], 'Kind of attention.')
    common.run(main)
