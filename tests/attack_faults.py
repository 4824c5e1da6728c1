"""Faults in files, and the verdicts on what the code made of them, for tests/attack.py."""

import contextlib
import io
import os
import pathlib
import random
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from checkpoint import CheckpointError
from config import ConfigError
from corpus.workers import WorkerError
from runtime.guards import TrainingError

# Verdicts that are right: the same result, bit for bit; an error that says what is wrong; a smaller
# result than without the fault, as the design has it, and said.
HARMLESS, REFUSED, WARNED = 'harmless', 'refused', 'warned'
# Failures. A traceback stands for every error that names neither file nor field.
WRONG, HANG, TRACEBACK = 'wrong', 'hang', 'traceback'
FAILURES = (WRONG, HANG, TRACEBACK)
VERDICTS = (HARMLESS, REFUSED, WARNED, *FAILURES)

# What commands print as one line. Of OSError only one that names a path: a missing or damaged file.
NAMED = (ConfigError, CheckpointError, TrainingError, WorkerError, OSError)


class Outcome(NamedTuple):
    """The verdict on one fault."""

    verdict: str
    description: str  # of the fault
    detail: str = ''  # the error's first line, or the failure in full


class Family:
    """Faults of one kind. A fault follows from its random generator and its number alone."""

    name: str
    limit = 60.0  # seconds for one fault, after which it counts as a hang

    def __init__(self, folder: pathlib.Path):
        """Builds what the faults damage copies of, below `folder`."""
        self.folder = folder

    def attack(self, rng: random.Random, index: int) -> Outcome:
        """Makes one fault and judges it."""
        raise NotImplementedError


def judge(
    description: str,
    action: Callable[[], Any],
    check: Callable[[Any], tuple[str, str]],
    names: tuple[str, ...] = (),
) -> Outcome:
    """Returns the outcome of an action after a fault.

    `check` gives verdict and detail for the action's result. An error has to be NAMED, and to
    contain one of `names`, if there are any.
    """
    try:
        result = action()
    except NAMED as error:
        message = str(error)
        if names and not any(name in message for name in names):
            return Outcome(TRACEBACK, description, f'names none of {names}: {error!r}')
        if isinstance(error, OSError) and not isinstance(error, ConfigError) and not names:
            return Outcome(TRACEBACK, description, traceback.format_exc())
        return Outcome(REFUSED, description, message.partition('\n')[0])
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of a Rust library is no Exception
        return Outcome(TRACEBACK, description, traceback.format_exc())
    verdict, detail = check(result)
    return Outcome(verdict, description, detail)


@contextlib.contextmanager
def silent():
    """Yields the text that is printed meanwhile, of both streams."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


# ---------------------------------------------------------------------------------------------
# Faults in files
# ---------------------------------------------------------------------------------------------


def files_below(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns all files below a folder, in order."""
    return sorted(path for path in folder.rglob('*') if path.is_file())


def flip_bit(path: pathlib.Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    i, bit = rng.randrange(len(data)), rng.randrange(8)
    data[i] ^= 1 << bit
    path.write_bytes(data)
    return f'bit {bit} of byte {i} flipped in'


def change_byte(path: pathlib.Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    i = rng.randrange(len(data))
    old = data[i]
    data[i] = rng.choice([b for b in range(256) if b != old])
    path.write_bytes(data)
    return f'byte {i} changed from {old} to {data[i]} in'


def change_block(path: pathlib.Path, rng: random.Random) -> str:
    """Overwrites some bytes in a row by zeros or noise, as a lost sector does."""
    data = bytearray(path.read_bytes())
    n = rng.randint(1, min(512, len(data)))
    start, zeros = rng.randint(0, len(data) - n), rng.random() < 0.5
    data[start : start + n] = bytes(n) if zeros else rng.randbytes(n)
    path.write_bytes(data)
    return f'bytes {start} to {start + n - 1} {"zero" if zeros else "noise"} in'


def truncate(path: pathlib.Path, rng: random.Random) -> str:
    n = rng.randrange(path.stat().st_size)
    os.truncate(path, n)
    return f'cut to {n} bytes:'


def empty(path: pathlib.Path, rng: random.Random) -> str:
    path.write_bytes(b'')
    return 'emptied:'


def extend(path: pathlib.Path, rng: random.Random) -> str:
    n = rng.randint(1, 64)
    more = rng.choice([bytes(n), rng.randbytes(n), path.read_bytes()])
    with open(path, 'ab') as f:
        f.write(more)
    return f'{len(more)} bytes appended to'


def delete(path: pathlib.Path, rng: random.Random) -> str:
    path.unlink()
    return 'removed:'


DAMAGE = (flip_bit, flip_bit, change_byte, change_block, truncate, empty, extend, delete)


def damage_file(folder: pathlib.Path, path: pathlib.Path, rng: random.Random) -> str:
    """Damages one file below a folder; returns the description."""
    fault = rng.choice(DAMAGE) if path.stat().st_size else extend
    return f'{fault(path, rng)} {path.relative_to(folder)}'


def exchange(a: pathlib.Path, b: pathlib.Path) -> None:
    """Exchanges two files or folders."""
    aside = a.with_name(a.name + '.aside')
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def exchange_with_alike(
    folder: pathlib.Path, first: pathlib.Path, among: list[pathlib.Path], rng: random.Random
) -> str | None:
    """Exchanges a file for one of the same size and other content; None if there is none."""
    rng.shuffle(among)
    for other in among:
        same_size = first.stat().st_size == other.stat().st_size
        if same_size and first.read_bytes() != other.read_bytes():
            exchange(first, other)
            return f'exchanged: {first.relative_to(folder)} and {other.relative_to(folder)}'
    return None


class Undo:
    """Brings a folder back to what it was, after each fault.

    Files are told apart by inode, size and time, so that only those that changed are written.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._contents = {path: path.read_bytes() for path in files_below(folder)}
        self._stamps = self._stamp()

    def __enter__(self) -> pathlib.Path:
        return self.folder

    def __exit__(self, *_: Any) -> None:
        stamps = self._stamp()
        for path in stamps.keys() - self._contents.keys():
            path.unlink()
        folders = {parent for path in self._contents for parent in path.parents}
        for path in sorted(self.folder.rglob('*'), reverse=True):
            if path.is_dir() and path not in folders:
                path.rmdir()
        for path, content in self._contents.items():
            if stamps.get(path) != self._stamps[path]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.write_bytes(content)
        self._stamps = self._stamp()
        assert self._stamps.keys() == self._contents.keys()

    def _stamp(self) -> dict[pathlib.Path, tuple[int, int, int]]:
        stamps = {}
        for folder, _, names in os.walk(self.folder):
            for name in names:
                status = os.lstat(os.path.join(folder, name))
                stamps[pathlib.Path(folder, name)] = (
                    status.st_ino, status.st_size, status.st_mtime_ns
                )  # fmt: skip
        return stamps
