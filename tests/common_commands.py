"""Runs commands in the process of the test, as they run from a shell."""

import contextlib
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
