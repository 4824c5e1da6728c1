"""Guards of a run: a watchdog for one that hangs, and signals that end it well.

Steps that must not count are skipped within the compiled step: see `optimizer.judge`.
"""

import contextlib
import faulthandler
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from machine.processes import AGAIN, all_processes
from parallel import Array, P
from runtime.terminal import CLEAR

T = TypeVar('T')

STDERR = 2  # the descriptor
LONGEST_WAIT = 1.0  # seconds of the watchdog at a time; a stop of the process counts as one
REPORT_SECONDS = 30.0  # for printing what the watchdog has found
HANDLER_SECONDS = 2.0  # for the main thread to run a signal's handler
# Of users and terminals; of SLURM, SGE and LSF before their limits, as asked for or by default.
SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


class TrainingError(Exception):
    """The run cannot go on; the message says why and what to do."""


class Watchdog:
    """Follows the steps from the loop, and ends the process when none finishes for a set time.

    `follow` is called once per step and looks at the step *before* it, which is finished or about
    to be while the present one runs: the loop never waits for the step that it has just started.
    A time of 0 waits for ever. Only time counts in which this process runs: none while SIGSTOP or
    a debugger holds it.
    """

    def __init__(self, guard: ConfigDict, steps: int):
        self.guard, self.steps = guard, steps
        self._doing, self._limit, self._field = '', 0.0, ''
        self._left: float | None = None  # seconds
        self._expected = 0  # how often `_left` was set anew
        self._last: tuple[int, dict[str, Array]] | None = None
        self._changed = threading.Condition()
        self._done = False
        self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

    def __enter__(self) -> 'Watchdog':
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with self._changed:
            self._done = True
            self._changed.notify()
        self._thread.join()

    def during(self, doing: str) -> None:
        """Allows guard.pause_seconds from now on, until the next step, for something else."""
        self._expect(doing, 'pause_seconds')

    def follow(self, step: int, metrics: dict[str, Array]) -> None:
        """Waits for the step before `step`; these are the metrics of `step`.

        Raises TrainingError if it was the last of too many that were skipped; all processes, which
        see the same numbers, raise it at the same step.
        """
        last, self._last = self._last, (step, metrics)
        if last:
            self._check(*last)
        self._expect(f'in step {step} of {self.steps}', 'step_seconds')

    def _check(self, step: int, metrics: dict[str, Array]) -> None:
        in_a_row, most = int(metrics['skips_in_a_row']), self.guard.max_skips
        if most and in_a_row >= most:
            norm, mean = float(metrics['grad_norm']), float(metrics['grad_norm_mean'])
            raise TrainingError(
                f'stopped at step {step}: {in_a_row} steps in a row were skipped, whose gradient '
                f'norm was not finite or more than {self.guard.spike_factor:g} times the mean of '
                f'{mean:.3g} (the last: {norm:.3g}). The same command goes on from the newest '
                f'checkpoint and meets the same batches: lower optimizer.peak_lr, remove the '
                f'newest checkpoints to go back further, or raise guard.spike_factor if the norm '
                f'is right.'
            )

    def _expect(self, doing: str, field: str) -> None:
        with self._changed:
            self._doing, self._field, self._limit = doing, field, self.guard[field]
            self._left = self._limit if self._limit > 0 else None
            self._expected += 1
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._done:
                if self._left is not None and self._left <= 0:
                    self._end()
                wait = LONGEST_WAIT
                if self._left is not None:
                    wait = min(wait, self._left, self._limit / 10)
                expected, start = self._expected, time.monotonic()
                self._changed.wait(wait)
                if self._left is not None and self._expected == expected:
                    self._left -= min(time.monotonic() - start, wait)

    def _end(self) -> None:
        """Prints the stacks of all threads to standard error, and ends the process at once.

        Neither an exception nor a handler would get past a collective that waits for ever. The
        process ends also where nobody reads what is printed.
        """
        report = threading.Thread(target=self._report, daemon=True)
        report.start()
        report.join(REPORT_SECONDS)
        os._exit(AGAIN)

    def _report(self) -> None:
        message = f'no progress for {self._limit:g} s (guard.{self._field}), {self._doing}'
        with contextlib.suppress(OSError):
            write_error(f'{message}; the stacks of all threads:')
            faulthandler.dump_traceback(STDERR, all_threads=True)
            write_error(
                f'{message}: this process ends. Another one may have died or be stuck, see its '
                f'output; the same command goes on from the newest checkpoint.'
            )


def write_error(line: str) -> None:
    """Writes a line to standard error past Python's streams, whose locks another thread may hold.

    On a terminal it replaces a progress bar.
    """
    clear = CLEAR if os.isatty(STDERR) else ''
    os.write(STDERR, f'{clear}{line}\n'.encode())


# ---------------------------------------------------------------------------------------------
# Signals
# ---------------------------------------------------------------------------------------------


class NothingToSave(KeyboardInterrupt):
    """A signal ended the run before it took a step."""


class CutShortError(Exception):
    """The processes agreed to stop, in the middle of an evaluation or of sampling."""


class Saves(Protocol):
    """The saves of a run, as `checkpoint.Checkpointer` and `lease.OwnedSaves` are."""

    def failed(self) -> bool: ...

    def wait(self) -> None: ...


