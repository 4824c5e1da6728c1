"""Prints a run's lines, and below them on a terminal a live progress bar.

The bar shows how many steps the devices have finished, not how many are queued: it polls the losses
of the queued steps, and waits for them only where the training loop waits anyway.
"""

import collections
import shutil
import sys
import time
from typing import TextIO

from parallel import Array

CLEAR = '\r\x1b[K'  # moves to the start of the line and erases it
REDRAW_SECONDS = 0.1


def hours(seconds: float) -> str:
    """Formats a duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


class Terminal:
    """The output of a run of `steps` steps; nothing if not `active`, as on all but one process."""

    def __init__(self, steps: int, active: bool = True, stream: TextIO | None = None):
        self.steps, self.active, self.stream = steps, active, stream or sys.stdout
        self.live = active and self.stream.isatty()
        self._queued: collections.deque[tuple[int, Array]] = collections.deque()
        self._status, self._seconds, self._drawn = '', 0.0, 0.0
        self._done: int | None = None  # steps; there is no bar before the first

    def say(self, text: str) -> None:
        """Prints lines above the bar, which stay."""
        if not self.active:
            return
        self.stream.write(f'{CLEAR if self.live else ""}{text}\n')
        self._draw(at_once=True)
        self.stream.flush()

    def log(self, step: int, text: str, seconds: float) -> None:
        """Shows a step's metrics in the bar, or prints a line; `seconds` is the time per step."""
        if not self.live:
            eta = hours((self.steps - step) * seconds)
            self.say(f'step {step}/{self.steps}  {text}  ETA {eta}')
            return
        self._status, self._seconds, self._done = text, seconds, max(step, self._done or 0)
        self._draw(at_once=True)

    def follow(self, step: int, loss: Array) -> None:
        """Registers a step that was handed to the devices; `loss` is one of its results."""
        if self.live:
            self._queued.append((step, loss))
            self._take()

    def catch_up(self, step: int) -> None:
        """Waits for the queued steps up to this one, whose results the caller wants."""
        while self._queued and self._queued[0][0] <= step:
            self._queued[0][1].block_until_ready()
            self._take()

    def close(self) -> None:
        """Replaces the bar by a line of its last metrics."""
        if self.live and self._done is not None:
            done, self._done = self._done, None
            self.say(f'step {done}/{self.steps}  {self._status}')

    def _take(self) -> None:
        """Advances the bar past the steps that have finished."""
        while self._queued and self._queued[0][1].is_ready():
            self._done = self._queued.popleft()[0]
        self._draw()

    def _draw(self, at_once: bool = False) -> None:
        """Draws the bar, if the last time is REDRAW_SECONDS ago or `at_once`."""
        now = time.monotonic()
        if not self.live or self._done is None:
            return
        if at_once or now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            self.stream.write(CLEAR + self._line(shutil.get_terminal_size().columns))
            self.stream.flush()

    def _line(self, columns: int) -> str:
        """Returns the bar with its text, for a terminal of this width."""
        done = self._done or 0
        front = f'step {done:>{len(str(self.steps))}}/{self.steps} '
        back = f'  {self._status}' if self._status else ''
        if self._seconds:
            back += f'  ETA {hours((self.steps - done) * self._seconds)}'
        width = min(30, columns - len(front) - len(back) - 1)
        filled = width * done // self.steps
        bar = '━' * filled + '─' * (width - filled) if width >= 5 else ''
        return (front + bar + back)[: columns - 1]
