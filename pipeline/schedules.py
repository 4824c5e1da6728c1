"""Pipeline schedules as integer tables: what each stage does on each tick. Plain numpy.

    python parallel.py --schedule=zero_bubble --stages=4 --microbatches=8

A *unit* of work is one microbatch m on one chunk c of a stage's layers, written as one number
u = c · microbatches + m (so u = m where a stage has one chunk). Chunk c of stage s is the virtual
stage c · stages + s: activations go around the ring of stages once a chunk. On every tick a stage
may do one F (forward of a unit), one B (its backward) and one W (its weight gradients, where the
schedule splits the backward; elsewhere they belong to B), in this order; -1 is idle. What a stage
sends on tick t, its neighbour has on tick t + 1.

The head and the loss are computed by all stages together, on the tick on which the last virtual
stage does the F of a microbatch; their gradient is there for its B on the same tick.

How a bubble is counted. The executor runs the ticks in step: activations and gradients change
hands once a tick, and the head needs all stages, so a tick lasts as long as its slowest stage.
`lock_step` adds those up, and this is what the schedules below are laid out for. A tick that holds
an F *and* a B keeps 1F1B's steady state full at any ratio of their costs, where alternating ticks
would last max(F, B) each; the price is that a microbatch takes 2 · stages - 1 ticks from the first
stage's F to its B, so that many inputs are in flight, where unsynchronised 1F1B has `stages`.
`free_running` is the same order of work without the ticks: each stage starts its next unit as soon
as its inputs are there. Without transport costs, both give the published bubbles at equal costs.

Sources: GPipe, Huang et al. 2019; 1F1B (PipeDream-Flush) and interleaved 1F1B, Narayanan et al.
2021 (Megatron-LM); zero bubble, Qi et al. 2023 (ZB-H1).
"""

import dataclasses
import functools
import heapq
import itertools
import sys
from collections.abc import Iterable, Sequence

import numpy as np
from absl import app, flags

NAMES = ('gpipe', '1f1b', 'interleaved', 'zero_bubble')


EQUAL_COSTS = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tables, and what an executor needs besides, all int32.

    x is the input of a unit on a stage, filed from its arrival to the unit's B; g the gradient of
    its output, filed from its arrival to B; s is what B saves for W. Each lies in a ring of `depth`
    slots: `slot[stage, unit]` says where. First virtual stage: x is made (embedding) by its F.
    Last virtual stage: g comes from the head, on the tick of F.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    f: np.ndarray  # [ticks, stages]: the unit that goes forward, or -1
    b: np.ndarray  # [ticks, stages]: the unit that goes backward
    w: np.ndarray  # [ticks, stages]: the unit whose weight gradients are taken; -1 if not split
    x_arrival: np.ndarray  # [ticks, stages]: the unit whose x, sent on the tick before, is there
    g_arrival: np.ndarray  # [ticks, stages]: the same for g
    head: np.ndarray  # [ticks]: the microbatch that leaves the last virtual stage, or -1
    x_slot: np.ndarray  # [stages, units]
    g_slot: np.ndarray  # [stages, units]
    s_slot: np.ndarray  # [stages, units]
    x_depth: int
    g_depth: int
    s_depth: int

    @property
    def ticks(self) -> int:
        return len(self.f)

    @property
    def units(self) -> int:
        """Units of F that each stage has."""
        return self.microbatches * self.chunks

    @property
    def split(self) -> bool:
        """Whether weight gradients are work of their own."""
        return bool((self.w >= 0).any())

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass at all."""
        return bool((self.b >= 0).any())

    @property
    def head_before_b(self) -> bool:
        """Whether some B needs the head of its own tick. Otherwise the head may end the tick, and
        stages that do a B need not wait for the last stage's F."""
        f, b = _by_virtual_stage(self, 'f'), _by_virtual_stage(self, 'b')
        return bool((f[-1] == b[-1]).any())

    def check(self) -> None:
        """Raises ValueError, naming the work, its stage and tick, if a rule is broken."""
        _check_work(self)
        _check_arrivals(self)
        _check_rings(self)


