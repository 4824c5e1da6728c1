"""Shared parts of the benchmarks: import path, devices, timing, and printing of figures.

Importing this file puts the project's root on the import path, before this folder, which has a
train_step.py of its own. So a benchmark imports it before the project's modules. jax is imported by
the functions that need it alone, since the workers that data_speed.py starts import this file too.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
from absl import flags

from config import ConfigError
from machine import command

FLAGS = flags.FLAGS
HERE = os.path.dirname(os.path.abspath(__file__))
flags.disclaim_key_flags()  # so that a benchmark's --help lists --json among its own

Figure = int | float | str
Figures = dict[str, Figure]
Name = TypeVar('Name')
Result = TypeVar('Result')

# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def run(measure: Callable[[], Figures | list[Figures]]) -> None:
    """Runs a benchmark as a command: prints the figures that `measure` returns as a table and, with
    --json, as one JSON object on the last line. Ends with the message of a ConfigError, and
    with 1 if a figure's name ends in 'failed'."""
    flags.DEFINE_boolean('json', False, 'Print the figures as a JSON object on the last line, too.')

    @functools.wraps(measure)
    def main(_: list[str]) -> None:
        figures = measure()
        print(table(figures))
        if FLAGS.json:
            print(json.dumps(figures if isinstance(figures, dict) else {'rows': figures}))
        if any(name.endswith('failed') for name in figures if isinstance(name, str)):
            sys.exit(1)

    command.run(main)


def figures_of(
    script: str, arguments: Sequence[str], variables: Mapping[str, str] | None = None
) -> Figures:
    """Runs another benchmark of this folder in a process of its own, with these environment
    variables added, and returns its figures. Raises CalledProcessError if it fails; its standard
    error is shown."""
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, script), *arguments, '--json'],
        env=os.environ | dict(variables or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def need(*packages: str) -> None:
    """Raises ConfigError unless these packages, no dependencies of the project, are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'{" and ".join(missing)} cannot be imported: pip install {" ".join(missing)}'
        )


def prepare_devices(cpu_devices: int = 0, keep_freed: bool = True) -> None:
    """Simulates so many devices on the CPU, or takes the machine's if 0, and lets the process keep
    the memory that it frees, as train.py does. Call it before jax is asked for devices."""
    from machine.memory import keep_freed_memory
    from machine.processes import choose_platform

    if keep_freed:
        keep_freed_memory()
    choose_platform(cpu_devices)


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------


def timed(f: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    """Returns the seconds that f(*args) takes, and its result."""
    start = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - start, result


def timed_until_ready(f: Callable[..., Result], *args: Any) -> tuple[float, Result]:
    """Returns the seconds until the jax arrays that f(*args) returns are computed, and them."""
    import jax

    start = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return time.perf_counter() - start, result


def in_turns(runs: dict[Name, Callable[[], Result]], rounds: int) -> dict[Name, list[Result]]:
    """Calls each function once per round, one after the other, every other round backwards, so that
    a drift of the machine's clock meets all of them alike. Returns the results of each, in order of
    the rounds."""
    results: dict[Name, list[Result]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in reversed(runs) if i % 2 else runs:
            results[name].append(runs[name]())
    return results


def best_seconds(runs: Mapping[Name, Callable[[], Any]], rounds: int) -> dict[Name, float]:
    """Returns the least seconds of each function over rounds in turns, until its jax arrays are
    computed. A round before them, which compiles, does not count."""

    def seconds(f: Callable[[], Any]) -> float:
        return timed_until_ready(f)[0]

    timers = {name: functools.partial(seconds, f) for name, f in runs.items()}
    return {name: min(found[1:]) for name, found in in_turns(timers, rounds + 1).items()}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the median over the rounds of each figure."""
    return {name: float(np.median([figures[name] for figures in rounds])) for name in rounds[0]}


# ---------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------


def table(figures: Figures | list[Figures]) -> str:
    """Returns a table as text: a line per figure, or for several rows with the same names a column
    per name under a header."""
    if isinstance(figures, dict):
        width = max(map(len, figures))
        return '\n'.join(f'{name:>{width}}  {shown(value)}' for name, value in figures.items())
    lines = [list(figures[0]), *([shown(value) for value in row.values()] for row in figures)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ((cell.rjust(width) for cell, width in zip(x, widths, strict=True)) for x in lines)
    return '\n'.join(map('  '.join, aligned))


def shown(value: Figure) -> str:
    """Returns a figure as text: integers in full, other numbers with four digits at least."""
    if isinstance(value, float):
        return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'
    return f'{value:,}' if isinstance(value, int) else value
