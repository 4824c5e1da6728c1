"""A step that must not count changes nothing on any device; a run that hangs or diverges ends."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import assert_replicas_identical, batch_at, initial_state, on_mesh, set_up, small_config
from jax import lax
from ml_collections import ConfigDict

import optimizer
import train_step
from checkpoint import CheckpointError
from configs import default
from parallel import PP, TP, Tree, make_mesh
from runtime import guards
from train_step import setup

POISON = -2  # no target, like -1, but the device that reads it gets gradients without a number
SKIPPED = 1


def poisoned(compute):
    """Returns gradients with NaN in each leaf on one of the devices that hold the poisoned row."""

    def wrapped(params, tokens_MBT, *args, **kwargs):
        grads, nll, stats = compute(params, tokens_MBT, *args, **kwargs)
        one = (lax.axis_index(PP) == 0) & (lax.axis_index(TP) == 0)
        bad = jnp.any(tokens_MBT == POISON) & one
        return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads), nll, stats

    return wrapped


def poisoned_batch_at(step: int, rows: slice) -> np.ndarray:
    tokens = batch_at(step, slice(None))
    if step == SKIPPED:
        assert tokens[5, -1] == -1
        tokens[5, -1] = POISON
    return tokens[rows]


def run(config: ConfigDict, step: Callable, leave_out: bool) -> tuple[Tree, list[Tree]]:
    """State and metrics after four steps, the update of one of them left out or poisoned."""
    mesh = make_mesh(config.mesh)
    state, metrics = initial_state(setup(config, mesh)), []
    for i in range(4):
        if leave_out and i == SKIPPED:
            for holder, name, value in ((state, 'step', i + 1), (state['history'], 'skipped', 1)):
                holder[name] = jax.device_put(np.int32(value), holder[name].sharding)
            continue
        batch = train_step.put_batch(poisoned_batch_at, i, setup(config, mesh))
        state, of_step = step(state, batch)
        metrics.append(jax.device_get(of_step))
    return state, metrics


PIPELINE = {'schedule': 'zero_bubble'}


@pytest.mark.parametrize(
    ('sizes', 'changes'),
    [
        ((1, 2, 2, 2), {}),
        *(
            pytest.param(sizes, changes, marks=pytest.mark.slow)
            for sizes, changes in [
                ((1, 1, 1, 1), {}),
                ((2, 2, 2, 1), {'check_vma': False}),
                ((1, 2, 1, 2, 2), {}),
                ((1, 1, 2, 2, 2), {'check_vma': False}),
                ((1, 4, 1, 1, 2), {'pipeline': PIPELINE}),
                ((1, 2, 2, 1, 2), {'fsdp_gather': 'step'}),
            ]
        ),
    ],
    ids=str,
)
def test_a_poisoned_step_is_as_if_it_had_not_been(sizes, changes, monkeypatch):
    for name in ('accumulated', 'pipelined'):
        monkeypatch.setattr(train_step, name, poisoned(getattr(train_step, name)))
    config = on_mesh(small_config(moe=True, microbatches=2), sizes)
    config.model.update(n_layers=2, first_dense=0, block=('moe',))
    config.update(changes)
    step = train_step.make_train_step(set_up(config))
    state, metrics = run(config, step, leave_out=False)
    expected, expected_metrics = run(config, step, leave_out=True)
    assert [int(m['skipped']) for m in metrics] == [0, 1, 1, 1]
    assert [int(m['skips_in_a_row']) for m in metrics] == [0, 1, 0, 0]
    assert math.isnan(metrics[SKIPPED]['grad_norm'])
    del metrics[SKIPPED]
    for a, b in zip(metrics, expected_metrics, strict=True):
        assert (a['loss'], a['grad_norm'], a['lr']) == (b['loss'], b['grad_norm'], b['lr'])
    assert int(state['history']['skipped']) == 1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    assert_replicas_identical(state)


@pytest.mark.slow
def test_without_the_guard_the_poison_spreads(monkeypatch):
    monkeypatch.setattr(train_step, 'accumulated', poisoned(train_step.accumulated))
    config = small_config()
    config.guard.nonfinite = False
    step = train_step.make_train_step(setup(config, make_mesh({})))
    state, metrics = run(config, step, leave_out=False)
    assert int(metrics[-1]['skipped']) == 0
    assert all(np.isnan(x).all() for x in jax.tree.leaves(jax.device_get(state['params'])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sizes', 'share'), [((1, 1, 1), 0.05), ((1, 2, 2, 2), 0.05), ((1, 2, 1, 2, 2), 0.15)], ids=str
)
def test_skipping_keeps_no_second_state(sizes, share):
    config = on_mesh(small_config(moe=True, microbatches=2), sizes)
    config.model.update(d_model=128, d_ff=256, d_expert=128)

    def analysis(**changes):
        config.guard.update(changes)
        return train_step.lower_train_step(set_up(config)).compile().memory_analysis()

    guarded, free = analysis(), analysis(nonfinite=False, spike_factor=0.0)
    state = guarded.alias_size_in_bytes
    assert state > 0.99 * guarded.argument_size_in_bytes
    # 11 % of the state more have been seen with stages, for a reason that is not known; a copy of
    # the state would be all of it.
    assert guarded.temp_size_in_bytes < free.temp_size_in_bytes + share * state


def judged(norms: list[float], **changes) -> tuple[list[bool], dict]:
    guard = default.get_config().guard
    guard.update(changes)
    history, applied = optimizer.init_history(), []
    for norm in norms:
        apply, history = optimizer.judge(jnp.float32(norm), history, guard)
        applied.append(bool(apply))
    return applied, {name: float(x) for name, x in history.items()}


def test_norms_are_judged_by_their_recent_history():
    inf, nan = math.inf, math.nan
    # Before the history is complete no finite norm is too large.
    assert judged([1, 100, nan, inf, 1], history=4)[0] == [True, True, False, False, True]
    applied, history = judged([1, 4, 2, 30, nan, 2, 30, 30], history=3, spike_factor=10)
    assert applied == [True, True, True, False, False, True, False, False]
    assert (history['counted'], history['skipped'], history['in_a_row']) == (4, 4, 2)
    assert math.exp(history['log_norm']) == pytest.approx(2)
    # The mean follows what is recent.
    norms = [2.0**i for i in range(20)]
    assert all(judged(norms, history=3, spike_factor=10)[0])
    assert judged([*norms, 1, 2.0**30], history=3, spike_factor=10)[0][-2:] == [True, False]
    # A norm of 0, of a batch without targets, says nothing.
    assert judged([1, 1, 0, 1], history=2)[1] == judged([1, 1, 1], history=2)[1]


def test_guards_can_be_off():
    norms = [1, 1, 1000, math.nan, math.inf]
    assert judged(norms, history=2, spike_factor=0.0)[0] == [True, True, True, False, False]
    applied, history = judged(norms, history=2, spike_factor=0.0, nonfinite=False)
    assert all(applied)
    assert history['skipped'] == 0
    assert math.isfinite(history['log_norm'])


def test_too_many_skips_stop_the_run():
    guard = default.get_config().guard
    guard.max_skips = 3
    with guards.Watchdog(guard, steps=10) as watchdog:
        skips = [0, 1, 2, 0, 1, 2, 3]
        for step, n in enumerate(skips, start=1):
            metrics = {'skips_in_a_row': np.int32(n), 'grad_norm': math.nan, 'grad_norm_mean': 2.0}
            watchdog.follow(step, metrics)
        with pytest.raises(guards.TrainingError, match='stopped at step 7: 3 steps in a row'):
            watchdog.follow(8, metrics)
    guard.max_skips = 0
    with guards.Watchdog(guard, steps=10) as watchdog:
        watchdog.follow(7, metrics)
        watchdog.follow(8, metrics)


HANG = """
import sys, time
sys.path.insert(0, sys.argv[1])
from configs import default
from runtime import guards
guard = default.get_config().guard
guard.step_seconds, guard.pause_seconds = float(sys.argv[2]), float(sys.argv[3])

