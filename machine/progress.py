"""Says on standard error how far a long work is, and how long it may take.

On a terminal this is one line, rewritten; in a file or pipe a line for each tenth. What is done
within a second says nothing. What cannot be printed is left out.
"""

import contextlib
import functools
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TextIO, TypeVar

REDRAW_SECONDS = 0.1
SILENT_SECONDS = 1.0  # after which it is said what takes so long
CLEAR = '\r\x1b[K'  # moves to the start of the line and erases it

T = TypeVar('T')


def hours(seconds: float) -> str:
    """Formats a duration as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


class Progress:
    """The progress of a work; may be told of it from any thread."""

    def __init__(
        self,
        what: str,
        total: float,
        before: float = 0.0,
        silent: float = SILENT_SECONDS,
        stream: TextIO | None = None,
    ):
        """`total` is its size, of which `before` was done before it began; says nothing for the
        first `silent` seconds."""
        self.what, self.total, self.done = what, max(total, 1e-9), before
        self._before, self._silent, self._stream = before, silent, stream or sys.stderr
        self._started = time.monotonic()
        self._drawn, self._tenths, self._open = 0.0, int(10 * before / self.total), False
        self._lock = threading.Lock()
        self._terminal = False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._terminal = self._stream.isatty()

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, n: float, text: str = '') -> None:
        """Says that so much more is done."""
        with self._lock:
            self.done += n
            self._show(text)

    def show(self, done: float, text: str = '') -> None:
        """Says how much is done, and a text."""
        with self._lock:
            self.done = done
            self._show(text)

    def close(self) -> None:
        """Ends the line on a terminal, so that the next print has its own."""
        with self._lock:
            if self._open:
                self._write('\n')
            self._open = False

    @property
    def seconds(self) -> float:
        """The time since the start, never 0."""
        return max(time.monotonic() - self._started, 1e-9)

    def _show(self, text: str) -> None:
        share = min(self.done / self.total, 1.0)
        now, tenths = time.monotonic(), int(10 * share)
        if self.seconds < self._silent:
            return
        if self._terminal:
            if now - self._drawn >= REDRAW_SECONDS or share == 1:
                columns = shutil.get_terminal_size().columns - 1
                self._write(CLEAR + self._line(share, text)[:columns])
                self._drawn, self._open = now, True
        elif tenths > self._tenths:
            self._write(self._line(share, text) + '\n')
        self._tenths = tenths

    def _line(self, share: float, text: str) -> str:
        """Returns the share as a bar and a number, the text, and the time that is left."""
        done = self.done - self._before
        eta = f'ETA {hours((self.total - self.done) / done * self.seconds)}' if done > 0 else ''
        fields = (self.what, f'[{"#" * int(20 * share):20}] {share:4.0%}', text, eta)
        return '  '.join(field for field in fields if field)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stream.write(text)
            self._stream.flush()


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yields the items, of which there are `total`, and says how far it is."""
    with Progress(what, total) as progress:
        for item in items:
            yield item
            progress.add(1)


@contextlib.contextmanager
def patiently(
    text: str, say: Callable[[str], None] | None = None, seconds: float | None = None
) -> Iterator[None]:
    """Says `text` while the body runs, if that takes longer than so many seconds: by default
    SILENT_SECONDS, and on standard error."""
    say = say or functools.partial(print, file=sys.stderr, flush=True)
    timer = threading.Timer(SILENT_SECONDS if seconds is None else seconds, say, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def interruptible(fn: Callable[..., T], *args: Any) -> T:
    """Returns fn(*args), called in a thread: Ctrl-C does not wait for code that hears no signals.

    The thread goes on until the process ends. Raises what fn raises.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(fn(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future.result()


@contextlib.contextmanager
def interruption(text: str | Callable[[], str]) -> Iterator[None]:
    """Adds to a KeyboardInterrupt in the body what stands and how to go on, or a function of it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text if isinstance(text, str) else text()) from None
