"""Layouts of the zero-bubble schedule: where W, the weight gradients, fill what would be idle.

The memory is that of ZB-H1 (Qi et al. 2023): a stage keeps at most `stages` inputs, and as many
sets of what W needs. Within it, a layout is made for one of two clocks (pipeline/schedules.py):

    lock_step     a search over ticks. Up to 4 stages and 8 microbatches it ends with at most 1.03
                  times the least time; a larger one may be cut off, and the best of what it and a
                  greedy rule find is taken
    free_running  a stage takes up B before F before W, whatever is there first. For all sizes that
                  a constraint solver could prove, that is the least time (docs/4_pipeline.md)

Both count units only: microbatches pass every stage in order.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

Costs = tuple[float, float, float]  # of F, B and W of one microbatch on one stage
Counts = tuple[int, int, int]  # F, B and W that a stage has done
State = tuple[Counts, ...]  # by stage

F, B, W = range(3)
SUBSETS = [x for x in itertools.product((1, 0), repeat=3) if any(x)]  # of a stage's work on a tick
NOTHING = (0, 0, 0)
SLACK = 1e-9  # for costs that are no whole numbers

# Searches until one ends: at most so many times the least time, and so many successors looked at.
NEAR = ((1.03, 100_000),)  # takes up to a second
FAR = ((1.1, 10_000), (1.3, 10_000), (2.0, 10_000))
SMALLER = ((1.03, 3_000),)  # with smaller stashes, which often do as well
# Beyond so many stages and so many microbatches over all stages no search would end.
MOST_STAGES, MOST_UNITS = 6, 64
NEAR_UNITS = 32  # at most; a search that is near would not end for more


def advanced(state: State, row: Sequence[Counts]) -> State:
    """Returns the state after a tick."""
    return tuple((f + x[F], b + x[B], w + x[W]) for (f, b, w), x in zip(state, row, strict=True))


def tables_of(ticks: list[list[Counts]], start: State) -> np.ndarray:
    """Returns tables f, b and w of what the stages do on each tick: int32 [3, ticks, stages]."""
    out = np.full((3, len(ticks), len(start)), -1, np.int32)
    done = [list(counts) for counts in start]
    for tick, row in enumerate(ticks):
        for s, work in enumerate(row):
            for kind in np.flatnonzero(work):
                out[kind, tick, s] = done[s][kind]
                done[s][kind] += 1
    return out


# ---------------------------------------------------------------------------------------------
# In lock step
# ---------------------------------------------------------------------------------------------


def search(
    stages: int, microbatches: int, costs: Costs, stash: int, weight: float, budget: int
) -> np.ndarray | None:
    """Returns tables of at most `weight` times the least time in lock step, None beyond the budget.

    A* over how many units each stage has done; a tick's price is what its slowest stage takes.
    Doing more work is never worse, so of what fits a tick's length only the most is tried. `stash`
    bounds the sets that wait for W.
    """
    price = {x: sum(n * cost for n, cost in zip(x, costs, strict=True)) for x in SUBSETS}
    price[NOTHING] = 0.0
    lengths = sorted({p for p in price.values() if p})
    start: State = (NOTHING,) * stages
    end = (microbatches,) * 3
    best, came = {start: 0.0}, {}
    order = itertools.count()
    queue = [(0.0, 0.0, 0, start)]
    while queue:
        _, negative, _, state = heapq.heappop(queue)
        so_far = -negative
        if best[state] < so_far - SLACK:
            continue
        if all(counts == end for counts in state):
            return tables_of(_path(came, state), start)
        possible = [_possible(state, s, microbatches, stash) for s in range(stages)]
        for length in lengths:
            fitting = [
                _most(state, s, [x for x in works if price[x] <= length + SLACK], stages)
                for s, works in enumerate(possible)
            ]
            for row in itertools.product(*fitting):
                budget -= 1
                if max(price[x] for x in row) < length - SLACK:
                    continue  # a shorter tick holds it
                after = advanced(state, row)
                if any(after[s][F] - after[s + 1][B] > stages for s in range(stages - 1)):
                    continue  # no room for what arrives
                time = so_far + length
                if time < best.get(after, np.inf) - SLACK:
                    best[after], came[after] = time, (state, row)
                    rest = weight * time_left(after, microbatches, costs)
                    heapq.heappush(queue, (time + rest, -time, next(order), after))
        if budget < 0:
            return None
    return None


def _path(came: dict[State, tuple[State, tuple]], state: State) -> list[list[Counts]]:
    """Returns what the stages do on each tick on the way to a state."""
    ticks = []
    while state in came:
        state, row = came[state]
        ticks.append(list(row))
    return ticks[::-1]


def _possible(state: State, s: int, microbatches: int, stash: int) -> list[Counts]:
    """Returns the work that a stage can do on a tick, by what stages had done before it.

    The last stage may do B on the tick of its F, since the head is between them.
    """
    f, b, w = state[s]
    stages, last = len(state), s == len(state) - 1
    can_f = f < (state[s - 1][F] if s else min(microbatches, b + stages))
    can_b = b < min(f, f if last else state[s + 1][B]) and b - w < stash
    both = last and can_f and b == f and b - w < stash
    return [
        x
        for x in [*SUBSETS, NOTHING]
        if (not x[F] or can_f) and (not x[B] or can_b or (both and x[F])) and x[W] <= b + x[B] - w
    ]


def _most(state: State, s: int, works: list[Counts], stages: int) -> list[Counts]:
    """Returns the works that are in no other one, and those without F if it may find no room."""
    most = [x for x in works if not any(y != x and _holds(y, x) for y in works)]
    if s + 1 < stages and state[s][F] + 1 - state[s + 1][B] > stages:
        without = {(0, *x[1:]) for x in most if x[F]}
        most += [x for x in works if x in without and x not in most]
    return most


def _holds(y: Counts, x: Counts) -> bool:
    return y[0] >= x[0] and y[1] >= x[1] and y[2] >= x[2]


def time_left(state: State, microbatches: int, costs: Costs) -> float:
    """Returns a lower bound of the time from a state on.

    A stage has its own work left. Before it, it waits for an F on its way down or a B on its way
    up, unless it has other work for so long; after its last B, that passes all stages above.
    """
    cost_f, cost_b, cost_w = costs
    longest = 0.0
    for s, (f, b, w) in enumerate(state):
        rest = (microbatches - f) * cost_f + (microbatches - b) * cost_b
        idle = idle_before_b = 0.0
        if f < microbatches and s and state[s - 1][F] <= f:
            wait = _distance(state, s, -1, F) * cost_f
            idle_before_b = max(0.0, wait - (f - b) * cost_b)
            idle = max(0.0, wait - (f - b) * cost_b - (f - w) * cost_w)
        elif f == microbatches > b and s + 1 < len(state) and state[s + 1][B] <= b:
            idle_before_b = _distance(state, s, 1, B) * cost_b
            idle = max(0.0, idle_before_b - (b - w) * cost_w)
        longest = max(longest, rest + (microbatches - w) * cost_w + idle)
        if b < microbatches:
            longest = max(longest, rest + idle_before_b + s * cost_b + cost_w)
    return longest


def least_time(stages: int, microbatches: int, costs: Costs) -> float:
    """Returns a lower bound of the time in lock step of any layout."""
    return time_left((NOTHING,) * stages, microbatches, costs)


def _distance(state: State, s: int, step: int, kind: int) -> int:
    """Returns how many stages do a unit before it reaches stage s, the next one being the first."""
    n = 1
    while 0 <= (at := s + step * (n + 1)) < len(state) and state[at][kind] <= state[s][kind]:
        n += 1
    return n


def searched(stages: int, microbatches: int, costs: Costs) -> Iterator[np.ndarray]:
    """Yields tables that searches find: with a stash for all stages, and with smaller ones."""
    if stages > MOST_STAGES or stages * microbatches > MOST_UNITS:
        return
    searches = FAR if stages * microbatches > NEAR_UNITS else NEAR + FAR
    for stash in range(stages, 0, -1):
        for weight, budget in searches if stash == stages else SMALLER:
            table = search(stages, microbatches, costs, stash, weight, budget)
            if table is not None:
                yield table
                break


def greedy(stages: int, microbatches: int, costs: Costs, stash: int) -> np.ndarray:
    """Returns tables of a greedy list schedule, B before F before W: [3, ticks, stages].

    The most expensive kind of work limits what a tick holds: with equal costs, single units; if B
    costs as much as F and W, a B alone or an F with a W. On stage s at most stages - s inputs wait
    for their B, as in 1F1B without ticks, and at most `stash` units for their W.
    """
    room = max(costs) * (1 + SLACK)
    start: State = (NOTHING,) * stages
    state, ticks = start, []
    while min(w for _, _, w in state) < microbatches:
        row = []
        for s, (f, b, w) in enumerate(state):
            can_f = f < (state[s - 1][F] if s else microbatches) and f - b < stages - s
            can_b = b < (state[s + 1][B] if s + 1 < stages else f) and b - w < stash
            work, left = [0, 0, 0], room
            for kind, able in ((B, can_b), (F, can_f), (W, True)):
                if kind == W:
                    able = w < b + work[B]
                if able and costs[kind] <= left:
                    work[kind] = 1
                    left -= costs[kind]
            row.append(tuple(work))
        ticks.append(row)
        state = advanced(state, row)
    return tables_of(ticks, start)


# ---------------------------------------------------------------------------------------------
# Free running
# ---------------------------------------------------------------------------------------------


def in_order(stages: int, microbatches: int, costs: Costs) -> list[list[int]]:
    """Returns the order of work of each stage, as kinds, if it takes what is there first.

    Of work that can start at the same time B is taken before F and F before W. On stage s at most
    stages - s inputs wait for their B.
    """
    ends: list[list[list[float]]] = [[[] for _ in range(3)] for _ in range(stages)]
    now = [0.0] * stages
    orders: list[list[int]] = [[] for _ in range(stages)]

    def start_of(s: int, kind: int) -> float | None:
        """Returns when a stage can start its next unit of a kind, None if that is unknown yet."""
        mine, m = ends[s], len(ends[s][kind])
        if m == microbatches:
            return None
        if kind == F:
            source = ends[s - 1][F] if s else None
            blocked = m - len(mine[B]) >= stages - s
        elif kind == B:
            source = mine[F] if s == stages - 1 else ends[s + 1][B]
            blocked = m >= len(mine[F]) or m - len(mine[W]) >= stages
        else:
            source, blocked = mine[B], False
        if blocked or (source is not None and m >= len(source)):
            return None
        return max(now[s], source[m] if source is not None else 0.0)

    for _ in range(3 * stages * microbatches):
        starts = [
            (start, s, rank, kind)
            for s in range(stages)
            for rank, kind in enumerate((B, F, W))
            if (start := start_of(s, kind)) is not None
        ]
        start, s, _, kind = min(starts)
        now[s] = start + costs[kind]
        ends[s][kind].append(now[s])
        orders[s].append(kind)
    return orders


def in_ticks(orders: list[list[int]], costs: Costs) -> np.ndarray:
    """Returns tables that keep the orders, with few and short ticks: [3, ticks, stages].

    Of the lengths that a tick can have, it takes the one with the most work by its time.
    """
    stages = len(orders)
    start: State = (NOTHING,) * stages
    state, place, ticks = start, [0] * stages, []
    while any(place[s] < len(orders[s]) for s in range(stages)):
        steps = [_steps(state, s, orders[s], place[s], costs) for s in range(stages)]
        lengths = sorted({length for step in steps for length, _ in step if length})

        def chosen(length: float, steps: list = steps) -> list[tuple[float, Counts]]:
            return [max(x for x in step if x[0] <= length + SLACK) for step in steps]

        row = max((chosen(n) for n in lengths), key=lambda r: sum(x for x, _ in r) / max(r)[0])
        works = [work for _, work in row]
        ticks.append(works)
        place = [at + sum(work) for at, work in zip(place, works, strict=True)]
        state = advanced(state, works)
    return tables_of(ticks, start)


def _steps(
    state: State, s: int, order: list[int], place: int, costs: Costs
) -> list[tuple[float, Counts]]:
    """Returns what a stage can do next of its order within a tick, with the time it takes."""
    found, work, length = [(0.0, NOTHING)], [0, 0, 0], 0.0
    for kind in order[place:]:
        f, b, _ = state[s]
        if any(work[kind:]):
            break  # a tick has F before B before W, one of each
        if kind == F and s and state[s - 1][F] <= f:
            break
        if kind == B and b >= (f if s == len(state) - 1 else state[s + 1][B]):
            break
        work[kind] = 1
        length += costs[kind]
        found.append((length, tuple(work)))
    return found
