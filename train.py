"""Trains a model.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py --config.optimizer.peak_lr=1e-3
    python train.py --config=configs/tiny.py --cpu_devices=8 --config.mesh.fsdp=4 --config.mesh.tp=2

The workdir receives config.json, metrics.jsonl, one object per logged step, and checkpoints/. The
same command goes on from the newest checkpoint there, however the run ended before; SIGTERM or
Ctrl-C save one first. --init_from=WORKDIR starts a new run from another one's parameters.

    python train.py --config=configs/tiny.py --profile=10:13      # a trace of these steps
    python train.py --workdir=runs/tiny --eval_only               # or --eval_only=STEP
    python train.py --plot=runs/tiny                              # or several: --plot=runs/a,runs/b

The exit code is 0 if the run is complete, or stopped by a signal and saved; 75 if the same command
is to be given again, because the watchdog ended the process or another one was lost; otherwise 1.
"""

import dataclasses
import functools
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import tiktoken
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from checkpoint import Checkpointer, CheckpointError
from config import ConfigError
from data import Loader, Mixture, Source, open_data, prefetch
from machine import processes
from machine.memory import OutOfMemoryError, keep_freed_memory, out_of_memory_explained
from machine.profiler import Tracer, parse_steps
from parallel import Tree, count, make_mesh
from runtime.config_checks import validate
from runtime.evaluation import checkpoint_config, make_evaluation, over_sources, zlib_bits_per_byte
from runtime.guards import AGAIN, StopSignals, TrainingError, Watchdog
from runtime.metrics import Progress, Writer
from runtime.plot import need_matplotlib, plot
from runtime.resume import first_step, load_params, restore_state
from runtime.sampling import make_sampler
from runtime.terminal import Terminal
from runtime.workdir import (
    CHECKPOINTS,
    PROFILE,
    TOKENIZER,
    append_evaluation,
    check_shared,
    new_workdir,
    start_entry,
    tokenizer_record,
)
from train_step import Setup, abstract_state, init_state, lower_train_step, put_batch, setup

T = TypeVar('T')

# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is about to take the steps after `start`, and all that surrounds them."""

    config: ConfigDict
    start: int
    init_from: str  # another run's workdir or checkpoint, '' for none
    writer: Writer
    checkpoints: Checkpointer
    stop: StopSignals
    watchdog: Watchdog
    tracer: Tracer


class Due(NamedTuple):
    """The tasks after a step."""

    log: bool
    evaluate: bool
    sample: bool
    save: bool
    stop: bool  # a signal ends the run early


def due(step: int, config: ConfigDict, asked_to_stop: bool) -> Due:
    """Returns the tasks after this step. An `every` of 0 switches a task off."""
    last = step == config.steps

    def multiple(every: int) -> bool:
        return every > 0 and step % every == 0

    stop = asked_to_stop and step < config.steps
    return Due(
        log=multiple(config.log.every) or (last and config.log.every > 0),
        evaluate=not stop and (multiple(config.eval.every) or (last and config.eval.every > 0)),
        sample=not stop and multiple(config.log.sample_every),
        save=last or stop or multiple(config.checkpoint.every),
        stop=stop,
    )


def run(r: Run) -> dict[str, Any]:
    """Takes the steps; returns the summary."""
    config, writer, started = r.config, r.writer, time.perf_counter()
    r.checkpoints.clean()
    loader, sources, encoding = opened_data(config)
    s = setup(config, make_mesh(config.mesh), encoding.eot_token)
    sample = make_sampler(s, encoding) if config.log.sample_every else None
    writer.keep(TOKENIZER, tokenizer_record(encoding))
    writer.record_start(start_entry(config, s.mesh, r.start))
    writer.say(
        f'{count(s.declared):,} parameters · {loader.n_tokens:,} tokens · workdir {writer.workdir}'
    )
    progress = Progress(s, writer)
    state = start_state(s, r.checkpoints, r.start, r.init_from)
    train_step = compiled_step(s, r)
    evaluate, evaluation = make_evaluation(s, encoding), {}

    progress.start(r.start)
    batches = prefetch(functools.partial(put_batch, loader.batch_at, s=s), r.start, config.steps)
    for step, batch in enumerate(batches, start=r.start + 1):
        r.tracer.before(step, state)
        state, metrics = train_step(state, batch)
        writer.terminal.follow(step, metrics['loss'])
        progress.log()  # the step before, while this one runs
        if r.tracer.after(step, state):
            writer.say(f'steps {r.tracer.first} to {r.tracer.last} are traced in {r.tracer.folder}')
        r.watchdog.follow(step, metrics)
        now = due(step, config, r.stop.asked())
        if now.log:
            progress.keep(step, metrics)
        if now.evaluate or now.sample or now.save:
            progress.log()  # before the checkpoint that includes it
            jax.block_until_ready(state)
        if now.evaluate:
            r.watchdog.during(f'evaluating after step {step}')
            measure = functools.partial(evaluate, state['params'])
            evaluation, seconds = timed(over_sources, sources, measure)
            progress.log_evaluation(step, evaluation, seconds)
        if now.sample:
            r.watchdog.during(f'sampling after step {step}')
            progress.log_samples(step, *timed(sample, state['params'], step))
        if now.save:
            r.watchdog.during(f'saving step {step}')
            writer.flush()
            r.checkpoints.save(step, state, config.to_dict())
        if now.stop:
            break
    batches.close()
    progress.log()
    r.tracer.close(state)
    r.checkpoints.wait()
    seconds = time.perf_counter() - started
    if now.stop:
        writer.say(f'stopped by a signal: step {step} is saved, of {config.steps}')
    elif evaluation and writer.active:
        evaluation |= over_sources(sources, functools.partial(zlib_bits_per_byte, encoding))
    return {
        'parameters': count(s.declared),
        'active_parameters': count(s.declared, active=True),
        'tokens': (step - r.start) * progress.step_tokens,
        'seconds': seconds,
        **evaluation,
    }