class StopSignals:
    """While entered, the signals that users and schedulers send end the run well.

    From `begin` on they ask it to save the present step and to end: the loop asks `asked` after
    each step, and what takes long between steps calls `between` now and then. Before, there is
    nothing to save. A process alone ends at once then: the handler raises NothingToSave in the main
    thread, or, if that is deep in C++ and runs no handler, this process exits. Several processes
    end together in `begin`, after compilation, since others would wait for one that has left.

    Each signal is announced at once, by a thread: a handler would have to wait for the main thread.
    A second SIGINT ends the process at once. SIGHUP stays ignored under nohup.
    """

    def __init__(self, checkpoints: Saves | None = None):
        """`checkpoints`, if given, are those whose failed saves `asked` raises."""
        self.received = 0  # number of the first signal
        self._checkpoints = checkpoints
        self._saves = False
        self._alone = True
        self._previous: dict[int, Any] = {}
        self._previous_fd = -1
        self._heard, self._wakeup = socket.socketpair()
        self._listener = threading.Thread(target=self._listen, name='signals', daemon=True)
        self._last_answer: jax.Array | None = None

    def __enter__(self) -> 'StopSignals':
        self._alone = jax.process_count() == 1
        if threading.current_thread() is not threading.main_thread():  # may set no handlers
            return self
        self._wakeup.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._listener.start()
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
        self._wakeup.close()  # ends the thread
        if self._listener.is_alive():
            self._listener.join(HANDLER_SECONDS)  # for its last word
        self._heard.close()

    def _receive(self, number: int, _: FrameType | None) -> None:
        """Notes the signal; takes no lock, since it interrupts the main thread anywhere."""
        first, self.received = not self.received, self.received or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self._alone and not self._saves:
            raise NothingToSave

    def _listen(self) -> None:
        """Announces each signal once; Python writes their numbers to the socket as they come."""
        heard: set[int] = set()
        while numbers := self._heard.recv(64):
            for number in numbers:
                if number == signal.SIGINT and number in heard:
                    os._exit(128 + number)  # the main thread has not run the handler yet
                if number in self._previous and number not in heard:
                    heard.add(number)
                    self._announce(signal.Signals(number))

    def _announce(self, number: signal.Signals) -> None:
        who = '' if self._alone else f'process {jax.process_index()}: '
        again = '; Ctrl-C again ends it at once' if number == signal.SIGINT else ''
        if self._saves:
            what = f'the run stops after this step, and saves it{again}'
        elif self._alone:
            what = 'the run ends; it has taken no step, so there is nothing to save'
        else:
            what = f'all processes end before the first step, with nothing to save{again}'
        with contextlib.suppress(OSError):
            write_error(f'{who}{number.name}: {what}')
        if self._alone and not self._saves:
            deadline = time.monotonic() + HANDLER_SECONDS
            while not self.received:  # the main thread has run no handler yet
                if time.monotonic() > deadline:
                    os._exit(0)
                time.sleep(0.01)

    def begin(self) -> None:
        """Lets signals save from now on; to be called by all processes before their first step.

        Raises NothingToSave, on all, if there was a signal before.
        """
        if not self._alone and not all_processes(not self.received):
            raise NothingToSave
        self._saves = True
        if self._alone and self.received:
            raise NothingToSave

    def interruptible(self, f: Callable[[], T]) -> T:
        """Returns f(), which may spend long in C++, so that signals end a process alone meanwhile.

        f then runs in another thread, while this one waits where handlers run.
        """
        if not self._alone:
            return f()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(f())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future.result()

    def between(self) -> None:
        """Raises CutShortError if `asked`; to be called as often by all processes."""
        if self.asked():
            raise CutShortError

    def asked(self) -> bool:
        """Returns whether to end after this step: alike on all processes, which call it every step.

        With several processes it is the answer of the call before: a device has it by now, so
        that nobody waits for the step that is running. Raises CheckpointError, on all, if a save
        under way has failed on any.
        """
        failed = self._checkpoints is not None and self._checkpoints.failed()
        stop, failed = self._any_process(bool(self.received), failed)
        if failed and self._checkpoints is not None:
            self._checkpoints.wait()
        return stop

    def _any_process(self, *flags: bool) -> tuple[bool, ...]:
        """Returns for each flag whether any process has set it; of several, in the call before."""
        if self._alone:
            return flags
        mesh, any_of = self._mesh_and_any
        here = np.array([flags], np.int32)
        everywhere = jax.make_array_from_callback(
            (mesh.size, len(flags)), NamedSharding(mesh, P('all')), lambda _: here
        )
        last, self._last_answer = self._last_answer, any_of(everywhere)
        return tuple(map(bool, np.zeros(len(flags)) if last is None else np.asarray(last)))

    @functools.cached_property
    def _mesh_and_any(self) -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
        """Returns all devices in a row, and a reduction over them that all of them hold."""
        mesh = Mesh(np.array(jax.devices()), 'all')

        def any_of(flags: jax.Array) -> jax.Array:
            return jnp.max(flags, axis=0)

        return mesh, jax.jit(any_of, out_shardings=NamedSharding(mesh, P()))