# ---------------------------------------------------------------------------------------------
# From the tables of work to the rest
# ---------------------------------------------------------------------------------------------


def _ticks_of(table: np.ndarray, units: int) -> np.ndarray:
    """[ticks, stages] of units -> [stages, units] of ticks, -1 where a unit does not occur."""
    when = np.full((table.shape[1], units), -1, np.int32)
    tick, stage = np.nonzero(table >= 0)
    when[stage, table[tick, stage]] = tick
    return when


def _by_virtual_stage(schedule: Schedule, work: str) -> np.ndarray:
    """The tick of each piece of work: [virtual stages, microbatches]."""
    when = _ticks_of(getattr(schedule, work), schedule.units)
    when = when.reshape(schedule.stages, schedule.chunks, schedule.microbatches)
    return when.swapaxes(0, 1).reshape(-1, schedule.microbatches)


def _by_stage(schedule: Schedule, virtual: np.ndarray) -> np.ndarray:
    """[virtual stages, microbatches] -> [stages, units]."""
    ticks = virtual.reshape(schedule.chunks, schedule.stages, schedule.microbatches)
    return ticks.swapaxes(0, 1).reshape(schedule.stages, schedule.units)


def _lives(schedule: Schedule) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """First and last tick of each x, g and s: [stages, units] each. Empty where nothing lives."""
    f, b, w = (_by_virtual_stage(schedule, work) for work in 'fbw')
    lives = {'x': (np.concatenate((f[:1], f[:-1] + 1)), b if schedule.trains else f)}
    if schedule.trains:
        lives['g'] = (np.concatenate((b[1:] + 1, f[-1:])), b)
    if schedule.split:
        lives['s'] = (b, w)
    return {k: (_by_stage(schedule, a), _by_stage(schedule, z)) for k, (a, z) in lives.items()}


def _assign_slots(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, int]:
    """Slots for lives [stages, units], so that no two at once share one; and how many it takes.

    By order of birth, the lowest free slot: the fewest possible, as lives are intervals.
    """
    slots, depth = np.zeros(first.shape, np.int32), 1
    for stage in range(len(first)):
        free, busy = list(range(first.shape[1])), []
        for unit in np.argsort(first[stage], kind='stable'):
            while busy and busy[0][0] < first[stage, unit]:
                heapq.heappush(free, heapq.heappop(busy)[1])
            slots[stage, unit] = heapq.heappop(free)
            heapq.heappush(busy, (last[stage, unit], slots[stage, unit]))
        depth = max(depth, int(slots[stage].max()) + 1)
    return slots, depth


