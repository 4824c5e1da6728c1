"""The pipeline schedules by name, how long each takes, and the command that prints them.

    python -m pipeline.schedules --schedule=zero_bubble --stages=4 --microbatches=8

A schedule is a table of what each stage does on each tick: pipeline/tables.py has the terms and the
rules, pipeline/executor.py runs it.

Time is counted in two ways. `lock_step`, for which the schedules are laid out: the executor
exchanges activations and gradients once per tick, and the head needs all stages, so a tick lasts as
long as its slowest stage. `free_running`: each stage does its units in the same order, but starts
each as soon as its inputs are there. Neither counts the transport; the bubbles of both are the
published ones.

A tick may hold an F *and* a B, which keeps 1F1B's steady state full at any ratio of their costs;
alternating ticks would last max(F, B) each. The price: a microbatch takes 2 · stages - 1 ticks from
the first stage's F to its B, so that many inputs are stored, where 1F1B without ticks stores
`stages`.

Sources: GPipe, Huang et al. 2019; 1F1B (PipeDream-Flush) and interleaved 1F1B, Narayanan et al.
2021 (Megatron-LM); zero bubble, Qi et al. 2023 (ZB-H1).
"""

import functools
from collections.abc import Iterable

import numpy as np
from absl import flags

from config import ConfigError
from machine import command
from pipeline.tables import Schedule, complete
from pipeline.zero_bubble import greedy, in_order, in_ticks, searched

NAMES = ('gpipe', '1f1b', 'interleaved', 'zero_bubble')
EQUAL_COSTS = (1.0, 1.0, 1.0)  # of F, B and W
CLOCKS = ('lock_step', 'free_running')

# ---------------------------------------------------------------------------------------------
# The schedules
# ---------------------------------------------------------------------------------------------


