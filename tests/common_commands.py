"""Runs commands in the process of the test, as they run from a shell."""

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from unittest import mock

from absl import flags

from machine import command


@contextlib.contextmanager
def command_line(script: str, *arguments: str) -> Iterator[None]:
    """Sets sys.argv; flags that are defined within are gone afterwards."""
    known = set(flags.FLAGS)
    with mock.patch.object(sys, 'argv', [script, *arguments]):
        try:
            yield
        finally:
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()


def run_command(module: ModuleType, *arguments: str, takes_words: bool = False) -> None:
    """Runs the command of a module, which has main and define_flags."""
    define: Callable[[], None] = getattr(module, 'define_flags', None) or module._define_flags
    with command_line(f'{module.__name__}.py', *arguments):
        command.run(module.main, define, takes_words)


def benchmark(name: str) -> ModuleType:
    """Returns a benchmark as a module. Its folder is on the path while it is imported, and the
    tests' own `common` makes room for the benchmarks'."""
    folder = str(pathlib.Path(__file__).resolve().parent.parent / 'benchmarks')
    ours = sys.modules.pop('common', None)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)
        sys.modules.pop('common', None)
        if ours is not None:
            sys.modules['common'] = ours
