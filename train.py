"""Trains a model.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py --config.optimizer.peak_lr=1e-3
    python train.py --config=configs/tiny.py --cpu_devices=8 --config.mesh.fsdp=4 --config.mesh.tp=2

The workdir receives config.json, metrics.jsonl, one object per logged step, and checkpoints/. The
same command goes on from the newest checkpoint there, however the run ended before; SIGTERM or
Ctrl-C save one first. --init_from=WORKDIR starts a new run from another one's parameters.

    python train.py --config=configs/tiny.py --profile=10:13      # a trace of these steps
    python train.py --workdir=runs/tiny --eval_only               # or --eval_only=STEP, --averaged
    python train.py --plot=runs/tiny                              # or several: --plot=runs/a,runs/b

The exit code is 0 if the run is complete, or stopped by a signal and saved; 75 if the same command
is to be given again, because the watchdog ended the process or another one was lost (134 where jax
notices that first, and aborts); otherwise 1.
"""

if __name__ == '__main__':  # before the imports that take seconds
    from machine import startup

    startup.prepare()

import contextlib
import dataclasses
import functools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import tiktoken
from absl import flags
from ml_collections import ConfigDict

from checkpoint import Checkpointer, CheckpointError
from config import ConfigError, without_schedule
from corpus.packing import packing_note
from corpus.shards import UnreadableError
from data import Loader, Mixture, Source, open_data, prefetch, vocabulary_note
from machine import command, processes
from machine.memory import OutOfMemoryError, keep_freed_memory, out_of_memory_explained
from machine.profiler import Tracer, parse_steps
from optimizer import AVERAGE
from parallel import Tree, count, make_mesh
from runtime import agreement
from runtime.config_checks import (
    check_all_devices,
    check_compiler_options,
    check_fields,
    validate,
)
from runtime.data_record import data_record
from runtime.evaluation import checkpoint_config, make_evaluation, over_sources, zlib_bits_per_byte
from runtime.guards import (
    CutShortError,
    NothingToSave,
    StopSignals,
    TrainingError,
    Watchdog,
)
from runtime.lease import Lease, OwnedSaves
from runtime.metrics import Progress, Writer
from runtime.next_commands import say_next, say_unfinished
from runtime.phased_step import PhasedStep
from runtime.plot import need_matplotlib, plot
from runtime.resume import (
    compared_data,
    compared_model,
    first_step,
    load_params,
    restore_state,
)
from runtime.sampling import make_sampler
from runtime.tasks import agreed_tasks, make_tasks
from runtime.terminal import Terminal
from runtime.workdir import (
    CHECKPOINTS,
    EVALUATIONS,
    PROFILE,
    TOKENIZER,
    append_evaluation,
    changed_start,
    check_shared,
    keep_records,
    mend,
    new_workdir,
    start_entry,
    tokenizer_record,
)
from train_step import Setup, abstract_state, init_state, lower_train_step, setup

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
    averaged: bool  # take its averaged weights
    data: tuple[Loader | Mixture, list[Source], tiktoken.Encoding]
    data_record: dict[str, Any]
    writer: Writer
    checkpoints: Checkpointer
    stop: StopSignals
    watchdog: Watchdog
    tracer: Tracer


class Due(NamedTuple):
    """The tasks after a step."""

    log: bool  # to metrics.jsonl and the terminal
    show: bool  # on the terminal
    evaluate: bool
    ask: bool  # the tasks of eval.tasks
    sample: bool
    save: bool
    stop: bool  # a signal ends the run early


def due(step: int, config: ConfigDict, start: int, asked_to_stop: bool) -> Due:
    """Returns the tasks after this step of a run that began after step `start`.

    An `every` of 0 switches a task off. The run's first step is logged whatever log.every is, and
    the first one of a later start is shown.
    """
    last = step == config.steps

    def multiple(every: int) -> bool:
        return every > 0 and step % every == 0

    stop = asked_to_stop and step < config.steps
    logging = config.log.every > 0
    log = logging and (multiple(config.log.every) or last or step == 1)
    return Due(
        log=log,
        show=log or (logging and step == start + 1),
        evaluate=not stop and (multiple(config.eval.every) or (last and config.eval.every > 0)),
        ask=not stop and asks(config) and (multiple(config.eval.tasks_every) or last),
        sample=not stop and multiple(config.log.sample_every),
        save=last or stop or multiple(config.checkpoint.every),
        stop=stop,
    )


