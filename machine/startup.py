"""Prepares a process before the imports that take seconds: its streams, and Ctrl-C.

Imports the standard library alone.
"""

import io
import os
import select
import signal
import sys

PATIENCE_SECONDS = 5.0  # for a reader that has stopped reading


class Decoration(io.FileIO):
    """A stream that a program does not depend on: what cannot be written is dropped.

    The reader may be gone, the disk full, or nobody reads a pipe that is full.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, 'w', closefd=False)
        self._patience = PATIENCE_SECONDS

    def write(self, data: bytes) -> int:
        """Writes what can be written; returns the length of all."""
        rest = memoryview(data).cast('B')
        total = len(rest)
        try:
            while rest and self._ready():
                # No more than a pipe takes without waiting, once it takes anything.
                rest = rest[super().write(rest[: select.PIPE_BUF]) or len(rest) :]
        except OSError:
            pass
        return total

    def _ready(self) -> bool:
        """Returns True once something can be written, False if that takes too long."""
        ready = bool(select.select([], [self], [], self._patience)[1])
        self._patience = PATIENCE_SECONDS if ready else 0.0
        return ready


def open_closed_streams() -> None:
    """Lets closed descriptors of standard streams lead nowhere.

    Else the next file that is opened would get the number, and with it what is printed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one


def decoration(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    """Returns a text stream in place of a standard one, on which no print fails.

    Characters that its encoding lacks are written as question marks.
    """
    raw = Decoration(descriptor)
    encoding = stream.encoding if stream else 'utf-8'
    lines = raw.isatty() or descriptor == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors='replace', line_buffering=lines
    )


def quick_interrupts() -> None:
    """Lets Ctrl-C end the process at once, without a traceback of what it is importing."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def hear_interrupts() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def prepare() -> None:
    """Makes the terminal decoration, and lets Ctrl-C end the process at once until a run hears it.

    A KeyboardInterrupt within an import is lost where the import catches it, and shows a traceback
    where not. For programs whose results are files: a failed print goes unnoticed.
    """
    quick_interrupts()
    open_closed_streams()
    sys.stdout, sys.stderr = decoration(sys.stdout, 1), decoration(sys.stderr, 2)
