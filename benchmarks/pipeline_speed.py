"""What a pipeline costs: temporary memory, program size and FLOPs against the microbatches.

    python benchmarks/pipeline_speed.py
    python benchmarks/pipeline_speed.py --pp=2 --schedules=zero_bubble --json

Compiles the training step on simulated devices and runs nothing. Each microbatch has the same
size, so the batch grows with their number. `temp_mb` is that of one device, without what the batch
itself takes; `bubble` is the schedule's idle share if F, B and W cost 1, 2 and 1; `flops` is the
compiler's count of a full tick, of one block a stage and loops that run once, over the useful
FLOPs of a microbatch on a stage: 4/3 is the recomputation of F in B.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
from absl import app, flags

from configs import default
from machine.memory import keep_freed_memory
from model import flops_per_token, model_config
from parallel import make_mesh
from pipeline.schedules import ideal, lock_step
from runtime.config_checks import validate
from train_step import lower_train_step, pipeline_costs, train_schedule

FLAGS = flags.FLAGS
ROWS = 4  # sequences of a microbatch


def configure(schedule: str, pp: int, microbatches: int, n_layers: int):
    c = default.get_config()
    c.batch_size, c.seq_len, c.microbatches, c.data.path = (
        ROWS * microbatches,
        256,
        microbatches,
        'x',
    )
    c.model.update(attention='gqa', n_layers=n_layers)
    c.mesh.pp = pp
    c.pipeline.update(schedule=schedule, chunks=2 if schedule == 'interleaved' else 1)
    validate(c, jax.device_count())
    return c


def tick_flops(schedule: str, pp: int, microbatches: int) -> float:
    n_layers = pp * (2 if schedule == 'interleaved' else 1)
    config = configure(schedule, pp, microbatches, n_layers)
    config.model.update(attention_block=256, loss_chunk=ROWS * 256)
    cost = lower_train_step(config, make_mesh(config.mesh)).compile().cost_analysis()
    useful = ROWS * 256 * flops_per_token(model_config(config), 256) / n_layers
    return cost['flops'] / useful


def measure(schedule: str, pp: int, microbatches: int, n_layers: int) -> dict:
    config = configure(schedule, pp, microbatches, n_layers)
    lowered = lower_train_step(config, make_mesh(config.mesh))
    compiled = lowered.compile()
    table, costs = train_schedule(config), pipeline_costs(config.model.remat)
    batch_bytes = 4 * ROWS * microbatches * 257
    ideal_time, time = ideal(table, costs), lock_step(table, costs)
    return {
        'schedule': schedule,
        'microbatches': microbatches,
        'layers': n_layers,
        'ticks': table.ticks,
        'bubble': 1 - ideal_time / time,
        'temp_mb': (compiled.memory_analysis().temp_size_in_bytes - batch_bytes) / 1e6,
        'program_lines': lowered.as_text().count('\n'),
        'flops': tick_flops(schedule, pp, microbatches),
    }


def main(_):
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', FLAGS.pp)
    keep_freed_memory()
    counts = [int(m) for m in FLAGS.microbatches]
    rows = [measure(s, FLAGS.pp, m, 8) for s in FLAGS.schedules for m in counts]
    rows += [measure(s, FLAGS.pp, counts[0], 16) for s in FLAGS.schedules]
    print('  '.join(f'{name:>13}' for name in rows[0]))
    for row in rows:
        cells = (f'{v:13.3f}' if isinstance(v, float) else f'{v:>13}' for v in row.values())
        print('  '.join(cells))
    if FLAGS.json:
        print(json.dumps(rows))


if __name__ == '__main__':
    flags.DEFINE_integer('pp', 4, 'Stages.')
    flags.DEFINE_list('microbatches', ['4', '8', '16', '32'], 'Numbers of microbatches.')
    flags.DEFINE_list('schedules', ['1f1b', 'gpipe', 'interleaved', 'zero_bubble'], 'Which.')
    flags.DEFINE_boolean('json', False, 'The rows as one JSON list on the last line.')
    app.run(main)