def _waves(
    stages: int, microbatches: int, chunks: int, start_b: int, lifo: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns tables f and b in which F and B pass through the stages as waves, one per tick.

    Forward, groups of `stages` microbatches pass chunk after chunk (Narayanan et al. 2021, figure
    4); backward, the chunks come in reverse order. The last stage does its first B on tick
    `start_b`; with `lifo`, the last unit goes backward first.
    """
    order = np.arange(microbatches * chunks)
    group, place = np.divmod(order, stages * chunks)
    m = group * stages + place % stages if chunks > 1 else order
    chunk = place // stages if chunks > 1 else np.zeros_like(order)
    ticks = start_b + len(order) + stages - 1
    f, b = np.full((2, ticks, stages), -1, np.int32)
    for s in range(stages):
        f[order + s, s] = chunk * microbatches + m
        back = (chunks - 1 - chunk) * microbatches + m
        b[start_b + order + stages - 1 - s, s] = back[::-1] if lifo else back
    return f, b


def _zero_bubble(
    stages: int, microbatches: int, costs: tuple[float, float, float], clock: str
) -> Schedule:
    """Returns the layout with the least time by the clock, of those the one that keeps least."""
    if clock == 'free_running':
        tables = [in_ticks(in_order(stages, microbatches, costs), costs)]
    else:
        tables = [greedy(stages, microbatches, costs, n) for n in range(1, stages + 1)]
        tables += searched(stages, microbatches, costs)
    candidates = [complete('zero_bubble', microbatches, 1, *table) for table in tables]
    return min(candidates, key=lambda s: (lock_step(s, costs), s.s_depth, free_running(s, costs)))


def check_settings(
    name: str,
    stages: int,
    microbatches: int,
    chunks: int,
    costs: tuple[float, float, float],
    clock: str,
) -> None:
    """Raises ConfigError for an unknown schedule, or settings that do not fit it."""
    if name not in (*NAMES, 'forward'):
        raise ConfigError(f'pipeline schedule {name!r} is unknown; use one of {", ".join(NAMES)}')
    if stages < 1 or microbatches < 1 or min(costs) <= 0:
        raise ConfigError(
            f'a schedule takes at least 1 stage, 1 microbatch and costs above 0, but has '
            f'stages={stages}, microbatches={microbatches}, costs={costs}; raise those too low'
        )
    if name == 'interleaved' and chunks < 2:
        raise ConfigError(
            f'interleaved takes 2 or more chunks per stage and has {chunks}; use 2, or 1f1b'
        )
    if chunks != 1 and name not in ('interleaved', 'forward'):
        raise ConfigError(f'{name} takes 1 chunk per stage and has {chunks}; use 1, or interleaved')
    if chunks > 1 and microbatches % stages:
        raise ConfigError(
            f'{name} with {chunks} chunks takes whole groups of `stages` microbatches, but '
            f'microbatches={microbatches} is not a multiple of stages={stages}; '
            f'use {-(-microbatches // stages) * stages}'
        )
    if clock not in CLOCKS:
        raise ConfigError(f'the clock {clock!r} is unknown; use one of {", ".join(CLOCKS)}')


@functools.cache
def make_schedule(
    name: str,
    stages: int,
    microbatches: int,
    chunks: int = 1,
    costs: tuple[float, float, float] = EQUAL_COSTS,
    clock: str = 'lock_step',
) -> Schedule:
    """Makes and checks the schedule of that name. With M microbatches, it takes and keeps:

    gpipe        all F, then all B in reverse order: 2·(M + stages) - 3 ticks, M inputs
    1f1b         each B as soon as possible: M + 2·(stages - 1) ticks, min(M, 2·stages - 1) inputs
    interleaved  1f1b on `chunks` virtual stages per stage: 1/chunks of its bubble, more inputs
    zero_bubble  W fills what 1f1b leaves idle: at most `stages` inputs, and at most `stages` units
                 between B and W; laid out for `costs`, the relative costs of F, B and W, and for
                 a `clock` of CLOCKS (pipeline/zero_bubble.py)
    forward      F alone, for evaluation; takes chunks as well

    Raises ConfigError as `check_settings`.
    """
    check_settings(name, stages, microbatches, chunks, costs, clock)
    if name == 'zero_bubble':
        schedule = _zero_bubble(stages, microbatches, costs, clock)
    else:
        starts = {'gpipe': microbatches + stages - 2, 'forward': 0}
        start_b = starts.get(name, chunks * stages - 1)
        f, b = _waves(stages, microbatches, chunks, start_b, lifo=name == 'gpipe')
        if name == 'forward':
            b = np.full_like(b, -1)
        schedule = complete(name, microbatches, chunks, f, b, np.full_like(f, -1))
    schedule.check()
    return schedule


# ---------------------------------------------------------------------------------------------
# Time, and the diagram
# ---------------------------------------------------------------------------------------------


def _unit_costs(schedule: Schedule, costs: tuple[float, float, float]) -> dict[str, float]:
    """Returns the time of one unit of 'f', 'b' and 'w'; `costs` are those of a whole stage."""
    f, b, w = (cost / schedule.chunks for cost in costs)
    return {'f': f, 'b': b if schedule.split else b + w, 'w': w}


def ideal(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """Returns the time of a stage's work without any bubble."""
    cost = _unit_costs(schedule, costs)
    return sum(float((getattr(schedule, k)[:, 0] >= 0).sum()) * cost[k] for k in 'fbw')


def lock_step(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """Returns the time of all ticks if each lasts as long as its slowest stage."""
    cost = _unit_costs(schedule, costs)
    return float(sum((getattr(schedule, k) >= 0) * cost[k] for k in 'fbw').max(axis=1).sum())


def free_running(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """Returns the time if each stage starts its units in order as soon as their inputs exist."""
    cost, M = _unit_costs(schedule, costs), schedule.microbatches
    end = {work: np.zeros((schedule.stages * schedule.chunks, M)) for work in 'fbw'}
    now = np.zeros(schedule.stages)
    for tick in range(schedule.ticks):
        for work in 'fbw':
            for s in np.flatnonzero(getattr(schedule, work)[tick] >= 0):
                chunk, m = divmod(int(getattr(schedule, work)[tick, s]), M)
                v = chunk * schedule.stages + s
                inputs = 0.0
                if work == 'f' and v > 0:
                    inputs = end['f'][v - 1, m]
                elif work == 'b' and v + 1 < len(end['b']):
                    inputs = end['b'][v + 1, m]
                now[s] = end[work][v, m] = max(now[s], inputs) + cost[work]
    return float(now.max())


def describe(schedule: Schedule, costs: tuple[float, float, float] = EQUAL_COSTS) -> str:
    """Returns the diagram, the bubble and the stash of a schedule as text."""
    rows = [k for k in 'fbw' if (getattr(schedule, k) >= 0).any()]

    def cell(unit: int) -> str:
        chunk, m = divmod(int(unit), schedule.microbatches)
        letter = chr(ord('a') + chunk % 26) if schedule.chunks > 1 else ''
        return '.' if unit < 0 else f'{m}{letter}'

    width = 1 + max(len(cell(schedule.units - 1)), len(str(schedule.ticks - 1)))

    def line(label: str, cells: Iterable) -> str:
        return f'{label:<10}' + ''.join(f'{c:>{width}}' for c in cells)

    chunks = f', {schedule.chunks} chunks per stage' if schedule.chunks > 1 else ''
    text = [
        f'{schedule.name}: {schedule.stages} stages{chunks}, {schedule.microbatches} microbatches, '
        f'{schedule.ticks} ticks',
        '',
        line('tick', range(schedule.ticks)),
    ]
    for s in range(schedule.stages):
        for i, k in enumerate(rows):
            label = f'stage {s:<2} {k.upper()}' if i == 0 else f'         {k.upper()}'
            text.append(line(label, map(cell, getattr(schedule, k)[:, s])))
    names = {'f': 'F forward', 'b': 'B backward', 'w': 'W weight gradients'}
    if not schedule.split:
        names['b'] = 'B backward and weight gradients'
    legend = 'microbatches, with letters for chunks' if chunks else 'microbatches'
    best = ideal(schedule, costs)
    text += [
        '',
        f'Numbers are {legend}; {", ".join(names[k] for k in rows)}; a dot is idle.',
        f'A stage works {best:g}, where a microbatch costs F={costs[0]:g} B={costs[1]:g} '
        f'W={costs[2]:g}:',
    ]
    for label, time in (
        ('in lock step: a tick lasts as long as its slowest stage', lock_step(schedule, costs)),
        ('free running: a stage waits for nothing but its inputs', free_running(schedule, costs)),
    ):
        text.append(f'bubble {1 - best / time:6.1%} of {time:g}, {label}')
    rings = {'stage inputs': schedule.x_depth}
    if schedule.trains:
        rings['output gradients'] = schedule.g_depth
    if schedule.split:
        rings['sets of what W needs'] = schedule.s_depth
    stash = ', '.join(f'{name} {depth}' for name, depth in rings.items())
    return '\n'.join([*text, f'stash, in slots per stage, one per microbatch: {stash}'])


# ---------------------------------------------------------------------------------------------
# The command: prints a schedule
# ---------------------------------------------------------------------------------------------


def main(_: list[str]) -> None:
    """Prints the schedule that the flags describe."""
    args = flags.FLAGS
    costs = (args.cost_f, args.cost_b, args.cost_w)
    if not all(0 < cost <= 1e6 for cost in costs):
        raise ConfigError(f'the costs of F, B and W are {costs}; use numbers above 0, up to 1e6')
    schedule = make_schedule(
        args.schedule, args.stages, args.microbatches, args.chunks, costs, args.clock
    )
    print(describe(schedule, costs))


def define_flags() -> None:
    flags.DEFINE_string('schedule', '1f1b', f'{", ".join(NAMES)}.')
    most = {'lower_bound': 1, 'upper_bound': 4096}  # a table of more takes minutes, and no screen
    flags.DEFINE_integer('stages', 4, 'Pipeline stages.', **most)
    flags.DEFINE_integer('microbatches', 8, 'Microbatches per step.', **most)
    flags.DEFINE_integer('chunks', 1, 'Virtual stages per stage; only for interleaved.', **most)
    flags.DEFINE_enum(
        'clock',
        CLOCKS[0],
        CLOCKS,
        'What zero_bubble is laid out for: ticks that all stages share, or not.',
    )
    flags.DEFINE_float('cost_f', 1.0, 'Time of the forward pass of a microbatch on a stage.')
    flags.DEFINE_float('cost_b', 1.0, "Time of the stage's input gradients; 2 with recomputation.")
    flags.DEFINE_float('cost_w', 1.0, "Time of the stage's weight gradients.")


def run_command() -> None:
    """Runs the command, as this file and parallel.py do when called."""
    command.run(main, define_flags)


if __name__ == '__main__':
    run_command()
