"""What lets a run be left alone: steps that are skipped, and a watchdog for one that hangs.

A step whose gradient norm is not finite, or far above its recent history, leaves parameters,
moments and expert biases as they were; the step number, and with it the data, goes on. The norm is
one number that all devices hold, so they decide alike, within the compiled step.
"""

import faulthandler
import os
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from parallel import Array, Tree

AGAIN = os.EX_TEMPFAIL  # 75, the exit code that asks for the same command again


def init_history() -> Tree:
    """What the next step is judged by; scalars, alike on all devices.

    log_norm: float32, the mean logarithm of the gradient norm; counted: int32, the norms in it;
    skipped and in_a_row: int32, the steps skipped so far, and those since the last update.
    """
    counts = {name: jnp.zeros((), jnp.int32) for name in ('counted', 'skipped', 'in_a_row')}
    return {'log_norm': jnp.zeros((), jnp.float32)} | counts


def judge(norm: Array, history: Tree, guard: ConfigDict) -> tuple[Array, Tree]:
    """Whether a step with this gradient norm is to be applied (bool), and the history after it.

    The norm is compared with a geometric mean, which the few large norms of a healthy run move
    little: of all steps at first, then with a weight of 1/guard.history for the newest. Skipped
    steps do not enter it. It judges once it holds guard.history steps.
    """
    log_norm, counted = history['log_norm'], history['counted']
    apply = jnp.array(True)
    if guard.nonfinite:
        apply &= jnp.isfinite(norm)
    if guard.spike_factor:
        spike = norm > guard.spike_factor * jnp.exp(log_norm)
        apply &= ~(spike & (counted >= guard.history))
    counts = apply & jnp.isfinite(norm) & (norm > 0)
    weight = 1 / jnp.minimum(counted + 1, guard.history).astype(jnp.float32)
    moved = log_norm + weight * (jnp.log(norm) - log_norm)
    after = {
        'log_norm': jnp.where(counts, moved, log_norm),
        'counted': counted + counts,
        'skipped': history['skipped'] + ~apply,
        'in_a_row': jnp.where(apply, 0, history['in_a_row'] + 1),
    }
    return apply, after


def select(apply: Array, new: Tree, old: Tree) -> Tree:
    """The new leaves if the step is to be applied, otherwise the old ones.

    Elementwise, so that the update is still written over the donated state; `lax.cond` would keep
    the old state beside it.
    """
    return jax.tree.map(lambda x, y: jnp.where(apply, x, y), new, old)


class TrainingError(Exception):
    """The run cannot go on; the message says why and what to do."""


class Watchdog:
    """Follows the steps from the loop, and ends the process when none finishes for a set time.

    `follow` is called once a step and looks at the step *before* it, which is finished or about
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
        """From now on, until the next step, something else takes its time: pause_seconds."""
        self._expect(doing, 'pause_seconds')

    def follow(self, step: int, metrics: dict[str, Array]) -> None:
        """Waits for the step before `step`, whose metrics these are.

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
        """The stacks of all threads to standard error; then the process ends, whatever it holds:
        neither an exception nor a handler would get past a collective that waits for ever."""
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
