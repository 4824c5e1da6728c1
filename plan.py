"""Plans a training run on devices that are not there: does it fit, how fast, and what limits it.

    python plan.py --config=configs/tpu_v4.py
    python plan.py --config=configs/tpu_v4.py --search          # other meshes, schedules, remat
    python plan.py --config=configs/tpu_v4.py --compile=v4:2x4x4    # asks the TPU compiler
    python plan.py --config=configs/gpu_h100.py --compile=h100:8    # or that for GPUs
    python plan.py --config=configs/tiny.py --chip=cpu --json

The estimates take seconds on any machine (planning/footprint.py, planning/roofline.py). --compile compiles the real
training step with the real compiler, which takes seconds to minutes and the packages of
requirements/tpu.txt or requirements/gpu.txt, and prints what it says beside the estimate
(planning/compiled.py). Any field may be overridden, as in train.py. The last line is one JSON object with
--json.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from machine.chips import CHIPS, Chip, measured_cpu
from machine.memory import OutOfMemoryError
from parallel import AXES
from planning.compiled import compile_step
from planning.report import compiled_record, compiled_text, record, search_text, table
from planning.roofline import estimate
from planning.search import search
from planning.topology import GPU_NAMES, TPU_NAMES
from runtime.config_checks import validate

FLAGS = flags.FLAGS


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def chip_named(name: str, devices: int) -> Chip:
    """A chip of the table, or one of so many equal parts of this CPU."""
    if name in CHIPS:
        return CHIPS[name]
    if name != 'cpu':
        raise ValueError(f'the chip {name!r} is unknown; use cpu, {", ".join(CHIPS)}')
    cpu = measured_cpu()
    parts = {k: getattr(cpu, k) / devices for k in ('flops', 'memory', 'bandwidth', 'link')}
    return dataclasses.replace(cpu, **parts)


def plan(config: ConfigDict, name: str) -> dict[str, Any]:
    """Prints what the flags ask for; the same as a record."""
    config.data.path = config.data.path or ('' if config.data.sources else 'not needed here')
    devices = FLAGS.devices or math.prod(config.mesh[axis] for axis in AXES)
    chip = chip_named(FLAGS.chip or FLAGS.compile.partition(':')[0] or config.chip, devices)
    if FLAGS.search:
        found, tried = search(config, devices, chip)
        print(f'{name} on {devices} x {chip.name}')
        print(search_text(found, tried, config, FLAGS.best))
        return {'tried': tried, 'best': [record(c, e) for c, e in found[: FLAGS.best]]}
    validate(config, devices)
    e = estimate(config, chip)
    print(table(config, name, e))
    result = record(config, e)
    if FLAGS.compile:
        print(flush=True)
        try:
            answer = compile_step(config, FLAGS.compile, chip)
        except OutOfMemoryError as error:
            print(f'compiled for {FLAGS.compile}: {error}')
            return result | {'compiled': {'topology': FLAGS.compile, 'out_of_memory': str(error)}}
        print(compiled_text(e, answer))
        result['compiled'] = compiled_record(answer)
    return result


def main(_: Sequence[str]) -> None:
    jax.config.update('jax_platforms', 'cpu')  # no accelerator is taken from a run
    try:
        result = plan(FLAGS.config, config_flags.get_config_filename(FLAGS['config']))
    except ValueError as error:
        sys.exit(str(error))
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
    flags.DEFINE_string('chip', '', f'cpu, {", ".join(CHIPS)}; config.chip by default.')
    flags.DEFINE_boolean('search', False, 'Try other layouts and print the best.')
    flags.DEFINE_integer('devices', 0, 'For how many to search; as many as the mesh by default.')
    flags.DEFINE_integer('best', 5, 'How many layouts to print.')
    flags.DEFINE_string('compile', '', f'What to compile for: {TPU_NAMES}, {GPU_NAMES}.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    flags.mark_flag_as_required('config')
    app.run(main)
