"""Trains a model.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py --config.optimizer.peak_lr=1e-3
    python train.py --config=configs/tiny.py --cpu_devices=8 --config.mesh.fsdp=4 --config.mesh.tp=2

The workdir receives config.json, metrics.jsonl, one object a logged step, and checkpoints/. The
same command goes on from the newest checkpoint there, however the run ended before; SIGTERM or
Ctrl-C save one first. --init_from=WORKDIR starts a new run from another one's parameters.

    python train.py --config=configs/tiny.py --profile=10:13      # a trace of these steps
    python train.py --workdir=runs/tiny --eval_only               # or --eval_only=STEP
    python train.py --plot=runs/tiny                              # or several: --plot=runs/a,runs/b

The exit code is 0 if the run is complete, or stopped by a signal and saved; 75 if the same command
is to be given again, because the watchdog ended the process or another one was lost; otherwise 1.
"""

import functools
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

import data
from checkpoint import Checkpointer, CheckpointError
from data import open_data
from machine import processes
from machine.memory import OutOfMemoryError, keep_freed_memory, out_of_memory_explained
from machine.profiler import Tracer, parse_steps
from model import declared_params
from parallel import Tree, count, make_mesh
from runtime.config_checks import validate
from runtime.evaluation import checkpoint_config, make_evaluation, over_sources, zlib_bits_per_byte
from runtime.guards import AGAIN, StopSignals, TrainingError, Watchdog
from runtime.metrics import Progress, Writer
from runtime.plot import need_matplotlib, plot
from runtime.resume import first_step, load_params, restore_state
from runtime.sampling import make_sampler
from runtime.terminal import Terminal
from runtime.workdir import TOKENIZER, append_evaluation, start_entry, tokenizer_record
from train_step import abstract_state, init_state, lower_train_step, put_batch

T = TypeVar('T')


def start_state(
    config: ConfigDict, mesh: Mesh, checkpoints: Checkpointer, start: int, init_from: str
) -> Tree:
    """The state after step `start`; at 0 a new one, with the parameters of the run `init_from`."""
    if start:
        return restore_state(checkpoints, start, abstract_state(config, mesh))
    state = init_state(config, mesh)
    if init_from:
        del state['params']  # make room
        state['params'] = load_params(init_from, abstract_state(config, mesh)['params'])
    return state


