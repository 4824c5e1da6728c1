"""Ranks the best layouts of a search by what a compiler says of each.

The search compares estimates. A compiler lays out the real program, and ranks the memory that
rematerialization saves, and what it costs, otherwise at times. So the first few layouts are
compiled, and ordered anew: those that fit first, by the seconds of work and of exposed network that
are read from the program (planning/compiled.py). A layout whose seconds cannot be read is placed by
its estimate, as far above or below as the others' seconds are from theirs; one that does not
compile comes last, with the compiler's reason.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from machine.memory import OutOfMemoryError
from planning.compiled import Compiled, compile_step
from planning.report import (
    compiled_record,
    compiler_text,
    layout_text,
    overrides,
    scaled,
    seconds,
)
from planning.roofline import Estimate
from planning.search import Found, expected
from planning.topology import compiler_versions

# What a compiler raises for a program that it does not take: rules of kernels and of topologies
# (ConfigError is a ValueError), what it does not implement, and its internal errors.
REFUSALS = (ValueError, NotImplementedError, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A layout of a search, and the compiler's answer about it."""

    config: ConfigDict
    estimate: Estimate
    place: int  # by the estimate, from 1
    answer: Compiled | None  # None: it does not compile
    why: str = ''  # the reason for what the answer lacks: all of it, or the seconds

    @property
    def fits(self) -> bool:
        return self.answer is not None and self.answer.peak <= self.estimate.chip.memory

    @property
    def seconds(self) -> float | None:
        """The seconds of a step as it is scheduled; None if the compiler does not tell."""
        if self.answer is None or self.answer.cost is None or self.why:
            return None
        return self.answer.cost.seconds + self.answer.cost.total().exposed


def ranked(
    found: Found, topology: str, progress: Callable[[int, ConfigDict], None] | None = None
) -> list[Ranked]:
    """Compiles layouts for a topology and returns them in the order of the compiler's figures.

    Calls progress(place, config) before each is compiled.
    """
    rows = []
    for place, (config, e) in enumerate(found, 1):
        if progress:
            progress(place, config)
        rows.append(compiled(config, e, place, topology))
    return in_order(rows)


def compiled(config: ConfigDict, e: Estimate, place: int, topology: str) -> Ranked:
    """Compiles a layout; what the compiler does not take or tell is the reason in the answer."""
    try:
        answer = compile_step(config, topology, e.chip)
    except OutOfMemoryError as error:
        return Ranked(config, e, place, None, str(error).splitlines()[0])
    except REFUSALS as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return Ranked(config, e, place, None, f'does not compile: {why}')
    return Ranked(config, e, place, answer, without_seconds(e, answer))


def without_seconds(e: Estimate, answer: Compiled) -> str:
    """Returns why an answer does not tell the seconds of a step; '' if it does."""
    if answer.cost is None:
        return f'the program cannot be read: {answer.why}'
    if e.chip.platform != 'tpu':
        return ''
    if not e.chip.clock:
        return f'the clock of a {e.chip.name}, which turns cycles into seconds, is not known'
    if answer.cost.unpriced:
        return f'{answer.cost.unpriced:,.0f} calls of kernels have no estimate'
    return ''


def in_order(rows: Sequence[Ranked]) -> list[Ranked]:
    """Returns layouts in the order of the compiler's figures: those that fit, those that do not,
    and those that do not compile, each by their seconds."""
    scale = [row.seconds / expected(row.estimate) for row in rows if row.seconds is not None]
    usual = statistics.median(scale) if scale else 1.0

    def key(row: Ranked) -> tuple[bool, bool, float, int]:
        time = row.seconds
        if time is None:
            time = usual * expected(row.estimate)
        return not row.fits, row.answer is None, time, row.place

    return sorted(rows, key=key)


# ---------------------------------------------------------------------------------------------
# Text and record
# ---------------------------------------------------------------------------------------------


def text(rows: Sequence[Ranked], topology: str) -> str:
    """Returns both orders side by side: the compiler's figures, and the estimate's."""
    platform = rows[0].estimate.chip.platform
    head = ('compiler', 'estimate', 'compiled', 'expected', 'compiled', 'estimated')
    lines = [
        f"compiled for {topology}, in the order of the compiler's figures,",
        f'by {compiler_text(compiler_versions(platform))}:',
        ''.join(f'{x:>{n}}' for x, n in (('place by', 20), ('step', 20), ('memory', 20))),
        ''.join(f'{x:>10}' for x in head) + '  layout',
    ]
    for rank, row in enumerate(rows, 1):
        e = row.estimate
        took = '-' if row.seconds is None else seconds(row.seconds)
        peak = '-' if row.answer is None else scaled(row.answer.peak, 'B')
        columns = (rank, row.place, took, seconds(expected(e)), peak, scaled(e.memory.peak, 'B'))
        lines.append(''.join(f'{x:>10}' for x in columns) + f'  {layout_text(row.config)}')
        if row.answer is not None and not row.fits:
            lines.append(f'{"":>10}does not fit in {scaled(e.chip.memory, "B")}')
        if row.why:
            placed = '; placed by the estimate' if row.fits else ''
            lines.append(f'{"":>10}{row.why}{placed}')
    return '\n'.join(
        [
            *lines,
            'A compiled step is work and the network that is waited for, as the program is '
            'scheduled: compare it',
            'with other compiled steps, not with what is expected of a run.',
        ]
    )


def record(rows: Sequence[Ranked], base: ConfigDict) -> dict[str, Any]:
    """Returns the order of the compiler's figures as a record, best first; null: not told."""
    return {'ranked': [row_record(row, rank, base) for rank, row in enumerate(rows, 1)]}


def row_record(row: Ranked, rank: int, base: ConfigDict) -> dict[str, Any]:
    """Returns a layout's two places and figures as a record."""
    answer = compiled_record(row.answer) if row.answer else {'compiled': None}
    return {
        'place': rank,
        'estimated_place': row.place,
        'flags': overrides(row.config, base),
        'layout': layout_text(row.config),
        'step_seconds': row.seconds,
        'expected_seconds': expected(row.estimate),
        'peak': row.answer.peak if row.answer else None,
        'estimated_peak': row.estimate.memory.peak,
        'fits': row.fits,
        'why': row.why,
    } | answer
