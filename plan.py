"""Plans a training run without its devices: whether it fits, how fast it can be, what limits it.

    python plan.py --config=configs/tpu_v4.py
    python plan.py --config=configs/tpu_v4.py --search          # other meshes, schedules, remat
    python plan.py --config=configs/tpu_v4.py --compile=v4:2x4x4    # asks the TPU compiler
    python plan.py --config=configs/gpu_h100.py --compile=h100:8    # or that for GPUs
    python plan.py --config=configs/gpu_h100.py --search --compile=h100:8   # of the best few
    python plan.py --config=configs/tiny.py --chip=cpu --json

The estimates take seconds on any machine (planning/footprint.py, planning/roofline.py). --compile
compiles the real training step with the real compiler and prints its figures beside the estimate
(planning/compiled.py); it takes seconds to minutes, and the packages of requirements/tpu.txt or
requirements/gpu.txt. With --search it compiles the best few layouts, --best of them, and ranks them
by the compiler's figures (planning/ranking.py). Any field may be overridden, as in train.py. With
--json the last line holds all figures as one JSON object.
"""

if __name__ == '__main__':  # before the imports that take seconds
    from machine import startup

    startup.quick_interrupts()

import dataclasses
import json
import math
import sys
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from config import ConfigError, in_phase, largest_phase
from machine import command
from machine.chips import CHIPS, Chip, measured_cpu
from machine.memory import OutOfMemoryError
from parallel import AXES
from planning import ranking, report
from planning.compiled import check_devices, compile_step
from planning.roofline import Estimate, estimate
from planning.search import faster, same_mesh, same_remat, search
from planning.topology import GPU_NAMES, TPU_NAMES, check_topology, compiler_versions
from runtime.config_checks import validate

FLAGS = flags.FLAGS


def chip_named(name: str, devices: int) -> Chip:
    """Returns the chip of that name in CHIPS; for 'cpu' one of `devices` equal parts of this CPU,
    measured. Raises ConfigError for any other name."""
    if name in CHIPS:
        return CHIPS[name]
    if name != 'cpu':
        raise ConfigError(f'the chip {name!r} is unknown; use cpu, {", ".join(CHIPS)}')
    cpu = measured_cpu()
    parts = {k: getattr(cpu, k) / devices for k in ('flops', 'memory', 'bandwidth', 'link')}
    return dataclasses.replace(cpu, **parts)


def plan(config: ConfigDict, name: str) -> dict[str, Any]:
    """Prints the plan that the flags ask for, and returns its figures as one record."""
    if FLAGS.compile:
        check_topology(FLAGS.compile)
    devices = FLAGS.devices or math.prod(config.mesh[axis] for axis in AXES)
    chip = chip_named(FLAGS.chip or FLAGS.compile.partition(':')[0] or config.chip, devices)
    if FLAGS.search:
        return search_for(config, name, devices, chip)
    validate(config, devices, needs_data=False)
    print(phase_text(config), end='')
    config = in_phase(config, largest_phase(config))
    e = estimate(config, chip)
    better = faster(config, e)
    print(report.table(config, name, e), *report.faster_lines(config, e, better), sep='\n')
    compiled = compile_for(config, FLAGS.compile, e) if FLAGS.compile else {}
    return report.record(config, e) | report.faster_record(config, better) | compiled


def search_for(config: ConfigDict, name: str, devices: int, chip: Chip) -> dict[str, Any]:
    """Searches layouts, prints the best, and returns them as a record; with --compile, the best of
    each mesh and rematerialization, and the compiler's figures of them."""
    topology, best = FLAGS.compile, FLAGS.best
    if topology:
        check_devices(topology, devices)
    print(phase_text(config), end='')
    config = in_phase(config, largest_phase(config))
    same = same_remat if topology else same_mesh
    found, compared = search(config, devices, chip, progress=Progress(), best=best, same=same)
    print(report.search_title(name, devices, chip))
    of = 'choices of mesh and rematerialization' if topology else 'meshes'
    print(report.search_text(found, compared, config, best, of))
    result = report.search_record(found, compared, best)
    if not topology or not found:
        return result

    def progress(place: int, _: ConfigDict) -> None:
        print(f'compiling {place} of {len(found[:best])}', file=sys.stderr, flush=True)

    print(flush=True)  # the list above is read while the compiler works
    rows = ranking.ranked(found[:best], topology, progress)
    print(ranking.text(rows, topology))
    return result | ranking.record(rows, config)


def phase_text(config: ConfigDict) -> str:
    """Returns lines that say which steps of config.schedule are planned; '' without one."""
    largest = largest_phase(config)
    if in_phase(config, largest) is config:
        return ''
    return (
        f'planned for the largest steps of config.schedule, from step {largest.start + 1} on: '
        f'batch_size {largest.batch_size}, seq_len {largest.seq_len}\n\n'
    )


class Progress:
    """Says on standard error, once per second, how far a search is."""

    def __init__(self) -> None:
        self._next = time.monotonic() + 0.5

    def __call__(self, compared: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            print(f'{compared:,} layouts compared', file=sys.stderr, flush=True)


def compile_for(config: ConfigDict, topology: str, e: Estimate) -> dict[str, Any]:
    """Compiles the training step, prints the compiler's figures, and returns them as a record."""
    print(flush=True)  # the table above is read while the compiler works
    try:
        answer = compile_step(config, topology, e.chip)
    except OutOfMemoryError as error:
        compiler = compiler_versions(e.chip.platform)
        print(report.out_of_memory_text(topology, compiler, error))
        return report.out_of_memory_record(topology, compiler, error)
    print(report.compiled_text(e, answer))
    return report.compiled_record(answer)


def main(_: list[str]) -> None:
    jax.config.update('jax_platforms', 'cpu')  # leaves accelerators to the runs that use them
    with command.messages():
        if not FLAGS.config:
            raise ConfigError('give --config=configs/NAME.py, the config to plan')
        result = plan(FLAGS.config, FLAGS['config'].path)
    if FLAGS.json:
        print(json.dumps(result))


def define_flags() -> None:
    command.DEFINE_config('config', 'Config file, e.g. configs/tpu_v4.py or just tpu_v4.')
    flags.DEFINE_string('chip', '', f'cpu, {", ".join(CHIPS)}; config.chip if empty.')
    flags.DEFINE_boolean('search', False, 'Try other layouts, and print the best.')
    flags.DEFINE_integer(
        'devices', 0, 'Number of devices; 0: as many as the mesh takes.',
        lower_bound=0, upper_bound=2**20,
    )  # fmt: skip
    flags.DEFINE_integer(
        'best', 5, 'Number of layouts of --search to print, and to compile.', lower_bound=1
    )
    flags.DEFINE_string('compile', '', f'Topology to compile for: {TPU_NAMES}, {GPU_NAMES}.')
    flags.DEFINE_boolean('json', False, 'Print the figures as a JSON object on the last line, too.')


if __name__ == '__main__':
    startup.hear_interrupts()
    command.run(main, define_flags)