def _complete(
    name: str, microbatches: int, chunks: int, f: np.ndarray, b: np.ndarray, w: np.ndarray
) -> Schedule:
    """Adds to the tables of work when what arrives, and where it is filed."""
    stages, units = f.shape[1], microbatches * chunks
    nothing = np.full_like(f, -1)
    leaves = f[:, -1] >= units - microbatches  # the last chunk of the last stage
    head = np.where(leaves, f[:, -1] % microbatches, -1)
    slots = np.zeros((stages, units), np.int32)
    schedule = Schedule(
        name, stages, microbatches, chunks, f, b, w, nothing, nothing, head,
        slots, slots, slots, 1, 1, 1,
    )  # fmt: skip
    found = {}
    for ring, (first, last) in _lives(schedule).items():
        found[f'{ring}_slot'], found[f'{ring}_depth'] = _assign_slots(first, last)
        if ring == 's':
            continue  # stays on its stage
        made = (0, 0) if ring == 'x' else (stages - 1, chunks - 1)  # by embedding or head
        arrival = nothing.copy()
        for stage, unit in np.ndindex(stages, units):
            if (stage, unit // microbatches) != made:
                arrival[first[stage, unit], stage] = unit
        found[f'{ring}_arrival'] = arrival
    return dataclasses.replace(schedule, **found)


# ---------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------


def _refuse(schedule: Schedule, what: str, rule: str) -> None:
    raise ValueError(
        f'{schedule.name} with {schedule.stages} stages, {schedule.microbatches} microbatches: '
        f'{what}; {rule}'
    )


def _check_work(schedule: Schedule) -> None:
    """Every unit once on every stage, and after what it needs."""
    expected = {'f': 1, 'b': int(schedule.trains), 'w': int(schedule.split)}
    for work, times in expected.items():
        table = getattr(schedule, work)
        if table.max() >= schedule.units:
            _refuse(
                schedule, f'{work} has unit {table.max()}', f'units end at {schedule.units - 1}'
            )
        for stage, unit in np.ndindex(schedule.stages, schedule.units):
            n = int((table[:, stage] == unit).sum())
            if n != times:
                _refuse(
                    schedule,
                    f'stage {stage} does {work.upper()} of unit {unit} {n} times',
                    f'each is done {times} times',
                )
    f, b, w = (_by_virtual_stage(schedule, work) for work in 'fbw')
    rules = [('F', 'F of the virtual stage before', f[1:], f[:-1] + 1, 1)]
    if schedule.trains:
        rules += [
            ('B', 'its own F', b, f, 0),
            ('B', 'B of the virtual stage after', b[:-1], b[1:] + 1, 0),
        ]
    if schedule.split:
        rules += [('W', 'its own B', w, b, 0)]
    for work, needed, when, earliest, shift in rules:
        for v, m in np.argwhere(when < earliest):
            _refuse(
                schedule,
                f'{work} of microbatch {m} on virtual stage {v + shift} is on tick {when[v, m]}',
                f'{needed} allows it from tick {earliest[v, m]}',
            )
    if not np.array_equal(np.flatnonzero(schedule.head >= 0), np.sort(f[-1])) or any(
        schedule.head[f[-1, m]] != m for m in range(schedule.microbatches)
    ):
        _refuse(schedule, f'the head runs as {schedule.head}', f'the last F are on ticks {f[-1]}')


def _check_arrivals(schedule: Schedule) -> None:
    """What is filed on a tick is what the neighbour sent on the one before."""
    done = _complete(
        schedule.name, schedule.microbatches, schedule.chunks, schedule.f, schedule.b, schedule.w
    )
    for ring in 'xg':
        got, sent = getattr(schedule, f'{ring}_arrival'), getattr(done, f'{ring}_arrival')
        for tick, stage in np.argwhere(got != sent):
            _refuse(
                schedule,
                f'stage {stage} files the {ring} of unit {got[tick, stage]} on tick {tick}',
                f'its neighbour sent that of unit {sent[tick, stage]} (-1: none)',
            )


def _check_rings(schedule: Schedule) -> None:
    """No slot is written while what lies in it is needed, and all are within the ring."""
    for ring, (first, last) in _lives(schedule).items():
        slots, depth = getattr(schedule, f'{ring}_slot'), getattr(schedule, f'{ring}_depth')
        for stage, used in enumerate(slots):
            if used.min() < 0 or used.max() >= depth:
                _refuse(
                    schedule,
                    f'stage {stage} uses slots {used.min()} to {used.max()} of {ring}',
                    f'there are {depth}',
                )
            births = np.argsort(first[stage], kind='stable')
            for slot in range(depth):
                for old, new in itertools.pairwise(births[used[births] == slot]):
                    if first[stage, new] <= last[stage, old]:
                        _refuse(
                            schedule,
                            f'stage {stage} overwrites slot {slot} of {ring} with unit {new} on '
                            f'tick {first[stage, new]}',
                            f'unit {old} lives there until tick {last[stage, old]}',
                        )


# ---------------------------------------------------------------------------------------------
# The schedules
# ---------------------------------------------------------------------------------------------


def _waves(stages: int, microbatches: int, chunks: int, start_b: int, lifo: bool) -> tuple:
    """F and B run through the stages as two waves, one tick a stage: tables f and b.

    Forward, groups of `stages` microbatches pass chunk after chunk (Narayanan et al. 2021, figure
    4); backward, the chunks the other way round. The last stage's first B is on tick `start_b`.
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
    stages: int, microbatches: int, costs: tuple[float, float, float], stash: int
) -> np.ndarray:
    """Greedy list schedule, B before F before W: tables [3, ticks, stages].

    A tick holds what fits into its longest kind of work: single units at equal costs; a B alone or
    an F with a W where B costs as much as both. At most stages - s inputs wait for their B on
    stage s, as in 1F1B without ticks, and at most `stash` units for their W.
    """
    cost = dict(zip('fbw', costs, strict=True))
    room = max(costs) * (1 + 1e-9)
    when = {work: np.full((stages, microbatches), -1) for work in 'fbw'}
    n = {work: [0] * stages for work in 'fbw'}  # done so far: the next microbatch
    rows = []

    def ready(work: str, s: int, tick: int) -> bool:
        m = n[work][s]
        if m == microbatches:
            return False
        if work == 'f':
            arrived = s == 0 or 0 <= when['f'][s - 1, m] < tick
            return arrived and m - n['b'][s] < stages - s
        if work == 'b':
            source = when['f'][s, m] if s == stages - 1 else when['b'][s + 1, m]
            return 0 <= source < tick and m - n['w'][s] < stash
        return m < n['b'][s]

    while min(n['w']) < microbatches:
        row = np.full((3, stages), -1, np.int32)
        for s in range(stages):
            left = room
            for work in 'bfw':
                if cost[work] <= left and ready(work, s, len(rows)):
                    left -= cost[work]
                    row['fbw'.index(work), s] = n[work][s]
                    when[work][s, n[work][s]] = len(rows)
                    n[work][s] += 1
        rows.append(row)
    return np.stack(rows, axis=1)


@functools.cache
def make_schedule(
    name: str,
    stages: int,
    microbatches: int,
    chunks: int = 1,
    costs: tuple[float, float, float] = EQUAL_COSTS,
) -> Schedule:
    """The schedule of that name, checked.

    gpipe        all F, then all B in reverse order: every input is kept, 2·(M + S) - 3 ticks
    1f1b         B as soon as it can be: min(M, 2·S - 1) inputs are kept, M + 2·(S - 1) ticks
    interleaved  1f1b on `chunks` virtual stages a stage: 1/chunks of its bubble, more inputs kept
    zero_bubble  W fills what 1f1b leaves idle: at most S inputs are kept, and at most S units
                 between B and W. It is laid out for `costs`, the relative costs of F, B and W
    forward      F alone, for evaluation; takes chunks as well

    Raises ValueError for settings that cannot be.
    """
    if name not in (*NAMES, 'forward'):
        raise ValueError(f'pipeline schedule {name!r} is unknown; use one of {", ".join(NAMES)}')
    if stages < 1 or microbatches < 1 or min(costs) <= 0:
        raise ValueError(
            f'a schedule takes at least 1 stage, 1 microbatch and costs above 0, but has '
            f'stages={stages}, microbatches={microbatches}, costs={costs}; raise what is too low'
        )
    if name == 'interleaved' and chunks < 2:
        raise ValueError(
            f'interleaved takes 2 or more chunks a stage and has {chunks}; use 2, or 1f1b'
        )
    if chunks != 1 and name not in ('interleaved', 'forward'):
        raise ValueError(f'{name} takes 1 chunk a stage and has {chunks}; use 1, or interleaved')
    if chunks > 1 and microbatches % stages:
        raise ValueError(
            f'{name} with {chunks} chunks takes whole groups of `stages` microbatches, but '
            f'microbatches={microbatches} is not a multiple of stages={stages}; '
            f'use {-(-microbatches // stages) * stages}'
        )
    if name == 'zero_bubble':  # the smallest stash among the fastest
        tables = [_zero_bubble(stages, microbatches, costs, n) for n in range(1, stages + 1)]
        candidates = [_complete(name, microbatches, 1, *table) for table in tables]
        schedule = min(candidates, key=lambda s: (lock_step(s, costs), s.s_depth))
    else:
        starts = {'gpipe': microbatches + stages - 2, 'forward': 0}
        start_b = starts.get(name, chunks * stages - 1)
        f, b = _waves(stages, microbatches, chunks, start_b, lifo=name == 'gpipe')
        if name == 'forward':
            b = np.full_like(b, -1)
        schedule = _complete(name, microbatches, chunks, f, b, np.full_like(f, -1))
    schedule.check()
    return schedule


# ---------------------------------------------------------------------------------------------
# How long it takes, and how it looks
# ---------------------------------------------------------------------------------------------


def _unit_costs(schedule: Schedule, costs: tuple[float, float, float]) -> dict[str, float]:
    """Time of one unit of each work; `costs` are those of a whole stage."""
    f, b, w = (cost / schedule.chunks for cost in costs)
    return {'f': f, 'b': b if schedule.split else b + w, 'w': w}


def ideal(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """The time of a stage's work without any bubble."""
    cost = _unit_costs(schedule, costs)
    return sum(float((getattr(schedule, k)[:, 0] >= 0).sum()) * cost[k] for k in 'fbw')


def lock_step(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """The time of all ticks, where each lasts as long as its slowest stage."""
    cost = _unit_costs(schedule, costs)
    return float(sum((getattr(schedule, k) >= 0) * cost[k] for k in 'fbw').max(axis=1).sum())


def free_running(schedule: Schedule, costs: tuple[float, float, float]) -> float:
    """The time if every stage did its units in the table's order as soon as their inputs exist."""
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
    """The diagram, the bubble and the stash, for people to read."""
    rows = [k for k in 'fbw' if (getattr(schedule, k) >= 0).any()]

    def cell(unit: int) -> str:
        chunk, m = divmod(int(unit), schedule.microbatches)
        letter = chr(ord('a') + chunk % 26) if schedule.chunks > 1 else ''
        return '.' if unit < 0 else f'{m}{letter}'

    width = 1 + max(len(cell(schedule.units - 1)), len(str(schedule.ticks - 1)))

    def line(label: str, cells: Iterable) -> str:
        return f'{label:<10}' + ''.join(f'{c:>{width}}' for c in cells)

    chunks = f', {schedule.chunks} chunks a stage' if schedule.chunks > 1 else ''
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
    return '\n'.join([*text, f'stash, in slots a stage, one a microbatch: {stash}'])


# ---------------------------------------------------------------------------------------------
# The command: prints a schedule
# ---------------------------------------------------------------------------------------------


def main(_: Sequence[str]) -> None:
    args = flags.FLAGS
    costs = (args.cost_f, args.cost_b, args.cost_w)
    try:
        schedule = make_schedule(args.schedule, args.stages, args.microbatches, args.chunks, costs)
    except ValueError as error:
        sys.exit(str(error))
    print(describe(schedule, costs))


def run_command() -> None:
    """Defines the command's flags and runs it: here, and as `python parallel.py`."""
    flags.DEFINE_string('schedule', '1f1b', 'gpipe, 1f1b, interleaved or zero_bubble.')
    flags.DEFINE_integer('stages', 4, 'Pipeline stages.')
    flags.DEFINE_integer('microbatches', 8, 'Microbatches of a step.')
    flags.DEFINE_integer('chunks', 1, 'Virtual stages a stage (interleaved).')
    flags.DEFINE_float('cost_f', 1.0, 'Time of a forward of one microbatch on one stage.')
    flags.DEFINE_float('cost_b', 1.0, 'Time of its input gradients; 2 with recomputation.')
    flags.DEFINE_float('cost_w', 1.0, 'Time of its weight gradients.')
    app.run(main)


if __name__ == '__main__':
    run_command()
