"""Asks a run's model tasks: multiple choice, schemas, cloze, and exact match by generation.

    python evaluate.py --workdir=runs/tiny --tasks=tasks/python.jsonl
    python evaluate.py --workdir=runs/tiny --tasks=a.jsonl,b.jsonl --step=200 --shots=2
    python evaluate.py --workdir=runs/large --tasks=a.jsonl --cpu_devices=8 --mesh=fsdp=4,tp=2
    python evaluate.py --workdir=runs/large --lm_eval=hellaswag,arc_easy

docs/tasks.md explains task files and each number. Results are printed and added to the run's
eval.jsonl, which a run may be writing at the same time; any mesh gives the same ones. --lm_eval
runs tasks of EleutherAI's harness (pip install lm-eval).
"""

if __name__ == '__main__':  # before the imports that take seconds
    from machine import startup

    startup.prepare()

import datetime
import functools
import os
import time
from typing import Any

import jax
import tiktoken
from absl import flags
from ml_collections import ConfigDict

from checkpoint import CheckpointError
from config import ConfigError, without_schedule
from machine import command, processes
from machine.memory import OutOfMemoryError, keep_freed_memory, out_of_memory_explained
from parallel import AXES, Tree, make_mesh
from runtime import agreement, harness
from runtime.config_checks import validate
from runtime.evaluation import checkpoint_config
from runtime.resume import load_params
from runtime.sampling import end_of_text, run_encoding
from runtime.tasks import agreed_tasks, make_tasks
from runtime.terminal import Terminal
from runtime.workdir import CHECKPOINTS, EVALUATIONS, append_evaluation, keep_records
from train_step import Setup, abstract_state, setup

FLAGS = flags.FLAGS


def mesh_sizes(text: str) -> dict[str, int]:
    """Parses --mesh, as in fsdp=4,tp=2. Raises ConfigError for another axis or size."""
    sizes = {}
    for entry in text.split(','):
        axis, equals, size = entry.strip().partition('=')
        if axis not in AXES or not equals or not size.isdecimal() or axis in sizes:
            raise ConfigError(
                f'--mesh={text} has {entry!r}; use sizes of {", ".join(AXES)}, as in '
                f'--mesh=fsdp=4,tp=2'
            )
        sizes[axis] = int(size)
    return sizes


def evaluated_config(config: ConfigDict, mesh: str, batch_size: int) -> ConfigDict:
    """Returns the config that is evaluated by: the run's, on another mesh or with other batches
    where they are given."""
    config = without_schedule(config).copy_and_resolve_references()
    if mesh:
        config.mesh.update(dict.fromkeys(AXES, 1) | mesh_sizes(mesh))
    if batch_size:
        config.batch_size = batch_size
    config.log.sample_every = 0
    validate(config, jax.device_count(), jax.process_count(), needs_data=False)
    return config


def loaded(
    workdir: str, config: ConfigDict, step: int, averaged: bool, tokenizer: str = ''
) -> tuple[Setup, Tree, tiktoken.Encoding]:
    """Returns the setup of a run, its parameters after a step, and its tokenizer."""
    named = functools.partial(run_encoding, workdir, tokenizer)
    encoding = processes.agreed(named, 'read the tokenizer')
    s = setup(config, make_mesh(config.mesh), end_of_text(encoding))
    path = os.path.join(workdir, CHECKPOINTS, str(step))
    return s, load_params(path, abstract_state(s)['params'], averaged), encoding


class Said:
    """Says how far scoring is, and when it will be done, where it takes long."""

    SECONDS = 10.0

    def __init__(self, terminal: Terminal):
        self.terminal = terminal
        self.begun: tuple[float, int] | None = None  # time and texts after the first batch
        self.last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.begun is None:  # what was compiled before is no measure
            self.begun, self.last = (now, done), now
        start, first = self.begun
        if now - self.last < self.SECONDS or done == first:
            return
        self.last = now
        left = datetime.timedelta(seconds=round((now - start) * (total - done) / (done - first)))
        self.terminal.say(f'{done:,} of {total:,} texts are scored  ETA {left}')


