"""Pipeline schedules as integer tables, and the rules that every table keeps. Plain numpy.

A *unit* of work is one microbatch m on one chunk c of a stage's layers, written as one number
u = c · microbatches + m; with one chunk per stage, u = m. Chunk c of stage s is the virtual stage
c · stages + s: activations go around the ring of stages once per chunk. On every tick a stage does
at most one F (forward of a unit), one B (its backward) and one W (its weight gradients, if the
schedule splits the backward; otherwise B includes them), in this order. -1 stands for idle. What a
stage sends on tick t, its neighbour has on tick t + 1.

All stages compute the head and the loss together, on the tick on which the last virtual stage does
the F of a microbatch; the gradient is there for its B on the same tick.
"""

import dataclasses
import heapq
import itertools
from typing import NoReturn

import numpy as np


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The tables of work of a schedule, and where its executor files arrays; all int32.

    x is the input of a unit on a stage, filed from its arrival to the unit's B; g is the gradient
    of its output, filed from its arrival to B; s is what B saves for W. Each has a ring of `depth`
    slots, in which `slot[stage, unit]` is its place. On the first virtual stage, F makes x (the
    embedding). On the last virtual stage, g comes from the head, on the tick of F.
    """

    name: str
    stages: int
    microbatches: int
    chunks: int
    f: np.ndarray  # [ticks, stages]: the unit that goes forward, or -1
    b: np.ndarray  # [ticks, stages]: the unit that goes backward
    w: np.ndarray  # [ticks, stages]: the unit whose weight gradients are computed; -1 if not split
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
        """Number of ticks."""
        return len(self.f)

    @property
    def units(self) -> int:
        """Number of units that each stage runs forward."""
        return self.microbatches * self.chunks

    @property
    def split(self) -> bool:
        """True if weight gradients are work of their own."""
        return bool((self.w >= 0).any())

    @property
    def trains(self) -> bool:
        """True if there is a backward pass."""
        return bool((self.b >= 0).any())

    @property
    def head_before_b(self) -> bool:
        """True if some B needs the head of its own tick.

        Otherwise the head may end the tick, so that stages with a B need not wait for the last
        stage's F.
        """
        f, b = self.by_virtual_stage('f'), self.by_virtual_stage('b')
        return bool((f[-1] == b[-1]).any())

    def by_virtual_stage(self, work: str) -> np.ndarray:
        """Returns the tick of each 'f', 'b' or 'w', -1 if there is none.

        Shape [virtual stages, microbatches].
        """
        when = _ticks_of(getattr(self, work), self.units)
        when = when.reshape(self.stages, self.chunks, self.microbatches)
        return when.swapaxes(0, 1).reshape(-1, self.microbatches)

    def by_stage(self, virtual: np.ndarray) -> np.ndarray:
        """Reorders [virtual stages, microbatches] to [stages, units]."""
        ticks = virtual.reshape(self.chunks, self.stages, self.microbatches)
        return ticks.swapaxes(0, 1).reshape(self.stages, self.units)

    def lives(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns the first and last tick of each x, g and s, [stages, units] each.

        g is missing without a backward pass, s if that is not split.
        """
        f, b, w = (self.by_virtual_stage(work) for work in 'fbw')
        lives = {'x': (np.concatenate((f[:1], f[:-1] + 1)), b if self.trains else f)}
        if self.trains:
            lives['g'] = (np.concatenate((b[1:] + 1, f[-1:])), b)
        if self.split:
            lives['s'] = (b, w)
        return {ring: (self.by_stage(a), self.by_stage(z)) for ring, (a, z) in lives.items()}

    def check(self) -> None:
        """Raises ValueError, naming the work, its stage and tick, if a rule is broken."""
        _check_work(self)
        _check_arrivals(self)
        _check_rings(self)


# ---------------------------------------------------------------------------------------------
# From the tables of work to the others
# ---------------------------------------------------------------------------------------------


def _ticks_of(table: np.ndarray, units: int) -> np.ndarray:
    """Turns [ticks, stages] of units into [stages, units] of ticks, -1 for missing units."""
    when = np.full((table.shape[1], units), -1, np.int32)
    tick, stage = np.nonzero(table >= 0)
    when[stage, table[tick, stage]] = tick
    return when


