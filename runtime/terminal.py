"""What a run prints: lines in a file or a pipe, and above them a live bar on a terminal.

The bar shows how many steps the devices have finished, not how many are queued: it looks at the
losses of the queued ones, and waits for them only where the loop waits anyway.
"""

import collections
import shutil
import sys
import time
from typing import TextIO

from parallel import Array

CLEAR = '\r\x1b[K'  # back to the start of the line, and erase it


REDRAW_SECONDS = 0.1


def hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


class Terminal:
    """Prints for a run of `steps` steps; with `active` false, as on all processes but one, not."""

    def __init__(self, steps: int, active: bool = True, stream: TextIO | None = None):
        self.steps, self.active, self.stream = steps, active, stream or sys.stdout
        self.live = active and self.stream.isatty()
        self._queued: collections.deque[tuple[int, Array]] = collections.deque()
        self._status, self._seconds, self._drawn = '', 0.0, 0.0
        self._done: int | None = None  # steps; there is no bar before the first

    def say(self, text: str) -> None:
        """Lines that stay, above the bar."""
        if not self.active:
            return
        self.stream.write(f'{CLEAR if self.live else ""}{text}\n')
        self._draw(at_once=True)
        self.stream.flush()

    def log(self, step: int, text: str, seconds: float) -> None:
        """What is known of a logged step, at `seconds` a step: the bar's text, else a line."""
        if not self.live:
            eta = hours((self.steps - step) * seconds)
            self.say(f'step {step}/{self.steps}  {text}  ETA {eta}')
            return
        self._status, self._seconds, self._done = text, seconds, max(step, self._done or 0)
        self._draw(at_once=True)

    def follow(self, step: int, loss: Array) -> None:
        """A step that was handed to the devices; `loss` is one of its results."""
        if self.live:
            self._queued.append((step, loss))
            self._take()

    def catch_up(self, step: int) -> None:
        """Waits for the queued steps up to this one, of which the caller wants the results."""
        while self._queued and self._queued[0][0] <= step:
            self._queued[0][1].block_until_ready()
            self._take()

    def close(self) -> None:
        """Replaces the bar by what it said last."""
        if self.live and self._done is not None:
            done, self._done = self._done, None
            self.say(f'step {done}/{self.steps}  {self._status}')

    def _take(self) -> None:
        while self._queued and self._queued[0][1].is_ready():
            self._done = self._queued.popleft()[0]
        self._draw()

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self.live or self._done is None:
            return
        if at_once or now - self._drawn >= REDRAW_SECONDS:
            self._drawn = now
            self.stream.write(CLEAR + self._line(shutil.get_terminal_size().columns))
            self.stream.flush()

    def _line(self, columns: int) -> str:
        done = self._done or 0
        front = f'step {done:>{len(str(self.steps))}}/{self.steps} '
        back = f'  {self._status}' if self._status else ''
        if self._seconds:
            back += f'  ETA {hours((self.steps - done) * self._seconds)}'
        width = min(30, columns - len(front) - len(back) - 1)
        filled = width * done // self.steps
        bar = '━' * filled + '─' * (width - filled) if width >= 5 else ''
        return (front + bar + back)[: columns - 1]