def train(
    config: ConfigDict,
    workdir: str,
    init_from: str = '',
    traced_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The whole run, or what is left of it in the workdir; returns the summary of what was done."""
    validate(config, jax.device_count(), jax.process_count())
    processes.check_shared(workdir)
    processes.use_cache(config)
    path, c = os.path.join(workdir, 'checkpoints'), config.checkpoint
    with (
        out_of_memory_explained(config),
        Watchdog(config.guard, config.steps) as watchdog,
        Checkpointer(path, c.keep, c.keep_every) as checkpoints,
        StopSignals() as stop,
    ):
        watchdog.during('starting')
        start, where = first_step(config, workdir, checkpoints)
        if start >= config.steps:
            Terminal(config.steps, jax.process_index() == 0).say(where)
            return {}
        with Writer(workdir, config, start) as writer:
            if where:
                writer.say(where)
            if config.log.plot:
                need_matplotlib()
            tracer = Tracer(traced_steps, workdir)
            summary = run(config, start, writer, checkpoints, stop, watchdog, tracer, init_from)
            writer.say('\n'.join(f'{name:>22}  {number(x)}' for name, x in summary.items()))
            if config.log.plot and writer.active:
                writer.say(f'{"plot":>22}  {plot([workdir])}')
            return summary


def run(
    config: ConfigDict,
    start: int,
    writer: Writer,
    checkpoints: Checkpointer,
    stop: StopSignals,
    watchdog: Watchdog,
    tracer: Tracer,
    init_from: str,
) -> dict[str, Any]:
    """The steps after `start`; returns the summary."""
    started = time.perf_counter()
    checkpoints.clean()
    loader, sources, encoding = open_data(config)
    writer.keep(TOKENIZER, tokenizer_record(encoding))
    sample = make_sampler(config, encoding) if config.log.sample_every else None
    mesh = make_mesh(config.mesh)
    n_params = count(declared_params(config))
    writer.say(f'{n_params:,} parameters · {loader.n_tokens:,} tokens · workdir {writer.workdir}')
    progress = Progress(config, mesh, writer)
    writer.record_start(start_entry(config, mesh, start))

    put = functools.partial(put_batch, config=config, mesh=mesh)
    state = start_state(config, mesh, checkpoints, start, init_from)
    watchdog.during('compiling')
    train_step, seconds = timed(lambda: lower_train_step(config, mesh).compile())
    writer.say(f'compiled in {seconds:.1f} s')
    evaluate = make_evaluation(config, mesh, encoding)

    evaluation: dict[str, float] = {}
    pending = None  # the metrics of the step before, fetched while the present one runs
    progress.start(start)
    batches = data.prefetch(lambda i: put(loader.batch_at, i), start, config.steps)
    for step, batch in enumerate(batches, start=start + 1):
        tracer.before(step, state)
        state, metrics = train_step(state, batch)
        writer.terminal.follow(step, metrics['loss'])
        if pending:
            progress.log(*pending)
        if tracer.after(step, state):
            writer.say(f'steps {tracer.first} to {tracer.last} are traced in {tracer.folder}')
        watchdog.follow(step, metrics)
        pending = (step, metrics) if progress.logs(step) else None
        stopping = stop.asked() and step < config.steps
        pauses = progress.evaluates(step) or progress.samples(step) or progress.saves(step)
        if pending and (pauses or stopping):
            progress.log(*pending)  # what a checkpoint includes is logged before it
            pending = None
        if progress.evaluates(step) and not stopping:
            jax.block_until_ready(state)
            watchdog.during(f'evaluating after step {step}')
            measure = functools.partial(evaluate, state['params'])
            evaluation, seconds = timed(over_sources, sources, measure)
            progress.log_evaluation(step, evaluation, seconds)
        if sample and progress.samples(step) and not stopping:
            jax.block_until_ready(state)
            watchdog.during(f'sampling after step {step}')
            progress.log_samples(step, *timed(sample, state['params'], step))
        if progress.saves(step) or stopping:
            watchdog.during(f'saving step {step}')
            writer.flush()
            checkpoints.save(step, state, config.to_dict())
        if stopping:
            break
    batches.close()
    if pending:
        progress.log(*pending)
    tracer.close(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    if stopping:
        writer.say(f'stopped by a signal: step {step} is saved, of {config.steps}')
    summary = {
        'parameters': n_params,
        'active_parameters': count(declared_params(config), active=True),
        'tokens': (step - start) * progress.step_tokens,
        'seconds': time.perf_counter() - started,
        **evaluation,
    }
    if evaluation and writer.active and not stopping:
        summary |= over_sources(
            sources, lambda batches: {'zlib_bits_per_byte': zlib_bits_per_byte(batches, encoding)}
        )
    return summary


def number(x: float) -> str:
    return f'{x:,}' if isinstance(x, int) else f'{x:,.4g}'


def timed(f: Callable[..., T], *args: Any) -> tuple[T, float]:
    """What f returns, and the seconds that it took."""
    start = time.perf_counter()
    return f(*args), time.perf_counter() - start


def evaluate_only(config: ConfigDict, workdir: str, step: int) -> dict[str, float]:
    """Loss and bits a byte of a checkpoint's parameters, which is all that is read of it; in
    eval.jsonl, too. The run itself, which may be going on, is left alone."""
    validate(config, jax.device_count())
    _, sources, encoding = open_data(config)
    mesh = make_mesh(config.mesh)
    path = os.path.join(workdir, 'checkpoints', str(step))
    params = load_params(path, abstract_state(config, mesh)['params'])
    evaluate = make_evaluation(config, mesh, encoding)
    result = over_sources(sources, functools.partial(evaluate, params))
    file = append_evaluation(workdir, step, result, mesh)
    terminal = Terminal(config.steps, jax.process_index() == 0)
    terminal.say(f'step {step} of {workdir}, added to {file}')
    terminal.say('\n'.join(f'{name:>22}  {value:.4f}' for name, value in result.items()))
    return result


FLAGS = flags.FLAGS


NEWEST = 'newest'


class StepParser(flags.ArgumentParser):
    """Of --eval_only: a step, or nothing, which stands for the newest one."""

    syntactic_help = 'a step; without one, the newest'

    def parse(self, argument: str | int) -> int | str:
        if argument in ('true', NEWEST):
            return NEWEST
        if not str(argument).isdecimal():
            raise ValueError('use --eval_only for the newest checkpoint, or --eval_only=STEP')
        return int(argument)


def say_next(workdir: str) -> None:
    """Where to go from here, in commands to copy."""
    named = [] if FLAGS.workdir else [f'--workdir={workdir}']
    commands = {
        'go on': shlex.join(['python', *sys.argv, *named]),
        'curves': f'python train.py --plot={workdir}',
        'text': f"python generate.py --workdir={workdir} --prompt='def '",
    }
    for purpose, command in commands.items():
        print(f'{purpose:>22}  {command}')


def main(arguments: list[str]) -> None:
    keep_freed_memory()
    processes.choose_platform(FLAGS.cpu_devices)
    try:
        command(arguments[1:])
    except (CheckpointError, TrainingError) as error:
        sys.exit(str(error))
    except OutOfMemoryError as error:
        processes.fail(str(error))
    except Exception as error:
        if str(error).startswith('the config cannot run'):
            sys.exit(str(error))
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        processes.fail(
            f'process {jax.process_index()} of {jax.process_count()} ends. If another one ended '
            f'first, its output says why; the same command goes on from the newest checkpoint.',
            AGAIN,
        )


def command(arguments: list[str]) -> None:
    if FLAGS.plot:
        print(plot([*FLAGS.plot, *arguments], FLAGS.plot_output or ''))
        return
    if arguments:
        raise ValueError(
            f'the config cannot run: {" ".join(arguments)} is no flag; flags are --name=value, '
            f'and fields of the config --config.name=value'
        )
    heartbeat = (
        FLAGS.config.guard.heartbeat_seconds if FLAGS.config else processes.HEARTBEAT_SECONDS
    )
    processes.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, heartbeat)
    if FLAGS.eval_only is not None:
        step = None if FLAGS.eval_only == NEWEST else FLAGS.eval_only
        step, config = checkpoint_config(FLAGS.workdir, step, FLAGS.config)
        evaluate_only(config, FLAGS.workdir, step)
        return
    workdir = FLAGS.workdir or processes.new_workdir()
    train(FLAGS.config, workdir, FLAGS.init_from or '', parse_steps(FLAGS.profile or ''))
    if jax.process_index() == 0:
        say_next(workdir)


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
    flags.DEFINE_string('workdir', None, 'Where the run goes; a new folder in runs/ by default.')
    flags.DEFINE_string(
        'init_from', None, 'Start from the parameters of this workdir or checkpoint folder.'
    )
    flags.DEFINE_integer('cpu_devices', 0, 'Simulate this many devices on the CPU, a process.')
    flags.DEFINE_string(
        'coordinator', None, "HOST:PORT of process 0, for several processes; 'auto' asks a TPU VM."
    )
    flags.DEFINE_integer('num_processes', None, 'With --coordinator: how many there are.')
    flags.DEFINE_integer('process_id', None, 'With --coordinator: which one this is, from 0.')
    flags.DEFINE_string('profile', None, 'FIRST:LAST, steps to trace into WORKDIR/profile.')
    flags.DEFINE_flag(
        flags.Flag(
            StepParser(), None, 'eval_only', None,
            'Evaluate this checkpoint of --workdir, or the newest, and do nothing else.',
            boolean=True,  # only such flags may stand without a value
        )
    )  # fmt: skip
    flags.DEFINE_list('plot', None, 'Draw the runs of these workdirs, and do nothing else.')
    flags.DEFINE_string('plot_output', None, 'The PNG; WORKDIR/metrics.png by default.')
    flags.register_multi_flags_validator(
        ['config', 'plot', 'eval_only', 'workdir'],
        lambda f: bool(f['config'] or f['plot'] or (f['eval_only'] is not None and f['workdir'])),
        'give --config=configs/NAME.py to train, --workdir=RUN --eval_only to evaluate, or '
        '--plot=RUN to draw',
    )


if __name__ == '__main__':
    define_flags()
    app.run(main)