def asks(config: ConfigDict) -> bool:
    """Returns whether the run asks tasks of its model."""
    return bool(config.eval.tasks) and config.eval.tasks_every > 0


def run(r: Run) -> dict[str, Any]:
    """Takes the steps; returns the summary."""
    config, writer, started = r.config, r.writer, time.perf_counter()
    loader, sources, encoding = r.data
    s = setup(config, make_mesh(config.mesh), encoding.eot_token)
    sample = make_sampler(s, encoding) if config.log.sample_every else None
    ask = make_tasks(s, agreed_tasks(config.eval.tasks), encoding) if asks(config) else None
    processes.agreed(functools.partial(record_start, s, r))
    writer.say(
        f'{count(s.declared):,} parameters · {loader.n_tokens:,} tokens · workdir {writer.workdir}'
    )
    if loader.packed:
        writer.say(packing_note(loader.packed))
    progress = Progress(s, writer, loader.tokens_before)
    state = start_state(s, r.checkpoints, r.start, r.init_from, r.averaged)
    phased = PhasedStep(s, loader, r.start, functools.partial(compiled_step, r=r))
    evaluate = make_evaluation(s, encoding)

    between = r.stop.between
    r.stop.begin()
    progress.start(r.start)
    batches = prefetch(phased.batch, r.start, config.steps)
    for step, batch in enumerate(batches, start=r.start + 1):
        evaluation = {}  # of this step
        if phased.begins(step - 1):
            enter_phase(phased, step, state, progress)
        r.tracer.before(step, state)
        state, metrics = phased.step(state, batch)
        writer.terminal.follow(step, metrics['loss'])
        progress.log()  # the step before, while this one runs
        if r.tracer.after(step, state):
            writer.say(f'steps {r.tracer.first} to {r.tracer.last} are traced in {r.tracer.folder}')
        r.watchdog.follow(step, metrics)
        now = due(step, config, r.start, r.stop.asked())
        if now.show:
            progress.keep(step, metrics, now.log)
        if now.evaluate or now.ask or now.sample or now.save:
            progress.log()  # before the checkpoint that includes it
            jax.block_until_ready(state)
            writer.terminal.catch_up(step)
            progress.check_peak()
            params = evaluated_params(state, config)
        try:
            if now.evaluate:
                measure = functools.partial(evaluate, params, between=between)
                text = f'evaluating after step {step}'
                evaluation, seconds = paused(text, r, over_sources, sources, measure)
                progress.log_evaluation(step, evaluation, seconds)
            if now.ask:
                measure = functools.partial(ask, between=between)
                text = f'asking the tasks after step {step}'
                (results, lines), seconds = paused(text, r, measure, params)
                progress.log_tasks(step, results, lines, seconds)
            if now.sample:
                draw = functools.partial(sample, between=between)
                text = f'sampling after step {step}'
                samples, seconds = paused(text, r, draw, params, step)
                progress.log_samples(step, samples, seconds)
        except CutShortError:
            now = now._replace(save=True, stop=True)
        if now.save:
            with doing(f'saving step {step}', r, at_once=now.stop):
                writer.flush()
                r.checkpoints.save(step, state, config.to_dict(), r.data_record, finite=True)
        if now.stop:
            break
    batches.close()
    progress.log()
    r.tracer.close(state)
    with doing(f'saving step {step}', r):
        r.checkpoints.wait()
    seconds = time.perf_counter() - started
    if now.stop:
        writer.say(f'stopped by a signal: step {step} is saved, of {config.steps}')
    elif evaluation and writer.active:
        evaluation |= over_sources(sources, functools.partial(zlib_bits_per_byte, encoding))
    writer.say(f'summary at step {step} of {config.steps}:')
    return summary_of(s, r, step, seconds) | evaluation


def record_start(s: Setup, r: Run) -> None:
    """Writes the vocabulary, and an entry of record.json for this start; says what the last bits of
    numbers depend on and is not as at the start before."""
    r.writer.keep(TOKENIZER, tokenizer_record(r.data[2]))
    entry = start_entry(r.config, s.mesh, r.start)
    if r.start and r.writer.active and (line := changed_start(r.writer.workdir, entry)):
        r.writer.say(line)
    r.writer.record_start(entry)