def stuck():
    time.sleep(3)

with guards.Watchdog(guard, steps=9) as watchdog:
    watchdog.during('compiling')
    for step in range(1, 4):
        watchdog.follow(step, {'skips_in_a_row': 0})
        time.sleep(0.1)
    if sys.argv[4:]:
        watchdog.during('saving')
    stuck()
print('went on')
"""


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('0.5', '0'), 'no progress for 0.5 s (guard.step_seconds), in step 3 of 9'),
        (('0.5', '0.7', 'pause'), 'no progress for 0.7 s (guard.pause_seconds), saving'),
        (('0.5', '0', 'pause'), ''),
    ],
)
def test_the_watchdog_ends_a_process_that_hangs(arguments, message):
    root = os.path.dirname(os.path.dirname(guards.__file__))
    command = [sys.executable, '-c', HANG, root, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if not message:
        assert (done.returncode, done.stdout, done.stderr) == (0, 'went on\n', '')
        return
    assert done.returncode == 75 == guards.AGAIN
    assert done.stdout == ''
    assert message in done.stderr
    assert ' in stuck\n' in done.stderr
    assert 'the same command goes on from the newest checkpoint' in done.stderr


@pytest.mark.parametrize('seconds', [math.inf, 1e30, math.nan])
def test_the_watchdog_takes_any_time(seconds):
    guard = default.get_config().guard
    guard.pause_seconds, guard.step_seconds = seconds, seconds
    with guards.Watchdog(guard, steps=9) as watchdog:
        watchdog.during('compiling')
        time.sleep(0.05)
        watchdog.follow(1, {})
        assert watchdog._thread.is_alive()


def test_time_in_which_the_process_is_stopped_does_not_count():
    root = os.path.dirname(os.path.dirname(guards.__file__))
    stops = HANG.replace('time.sleep(3)', 'print("begun", flush=True); time.sleep(0.4)')
    command = [sys.executable, '-c', stops, root, '0.8', '0']
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'begun\n'
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30) == (b'went on\n', b'')


def test_the_watchdog_ends_a_process_whose_errors_nobody_reads():
    root = os.path.dirname(os.path.dirname(guards.__file__))
    full = 'import os\nr, w = os.pipe()\nos.dup2(w, 2)\nos.set_blocking(2, False)\n'
    full += 'try:\n    while True: os.write(2, b"x" * 4096)\nexcept BlockingIOError: pass\n'
    full += 'os.set_blocking(2, True)\n'
    imported = 'from runtime import guards\n'
    quick = HANG.replace(imported, f'{imported}guards.REPORT_SECONDS = 0.3\n')
    for start in (full, 'import os\nos.close(2)\n'):
        command = [sys.executable, '-c', start + quick, root, '0.5', '0']
        assert subprocess.run(command, timeout=60).returncode == guards.AGAIN


# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------


class Checkpoints:
    """Stands for a Checkpointer, one of whose saves may have failed."""

    def __init__(self):
        self.has_failed = False

    def failed(self) -> bool:
        return self.has_failed

    def wait(self) -> None:
        if self.has_failed:
            raise CheckpointError('no room')


@pytest.mark.parametrize('number', guards.SIGNALS, ids=lambda n: n.name)
def test_each_signal_is_heard_and_said(number, capfd):
    before = [signal.getsignal(n) for n in guards.SIGNALS]
    with guards.StopSignals() as stop:
        stop.begin()
        assert not stop.asked()
        stop.between()
        os.kill(os.getpid(), number)
        assert stop.asked()
        with pytest.raises(guards.CutShortError):
            stop.between()
        os.kill(os.getpid(), signal.SIGTERM)  # another one changes nothing
        assert stop.asked()
    assert [signal.getsignal(n) for n in guards.SIGNALS] == before
    said = capfd.readouterr().err
    assert said.count(f'{number.name}: the run stops after this step, and saves it') == 1
    assert ('Ctrl-C again ends it at once' in said) == (number == signal.SIGINT)


def test_before_the_first_step_there_is_nothing_to_save(capfd):
    with pytest.raises(guards.NothingToSave), guards.StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert 'SIGTERM: the run ends; it has taken no step' in capfd.readouterr().err
    with guards.StopSignals() as stop:
        with contextlib.suppress(KeyboardInterrupt):  # as a library might do
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(guards.NothingToSave):
            stop.begin()


def test_compiling_is_interruptible():
    """A thread that never looks at signals, like the compiler, keeps none from being heard."""
    compiled = threading.Event()
    threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with guards.StopSignals() as stop:
        assert stop.interruptible(lambda: 'result') == 'result'
        with pytest.raises(ZeroDivisionError):
            stop.interruptible(lambda: 1 / 0)
        with pytest.raises(guards.NothingToSave):
            stop.interruptible(lambda: compiled.wait(20))
    assert not compiled.is_set()
    compiled.set()


def test_several_processes_end_together(monkeypatch, capfd):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    answers = []
    monkeypatch.setattr(guards, 'all_processes', lambda flag: answers.append(flag) or flag)
    with guards.StopSignals() as stop:
        stop.begin()
    with guards.StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(guards.NothingToSave):
            stop.begin()
    assert answers == [True, False]
    said = 'process 0: SIGTERM: all processes end before the first step, with nothing to save'
    assert said in capfd.readouterr().err


def test_flags_of_several_processes_are_those_of_the_call_before(monkeypatch):
    checkpoints = Checkpoints()
    monkeypatch.setattr(guards, 'all_processes', lambda flag: flag)
    with guards.StopSignals(checkpoints) as stop:
        stop.begin()
        stop._alone = False  # the devices of this process stand for those of all
        assert not stop.asked()
        stop.received = signal.SIGTERM
        assert not stop.asked()
        assert stop.asked()
        checkpoints.has_failed = True
        assert stop.asked()
        with pytest.raises(CheckpointError):
            stop.asked()


def test_a_failed_save_is_raised_at_the_next_step():
    checkpoints = Checkpoints()
    with guards.StopSignals(checkpoints) as stop:
        stop.begin()
        assert not stop.asked()
        checkpoints.has_failed = True
        with pytest.raises(CheckpointError, match='no room'):
            stop.asked()


def test_under_nohup_a_lost_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with guards.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            stop.begin()
            assert not stop.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


STUCK = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
from runtime import guards
guards.HANDLER_SECONDS = 0.5
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with guards.StopSignals() as stop:
    if sys.argv[2:]:
        stop.begin()
    print('begun', flush=True)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, and no signal interrupts it
"""


@pytest.mark.parametrize(
    ('begun', 'numbers', 'code'),
    [
        (False, [signal.SIGTERM], 0),
        (True, [signal.SIGTERM, signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_a_main_thread_deep_in_c_cannot_hold_a_signal_up(begun, numbers, code):
    root = os.path.dirname(os.path.dirname(guards.__file__))
    command = [sys.executable, '-c', STUCK, root, *(['begun'] if begun else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'begun\n'
        time.sleep(0.2)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        _, said = process.communicate(timeout=30)
        assert process.returncode == code
    assert said.decode().startswith(f'{numbers[0].name}: the run ')
