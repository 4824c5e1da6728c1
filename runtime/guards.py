"""Guards of a run: signals that end it well, and a watchdog for one that hangs.

Steps that must not count are skipped within the compiled step: see `optimizer.judge`.
"""

import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from parallel import Array, P

AGAIN = os.EX_TEMPFAIL  # 75, the exit code that asks for the same command again


class TrainingError(Exception):
    """The run cannot go on; the message says why and what to do."""


class Watchdog:
    """Follows the steps from the loop, and ends the process when none finishes for a set time.

    `follow` is called once per step and looks at the step *before* it, which is finished or about
    to be while the present one runs: the loop never waits for the step that it has just started.
    A time of 0 waits for ever.
    """

    def __init__(self, guard: ConfigDict, steps: int):
        self.guard, self.steps = guard, steps
        self._doing, self._limit, self._field = '', 0.0, ''
        self._deadline: float | None = None
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
            self._deadline = time.monotonic() + self._limit if self._limit else None
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._done:
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and left <= 0:
                    self._end()
                self._changed.wait(left)

    def _end(self) -> None:
        """Prints the stacks of all threads to standard error, and ends the process at once.

        Neither an exception nor a handler would get past a collective that waits for ever.
        """
        file = sys.__stderr__
        message = f'no progress for {self._limit:g} s (guard.{self._field}), {self._doing}'
        print(f'{message}; the stacks of all threads:', file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
        print(
            f'{message}: this process ends. Another one may have died or be stuck, see its output; '
            f'the same command goes on from the newest checkpoint.',
            file=file,
            flush=True,
        )
        os._exit(AGAIN)


class StopSignals:
    """While entered, SIGTERM and SIGINT ask the run to save and end after the present step.

    A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}
        self._last_answer: jax.Array | None = None

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def asked(self) -> bool:
        """Returns whether to end after this step: alike on all processes, which call it every step.

        With several processes it is the answer of the call before: a device has it by now, so
        that nobody waits for the step that is running.
        """
        if jax.process_count() == 1:
            return self.received
        mesh, any_of = self._mesh_and_any
        flag = np.array([self.received], np.int32)
        flags = jax.make_array_from_callback(
            (mesh.size,), NamedSharding(mesh, P('all')), lambda _: flag
        )
        last, self._last_answer = self._last_answer, any_of(flags)
        return last is not None and bool(last)

    @functools.cached_property
    def _mesh_and_any(self) -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
        """Returns all devices in a row, and a reduction over them to one number that all hold."""
        mesh = Mesh(np.array(jax.devices()), 'all')
        return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