def summary_of(s: Setup, r: Run, step: int, seconds: float) -> dict[str, float]:
    """Returns the numbers of a run that ends at `step`, and of this start of it."""
    tokens_before = r.data[0].tokens_before
    return {
        'parameters': count(s.declared),
        'active_parameters': count(s.declared, active=True),
        'tokens': tokens_before(step),
        'tokens_of_this_start': tokens_before(step) - tokens_before(r.start),
        'seconds_of_this_start': seconds,
    }


@contextlib.contextmanager
def doing(text: str, r: Run, at_once: bool = False) -> Iterator[None]:
    """Gives the body the time of a pause, and says what it does, `at_once` or if it takes long."""
    r.watchdog.during(text)
    if at_once:
        r.writer.say(text)
        yield
        return
    with r.writer.terminal.patiently(text):
        yield


def paused(text: str, r: Run, f: Callable[..., T], *args: Any) -> tuple[T, float]:
    """Returns the result of f, and the seconds that it took, in a pause of the run: see `doing`."""
    with doing(text, r):
        return timed(f, *args)


def opened_data(
    config: ConfigDict, training: bool = True
) -> tuple[Loader | Mixture, list[Source], tiktoken.Encoding]:
    """Returns the training stream, its sources and their tokenizer.

    Raises ConfigError on all processes if one of them cannot open the data, or has another.
    """
    opened = processes.agreed(functools.partial(open_data, config, training), 'open the data')
    agreement.check_same(data_record(*opened[1:]))
    return opened


def start_state(
    s: Setup, checkpoints: Checkpointer, start: int, init_from: str, averaged: bool = False
) -> Tree:
    """Returns the state after step `start`; at 0 a new one, with the parameters of `init_from`, or
    their average."""
    if start:
        return restore_state(checkpoints, start, abstract_state(s))
    state = init_state(s)
    if init_from:
        del state['params']  # make room
        state['params'] = load_params(init_from, abstract_state(s)['params'], averaged)
    return state


def evaluated_params(state: Tree, config: ConfigDict) -> Tree:
    """Returns the parameters that evaluation and samples are about."""
    return state['moments'][AVERAGE] if config.eval.averaged else state['params']


def enter_phase(phased: PhasedStep, step: int, state: Tree, progress: Progress) -> None:
    """Compiles the step for the sizes that a schedule has from `step` on, and says them; that takes
    no time of the steps."""
    progress.log()
    jax.block_until_ready(state)
    _, seconds = timed(phased.enter, step - 1)
    progress.pause(seconds)
    sizes = f'batch_size {phased.phase.batch_size} · seq_len {phased.phase.seq_len}'
    progress.writer.say(f'from step {step} on: {sizes}')


def compiled_step(s: Setup, r: Run) -> Callable[[Tree, jax.Array], tuple[Tree, dict]]:
    """Compiles the step, (state, batch) -> (state, metrics), and says how long that took."""
    with doing('compiling ...', r, at_once=True):
        train_step, seconds = timed(r.stop.interruptible, lambda: lower_train_step(s).compile())
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
    averaged: bool = False,
) -> dict[str, Any]:
    """Runs a config in a workdir, or the rest of its run there; returns the summary.

    A new run starts from the parameters of `init_from`, or from their average.
    """
    arguments = {
        'workdir': workdir,
        'init_from': init_from,
        'profile': traced_steps,
        'averaged': averaged,
    }
    agreement.check_same(agreement.start_facts(config, **arguments))
    validate(config, jax.device_count(), jax.process_count())
    check_shared(workdir)
    processes.use_cache(config)
    path, c = os.path.join(workdir, CHECKPOINTS), config.checkpoint
    say = Terminal(config.steps, jax.process_index() == 0).say
    with (
        out_of_memory_explained(config),
        Watchdog(config.guard, config.steps) as watchdog,
        Lease(workdir, say) as lease,
        Checkpointer(path, c.keep, c.keep_every, check_owner=lease.check) as checkpoints,
        StopSignals(OwnedSaves(lease, checkpoints)) as stop,
    ):
        watchdog.during('starting')
        start, where = first_step(config, workdir, checkpoints)
        if start >= config.steps:
            say(where)
            return {}
        data = opened_data(config)
        record = data_record(*data[1:])
        said = [where, *compared_data(checkpoints, start, workdir, init_from, record)]
        if init_from and not start:
            said.append(compared_model(init_from, config))
        for line in said:
            if line:
                say(line)
        # What is unfinished goes first, so that there is room; then the files are readable again.
        checkpoints.clean()
        lease.hold()
        first = jax.process_index() == 0
        mended = processes.agreed(functools.partial(mend, workdir, start) if first else list)
        with processes.agreed(functools.partial(Writer, workdir, config, start)) as writer:
            note = vocabulary_note(config.model.vocab_size, data[2])
            for line in [*mended, note]:
                if line:
                    writer.say(line)
            if config.log.plot:
                processes.agreed(need_matplotlib)
            tracer = Tracer(traced_steps, os.path.join(workdir, PROFILE))
            r = Run(
                config, start, init_from, averaged, data, record, writer, checkpoints, stop,
                watchdog, tracer,
            )  # fmt: skip
            try:
                summary = run(r)
            except CheckpointError:
                writer.active &= not lease.lost  # the files are another run's now
                raise
            writer.say('\n'.join(f'{name:>22}  {number(x)}' for name, x in summary.items()))
            if config.log.plot and writer.active:
                writer.say(f'{"plot":>22}  {plot([workdir])}')
            return summary


