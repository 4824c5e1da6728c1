"""Prints a run's lines, and below them on a terminal a live progress bar.

The bar shows how many steps the devices have finished, not how many are queued: it polls the losses
of the queued steps, and waits for them only where the training loop waits anyway. The terminal is
decoration: what cannot be printed never ends a run.
"""

import collections
import contextlib
import shutil
import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import TextIO

from machine.progress import CLEAR, hours, patiently
from parallel import Array

REDRAW_SECONDS = 0.1
WORD_SECONDS = 1.0  # after which the reader is told what takes so long
BAR = '━─'  # done and to do
MIN_BAR, MAX_BAR = 5, 30  # characters
SEPARATOR = '  '  # between the fields of a line


def printable(text: str, stream: TextIO) -> str:
    """Returns the text with a question mark for each character that the stream cannot encode."""
    encoding = getattr(stream, 'encoding', None) or 'utf-8'
    return text.encode(encoding, 'replace').decode(encoding)


class Terminal:
    """The output of a run of `steps` steps; nothing if not `active`, as on all but one process.

    Without a stream, or once writing to it has failed, nothing is printed any more.
    """

    def __init__(self, steps: int, active: bool = True, stream: TextIO | None = None):
        self.steps, self.active = steps, active
        self.stream: TextIO | None = stream or sys.stdout
        self.live = False
        if active and self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.live = self.stream.isatty()
        self._lock = threading.RLock()  # `patiently` prints from another thread
        self._queued: collections.deque[tuple[int, Array]] = collections.deque()
        self._status, self._seconds, self._drawn = '', 0.0, 0.0
        self._done: int | None = None  # steps; there is no bar before the first

    def say(self, text: str) -> None:
        """Prints lines above the bar, which stay."""
        if not self.active:
            return
        with self._lock:
            self._write(f'{CLEAR if self.live else ""}{text}\n')
            self._draw(at_once=True)

    def patiently(self, text: str) -> AbstractContextManager[None]:
        """Says `text` while the body runs, if that takes longer than WORD_SECONDS."""
        return patiently(text, self.say, WORD_SECONDS)

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

    def _write(self, text: str) -> None:
        """Writes and flushes; when that fails, ends all output."""
        if self.stream is None:
            return
        try:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.stream.write(printable(text, self.stream))
            self.stream.flush()
        except (OSError, ValueError):  # no reader, no room; a closed stream
            self.stream, self.live = None, False

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
            with self._lock:
                self._write(CLEAR + self._line(shutil.get_terminal_size().columns))

    def _line(self, columns: int) -> str:
        """Returns the bar with its text, for a terminal of this width.

        Where it is too narrow, whole fields are left out: the last ones first, the remaining time
        never before them.
        """
        done = self._done or 0
        front = f'step {done:>{len(str(self.steps))}}/{self.steps} '
        fields = [field for field in self._status.split(SEPARATOR) if field]
        eta = []
        if self._seconds:
            eta = [f'ETA {hours((self.steps - done) * self._seconds)}']
        room = columns - 1 - len(front) - MIN_BAR
        while fields and sum(len(SEPARATOR + field) for field in fields + eta) > room:
            fields.pop()
        back = ''.join(SEPARATOR + field for field in fields + eta)
        width = min(MAX_BAR, columns - 1 - len(front) - len(back))
        filled = width * done // self.steps
        bar = BAR[0] * filled + BAR[1] * (width - filled) if width >= MIN_BAR else ''
        if self.stream is not None and printable(bar, self.stream) != bar:
            bar = bar.replace(BAR[0], '=').replace(BAR[1], '-')
        return (front + bar + back)[: columns - 1]