def _assign_slots(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, int]:
    """Assigns slots to the lives of x, g or s, so that no two share one at the same time.

    first, last: ticks [stages, units]. Returns the slots [stages, units] and their number. In the
    order of `first`, each takes the lowest free slot: for intervals, this needs the fewest.
    """
    slots, depth = np.zeros(first.shape, np.int32), 1
    for stage in range(len(first)):
        free, busy = list(range(first.shape[1])), []
        births, deaths = first[stage].tolist(), last[stage].tolist()
        for unit in np.argsort(first[stage], kind='stable').tolist():
            while busy and busy[0][0] < births[unit]:
                heapq.heappush(free, heapq.heappop(busy)[1])
            slot = heapq.heappop(free)
            slots[stage, unit] = slot
            heapq.heappush(busy, (deaths[unit], slot))
        depth = max(depth, int(slots[stage].max()) + 1)
    return slots, depth


def complete(
    name: str, microbatches: int, chunks: int, f: np.ndarray, b: np.ndarray, w: np.ndarray
) -> Schedule:
    """Makes a schedule of its tables of work, [ticks, stages] each, by adding all others."""
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
    for ring, (first, last) in schedule.lives().items():
        found[f'{ring}_slot'], found[f'{ring}_depth'] = _assign_slots(first, last)
        if ring == 's':
            continue  # stays on its stage
        made = (0, 0) if ring == 'x' else (stages - 1, chunks - 1)  # by embedding or head
        arrival = nothing.copy()
        stage, unit = np.indices((stages, units))
        sent = (stage != made[0]) | (unit // microbatches != made[1])
        arrival[first[sent], stage[sent]] = unit[sent]
        found[f'{ring}_arrival'] = arrival
    return dataclasses.replace(schedule, **found)


# ---------------------------------------------------------------------------------------------
# The rules
# ---------------------------------------------------------------------------------------------


def _refuse(schedule: Schedule, found: str, rule: str) -> NoReturn:
    raise ValueError(
        f'{schedule.name} with {schedule.stages} stages, {schedule.microbatches} microbatches: '
        f'{found}; {rule}'
    )


def _check_work(schedule: Schedule) -> None:
    """Checks that each stage does every unit once, and after what it needs."""
    expected = {'f': 1, 'b': int(schedule.trains), 'w': int(schedule.split)}
    for work, times in expected.items():
        table = getattr(schedule, work)
        if table.max() >= schedule.units:
            _refuse(
                schedule, f'{work} has unit {table.max()}', f'units end at {schedule.units - 1}'
            )
        done = np.zeros((schedule.stages, schedule.units), np.int32)
        tick, stage = np.nonzero(table >= 0)
        np.add.at(done, (stage, table[tick, stage]), 1)
        for stage, unit in np.argwhere(done != times):
            _refuse(
                schedule,
                f'stage {stage} does {work.upper()} of unit {unit} {done[stage, unit]} times',
                f'each is done {times} times',
            )
    f, b, w = (schedule.by_virtual_stage(work) for work in 'fbw')
    # work, what it needs, its ticks, the earliest it may have, the first virtual stage of both
    rules = [('F', 'F of the virtual stage before', f[1:], f[:-1] + 1, 1)]
    if schedule.trains:
        rules += [
            ('B', 'its own F', b, f, 0),
            ('B', 'B of the virtual stage after', b[:-1], b[1:] + 1, 0),
        ]
    if schedule.split:
        rules += [('W', 'its own B', w, b, 0)]
    for work, needed, when, earliest, start in rules:
        for v, m in np.argwhere(when < earliest):
            _refuse(
                schedule,
                f'{work} of microbatch {m} on virtual stage {v + start} is on tick {when[v, m]}',
                f'{needed} allows it from tick {earliest[v, m]}',
            )
    if not np.array_equal(np.flatnonzero(schedule.head >= 0), np.sort(f[-1])) or any(
        schedule.head[f[-1, m]] != m for m in range(schedule.microbatches)
    ):
        _refuse(schedule, f'the head runs as {schedule.head}', f'the last F are on ticks {f[-1]}')


def _check_arrivals(schedule: Schedule) -> None:
    """Checks that a stage files on each tick what its neighbour sent on the one before."""
    done = complete(
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
    """Checks that slots lie within the ring, and none is written while its content is needed."""
    for ring, (first, last) in schedule.lives().items():
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