def number(x: float) -> str:
    """Writes a whole number in full, another one with four digits."""
    return f'{x:,}' if isinstance(x, int) else f'{x:,.4g}'


def evaluate_only(
    config: ConfigDict, workdir: str, step: int, averaged: bool | None = None
) -> dict[str, float]:
    """Evaluates the parameters of a checkpoint, or their average, which is all that is read of it.

    `averaged` is the config's eval.averaged by default. Adds loss and bits per byte to eval.jsonl.
    The run itself, which may be going on, is left alone.
    """
    config = without_schedule(config)
    averaged = config.eval.averaged if averaged is None else averaged
    arguments = {'workdir': workdir, 'eval_only': step, 'averaged': averaged}
    agreement.check_same(agreement.start_facts(config, **arguments))
    validate(config, jax.device_count())
    _, sources, encoding = opened_data(config, training=False)
    path = os.path.join(workdir, CHECKPOINTS, str(step))
    terminal = Terminal(config.steps, jax.process_index() == 0)
    with Checkpointer(os.path.dirname(path)) as checkpoints:
        record = data_record(sources, encoding)
        for line in compared_data(checkpoints, 0, workdir, path, record):  # released weights too
            terminal.say(line)
    s = setup(config, make_mesh(config.mesh), encoding.eot_token)
    params = load_params(path, abstract_state(s)['params'], averaged)
    measure = functools.partial(make_evaluation(s, encoding), params)
    result = over_sources(sources, measure)
    keep = functools.partial(keep_records, os.path.join(workdir, EVALUATIONS))
    if line := processes.agreed(keep if jax.process_index() == 0 else str):
        terminal.say(line)
    file = append_evaluation(workdir, step, result, s.mesh, averaged)
    weights = ', averaged weights' if averaged else ''
    terminal.say(f'step {step} of {workdir}{weights}, added to {file}')
    terminal.say('\n'.join(f'{name:>22}  {value:.4f}' for name, value in result.items()))
    return result


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------

FLAGS = flags.FLAGS


NEWEST = 'newest'


class StepParser(flags.ArgumentParser):
    """Parses --eval_only: a step, or nothing, which stands for the newest one."""

    metavar = 'STEP'

    def parse(self, argument: str | int) -> int | str:
        if argument in ('true', NEWEST):
            return NEWEST
        if not str(argument).isdecimal():
            raise ValueError('use --eval_only for the newest checkpoint, or --eval_only=STEP')
        return int(argument)


