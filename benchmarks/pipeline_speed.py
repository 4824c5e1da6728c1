"""The cost of a pipeline: temporary memory, program size and FLOPs, by number of microbatches.

    python benchmarks/pipeline_speed.py
    python benchmarks/pipeline_speed.py --pp=2 --schedules=zero_bubble --json

Compiles the training step on simulated devices and runs nothing. Each microbatch has the same
size, so the batch grows with their number. `temp_mb` is that of one device, without what the batch
itself takes; `bubble` is the schedule's idle share if F, B and W cost 1, 2 and 1; `flops` is the
compiler's count of a full tick, of one block per stage and loops that run once, over the useful
FLOPs of a microbatch on a stage: 4/3 is the recomputation of F in B. The JSON object has the rows
as a list, `rows`.
"""

import common
import jax
from absl import flags
from ml_collections import ConfigDict

from configs import default
from model import flops_per_token
from parallel import make_mesh
from pipeline.schedules import ideal, lock_step
from runtime.config_checks import validate
from train_step import lower_train_step, pipeline_costs, setup

FLAGS = flags.FLAGS
ROWS, T = 4, 256  # sequences of a microbatch, and their tokens


def configure(schedule: str, pp: int, microbatches: int, n_layers: int) -> ConfigDict:
    c = default.get_config()
    c.batch_size, c.seq_len, c.microbatches = ROWS * microbatches, T, microbatches
    c.model.update(attention='gqa', n_layers=n_layers)
    c.mesh.pp = pp
    c.pipeline.update(schedule=schedule, chunks=2 if schedule == 'interleaved' else 1)
    validate(c, jax.device_count(), needs_data=False)
    return c


def tick_flops(schedule: str, pp: int, microbatches: int) -> float:
    """Returns the FLOPs of a full tick over the useful ones of a microbatch on a stage."""
    n_layers = pp * (2 if schedule == 'interleaved' else 1)
    config = configure(schedule, pp, microbatches, n_layers)
    config.model.update(attention_block=T, loss_chunk=ROWS * T)
    s = setup(config, make_mesh(config.mesh))
    cost = lower_train_step(s).compile().cost_analysis()
    return cost['flops'] / (ROWS * T * flops_per_token(s.model, T) / n_layers)


def measure(schedule: str, pp: int, microbatches: int, n_layers: int) -> common.Figures:
    """Returns a row of the table."""
    config = configure(schedule, pp, microbatches, n_layers)
    s = setup(config, make_mesh(config.mesh))
    lowered = lower_train_step(s)
    memory = lowered.compile().memory_analysis()
    costs = pipeline_costs(config.model.remat)
    batch_bytes = 4 * ROWS * microbatches * (T + 1)
    return {
        'schedule': schedule,
        'microbatches': microbatches,
        'layers': n_layers,
        'ticks': s.schedule.ticks,
        'bubble': 1 - ideal(s.schedule, costs) / lock_step(s.schedule, costs),
        'temp_mb': (memory.temp_size_in_bytes - batch_bytes) / 1e6,
        'program_lines': lowered.as_text().count('\n'),
        'flops': tick_flops(schedule, pp, microbatches),
    }


def main() -> list[common.Figures]:
    common.prepare_devices(FLAGS.pp)
    counts = [int(m) for m in FLAGS.microbatches]
    rows = [measure(name, FLAGS.pp, m, 8) for name in FLAGS.schedules for m in counts]
    return rows + [measure(name, FLAGS.pp, counts[0], 16) for name in FLAGS.schedules]


if __name__ == '__main__':
    flags.DEFINE_integer('pp', 4, 'Stages.', lower_bound=2)
    flags.DEFINE_list('microbatches', ['4', '8', '16', '32'], 'Numbers of microbatches.')
    flags.register_validator(
        'microbatches', lambda counts: all(m.isdecimal() and int(m) for m in counts), 'as 4,8'
    )
    flags.DEFINE_list(
        'schedules', ['1f1b', 'gpipe', 'interleaved', 'zero_bubble'], 'pipeline.schedule of each.'
    )
    common.run(main)