def opened_data(config: ConfigDict) -> tuple[Loader | Mixture, list[Source], tiktoken.Encoding]:
    """Returns the training stream, its sources and their tokenizer.

    Raises ConfigError on all processes if one of them cannot open the data.
    """
    opened, error = None, None
    try:
        opened = open_data(config)
    except ConfigError as e:
        error = e
    if not processes.all_processes(error is None):
        raise error or ConfigError('another process cannot open the data, see its message')
    return opened


def start_state(s: Setup, checkpoints: Checkpointer, start: int, init_from: str) -> Tree:
    """Returns the state after step `start`; at 0 a new one, with the parameters of `init_from`."""
    if start:
        return restore_state(checkpoints, start, abstract_state(s))
    state = init_state(s)
    if init_from:
        del state['params']  # make room
        state['params'] = load_params(init_from, abstract_state(s)['params'])
    return state


def compiled_step(s: Setup, r: Run) -> Callable[[Tree, jax.Array], tuple[Tree, dict]]:
    """Compiles the step, (state, batch) -> (state, metrics), and says how long that took."""
    r.watchdog.during('compiling')
    train_step, seconds = timed(lambda: lower_train_step(s).compile())
    r.writer.say(f'compiled in {seconds:.1f} s')
    return train_step


def timed(f: Callable[..., T], *args: Any) -> tuple[T, float]:
    """Returns the result of f, and the seconds that it took."""
    start = time.perf_counter()
    return f(*args), time.perf_counter() - start


def train(
    config: ConfigDict,
    workdir: str,
    init_from: str = '',
    traced_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Runs a config in a workdir, or the rest of its run there; returns the summary."""
    validate(config, jax.device_count(), jax.process_count())
    check_shared(workdir)
    processes.use_cache(config)
    path, c = os.path.join(workdir, CHECKPOINTS), config.checkpoint
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
            tracer = Tracer(traced_steps, os.path.join(workdir, PROFILE))
            r = Run(config, start, init_from, writer, checkpoints, stop, watchdog, tracer)
            summary = run(r)
            writer.say('\n'.join(f'{name:>22}  {number(x)}' for name, x in summary.items()))
            if config.log.plot and writer.active:
                writer.say(f'{"plot":>22}  {plot([workdir])}')
            return summary


def number(x: float) -> str:
    """Writes a whole number in full, another one with four digits."""
    return f'{x:,}' if isinstance(x, int) else f'{x:,.4g}'


def evaluate_only(config: ConfigDict, workdir: str, step: int) -> dict[str, float]:
    """Evaluates the parameters of a checkpoint, which are all that is read of it.

    Adds loss and bits per byte to eval.jsonl. The run itself, which may be going on, is left alone.
    """
    validate(config, jax.device_count())
    _, sources, encoding = open_data(config)
    s = setup(config, make_mesh(config.mesh), encoding.eot_token)
    path = os.path.join(workdir, CHECKPOINTS, str(step))
    params = load_params(path, abstract_state(s)['params'])
    measure = functools.partial(make_evaluation(s, encoding), params)
    result = over_sources(sources, measure)
    file = append_evaluation(workdir, step, result, s.mesh)
    terminal = Terminal(config.steps, jax.process_index() == 0)
    terminal.say(f'step {step} of {workdir}, added to {file}')
    terminal.say('\n'.join(f'{name:>22}  {value:.4f}' for name, value in result.items()))
    return result


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------

FLAGS = flags.FLAGS


NEWEST = 'newest'


class StepParser(flags.ArgumentParser):
    """Parses --eval_only: a step, or nothing, which stands for the newest one."""

    syntactic_help = 'a step; without one, the newest'

    def parse(self, argument: str | int) -> int | str:
        if argument in ('true', NEWEST):
            return NEWEST
        if not str(argument).isdecimal():
            raise ValueError('use --eval_only for the newest checkpoint, or --eval_only=STEP')
        return int(argument)


def say_next(workdir: str) -> None:
    """Prints the commands that one may want next."""
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
    except (ConfigError, CheckpointError, TrainingError) as error:
        sys.exit(str(error))
    except OutOfMemoryError as error:
        processes.fail(str(error))
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        processes.fail(
            f'process {jax.process_index()} of {jax.process_count()} ends. If another one ended '
            f'first, its output says why; the same command goes on from the newest checkpoint.',
            AGAIN,
        )


def command(arguments: list[str]) -> None:
    """Draws, evaluates or trains, as the flags say."""
    if FLAGS.plot:
        print(plot([*FLAGS.plot, *arguments], FLAGS.plot_output or ''))
        return
    if arguments:
        raise ConfigError(
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
    workdir = FLAGS.workdir or new_workdir()
    train(FLAGS.config, workdir, FLAGS.init_from or '', parse_steps(FLAGS.profile or ''))
    if jax.process_index() == 0:
        say_next(workdir)


def define_flags() -> None:
    config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
    flags.DEFINE_string('workdir', None, 'Where the run goes; a new folder in runs/ by default.')
    flags.DEFINE_string(
        'init_from', None, 'Start from the parameters of this workdir or checkpoint folder.'
    )
    flags.DEFINE_integer('cpu_devices', 0, 'Simulate this many devices on the CPU, per process.')
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