def main(words: list[str]) -> None:
    keep_freed_memory()
    processes.choose_platform(FLAGS.cpu_devices)
    try:
        start(words)
    except NothingToSave:
        if jax.process_count() == 1:
            sys.stdout.flush()
            os._exit(0)  # the compiler may still be running
        if jax.process_index() == 0:  # all end like this
            print('ended by a signal before the first step: there is nothing to save')
    except (ConfigError, CheckpointError, TrainingError) as error:
        sys.exit(str(error))
    except UnreadableError as error:
        # Other processes may be able to read it and wait: end at once; a network may answer at the
        # next start.
        processes.fail(str(error), 1 if jax.process_count() == 1 else processes.AGAIN)
    except OutOfMemoryError as error:
        processes.fail(str(error))
    except Exception:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        processes.fail(
            f'process {jax.process_index()} of {jax.process_count()} ends. If another one ended '
            f'first, its output says why; the same command goes on from the newest checkpoint.',
            processes.AGAIN,
        )


def start(words: list[str]) -> None:
    """Draws, evaluates or trains, as the flags say."""
    if FLAGS.plot:
        print(plot([*FLAGS.plot, *map(os.path.expanduser, words)], FLAGS.plot_output or ''))
        return
    if words:
        command.refuse(words)
    if FLAGS.eval_only is not None and not FLAGS.workdir:
        raise ConfigError('--eval_only evaluates a run; add --workdir=RUN')
    if FLAGS.averaged and FLAGS.eval_only is None and not FLAGS.init_from:
        raise ConfigError(
            "--averaged takes a run's averaged weights; add --eval_only to evaluate them, or "
            '--init_from=RUN to train from them'
        )
    if FLAGS.eval_only is None and not FLAGS.config:
        raise ConfigError(
            'give --config=configs/NAME.py to train, --workdir=RUN --eval_only to evaluate, or '
            '--plot=RUN to draw'
        )
    if FLAGS.config:
        check_fields(FLAGS.config)
    heartbeat = (
        FLAGS.config.guard.heartbeat_seconds if FLAGS.config else processes.HEARTBEAT_SECONDS
    )
    processes.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id, heartbeat)
    names = ('workdir', 'init_from', 'eval_only', 'averaged', 'profile', 'spare_devices')
    asked = {name: getattr(FLAGS, name) for name in names}
    agreement.check_same(agreement.start_facts(FLAGS.config, **asked))
    if FLAGS.eval_only is not None:
        step = None if FLAGS.eval_only == NEWEST else FLAGS.eval_only
        step, config = checkpoint_config(FLAGS.workdir, step, FLAGS.config)
        evaluate_only(config, FLAGS.workdir, step, FLAGS.averaged)
        return
    if not FLAGS.spare_devices:
        check_all_devices(FLAGS.config, jax.device_count(), jax.process_count())
    check_compiler_options(FLAGS.config)
    if not FLAGS.workdir and jax.process_index() == 0:
        say_unfinished(FLAGS.config)
    workdir = FLAGS.workdir or new_workdir()
    traced_steps = parse_steps(FLAGS.profile or '')
    train(FLAGS.config, workdir, FLAGS.init_from or '', traced_steps, bool(FLAGS.averaged))
    if jax.process_index() == 0:
        say_next(FLAGS.config, workdir, named=bool(FLAGS.workdir))


def define_flags() -> None:
    command.DEFINE_config('config', 'Config file, e.g. configs/tiny.py or just tiny.')
    command.DEFINE_path('workdir', None, 'Folder or URL of the run; by default a new one in runs/.')
    command.DEFINE_path('init_from', None, 'Run or checkpoint that the parameters come from.')
    flags.DEFINE_boolean(
        'averaged',
        None,
        'With --eval_only or --init_from: the averaged weights.',
    )
    flags.DEFINE_integer(
        'cpu_devices', 0, 'Devices to simulate on the CPU, per process.',
        lower_bound=0, upper_bound=4096,
    )  # fmt: skip
    flags.DEFINE_boolean('spare_devices', False, 'Let the mesh take fewer devices than there are.')
    command.define_process_flags()
    flags.DEFINE_string('profile', None, 'FIRST:LAST, steps to trace into WORKDIR/profile.')
    flags.DEFINE_flag(
        flags.Flag(
            StepParser(), None, 'eval_only', None,
            'Evaluate a checkpoint, by default the newest.',
            boolean=True,  # only such flags may stand without a value
        )
    )  # fmt: skip
    command.DEFINE_paths('plot', None, 'Draw the curves of these runs as a PNG.')
    command.DEFINE_path('plot_output', None, 'The PNG; WORKDIR/metrics.png by default.')


if __name__ == '__main__':
    command.run(main, define_flags, takes_words=True)