def evaluate(config: ConfigDict, step: int, averaged: bool) -> dict[str, Any]:
    """Asks the tasks of the flags; prints the results and adds them to eval.jsonl."""
    f, terminal = FLAGS, Terminal(config.steps, jax.process_index() == 0)
    tasks = agreed_tasks(f.tasks or [], f.shots)
    with out_of_memory_explained(config):
        s, params, encoding = loaded(f.workdir, config, step, averaged, f.tokenizer)
        results: dict[str, Any] = {}
        if tasks:
            results, lines = make_tasks(s, tasks, encoding)(params, progress=Said(terminal))
            terminal.say('\n'.join(lines))
        if f.lm_eval:
            model = harness.make_model(s, params, encoding)
            found, table = harness.run(model, f.lm_eval, f.lm_eval_include, f.shots, f.limit)
            results |= found
            terminal.say(table)
    keep = functools.partial(keep_records, os.path.join(f.workdir, EVALUATIONS))
    if line := processes.agreed(keep if jax.process_index() == 0 else str):
        terminal.say(line)
    file = append_evaluation(f.workdir, step, results, s.mesh, averaged)
    weights = ', averaged weights' if averaged else ''
    terminal.say(f'step {step} of {f.workdir}{weights}, added to {file}')
    return results


def start() -> None:
    """Checks the flags, and evaluates."""
    f = FLAGS
    if not f.workdir:
        raise ConfigError('give --workdir=RUN, the folder that train.py named and wrote')
    if not (f.tasks or f.lm_eval):
        raise ConfigError('give --tasks=FILE.jsonl, or --lm_eval=TASK for a task of the harness')
    if not f.lm_eval and (f.lm_eval_include or f.limit):
        raise ConfigError('--lm_eval_include and --limit belong to --lm_eval=TASK; add it')
    if f.lm_eval:
        harness.need_lm_eval()
    processes.start(f.coordinator, f.num_processes, f.process_id, processes.HEARTBEAT_SECONDS)
    names = ('workdir', 'tasks', 'step', 'averaged', 'shots', 'mesh', 'batch_size', 'tokenizer',
             'lm_eval', 'lm_eval_include', 'limit')  # fmt: skip
    agreement.check_same(agreement.start_facts(None, **{name: getattr(f, name) for name in names}))
    step, config = checkpoint_config(f.workdir, f.step, None, '--step')
    averaged = config.eval.averaged if f.averaged is None else f.averaged
    evaluate(evaluated_config(config, f.mesh, f.batch_size), step, averaged)


def main(_: list[str]) -> None:
    keep_freed_memory()
    processes.choose_platform(FLAGS.cpu_devices)
    with command.messages(CheckpointError, OutOfMemoryError):
        start()


def define_flags() -> None:
    command.DEFINE_path('workdir', None, 'The run, as train.py left it.')
    command.DEFINE_paths('tasks', None, 'Task files (.jsonl), whose items the model answers.')
    flags.DEFINE_integer('step', None, 'Checkpoint to ask; by default the newest.', lower_bound=0)
    flags.DEFINE_boolean(
        'averaged', None, 'Take the weights that optimizer.ema averages; by default as evaluated.'
    )
    flags.DEFINE_integer(
        'shots', None, 'Examples before each item: the first so many; by default all that a file '
        'has.', lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_string('mesh', '', "Axes and their sizes, as fsdp=4,tp=2; by default the run's.")
    flags.DEFINE_integer(
        'batch_size', 0, "Rows of seq_len tokens at a time; by default the run's.", lower_bound=0
    )
    command.DEFINE_path('tokenizer', '', "The run's vocabulary, if its file has moved.")
    flags.DEFINE_integer(
        'cpu_devices', 0, 'Devices to simulate on the CPU, per process.',
        lower_bound=0, upper_bound=4096,
    )  # fmt: skip
    command.define_process_flags()
    flags.DEFINE_list('lm_eval', [], "Tasks of EleutherAI's harness, by name.")
    command.DEFINE_path('lm_eval_include', '', 'Folder of further tasks of the harness (YAML).')
    flags.DEFINE_integer('limit', None, 'With --lm_eval: items of each task, the first ones.',
                         lower_bound=1)  # fmt: skip


if __name__ == '__main__':
    command.run(main, define_flags)
