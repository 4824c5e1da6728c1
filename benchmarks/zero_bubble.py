"""Zero-bubble layouts beside the least times that a constraint solver proves for the same memory.

    pip install ortools && python benchmarks/zero_bubble.py
    python benchmarks/zero_bubble.py --stages=2,3,4 --microbatches=4,8 --json

Of each number of stages and microbatches, and costs of F, B and W, the table has: the time of the
layout for each clock of pipeline/schedules.py, the least time, and the seconds that the layout
took. The solver keeps what the layouts keep: at most `stages` inputs and as many sets for W on a
stage. A least time that it could not prove within --seconds is followed by a question mark.
"""

import time

import common
from absl import flags

from config import ConfigError
from pipeline.schedules import CLOCKS, free_running, lock_step, make_schedule

FLAGS = flags.FLAGS
COSTS = ((1, 1, 1), (1, 2, 1), (2, 3, 1), (1, 2, 2), (1, 3, 1))
TIMES = {'lock_step': lock_step, 'free_running': free_running}


def model_of():
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise ConfigError('the least times need a solver: pip install ortools') from error
    return cp_model


def solved(model, objective, hint: int) -> tuple[int, bool]:
    """Minimizes; returns the value, and whether it is proved to be the least."""
    cp_model = model_of()
    model.Minimize(objective)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = FLAGS.seconds
    status = solver.Solve(model)
    if status == cp_model.OPTIMAL:
        return int(solver.ObjectiveValue()), True
    return (int(solver.ObjectiveValue()), False) if status == cp_model.FEASIBLE else (hint, False)


def least_free_running(S: int, M: int, costs: tuple[int, ...], hint: int) -> tuple[int, bool]:
    """Returns the least time if a stage waits for nothing but its inputs."""
    model = model_of().CpModel()
    start = {}
    for s in range(S):
        intervals = []
        for m in range(M):
            for kind, cost in zip('fbw', costs, strict=True):
                x = start[kind, s, m] = model.NewIntVar(0, hint, '')
                intervals.append(model.NewFixedSizeIntervalVar(x, cost, ''))
        model.AddNoOverlap(intervals)
    f, b, w = costs
    for (kind, s, m), x in start.items():
        if m:
            model.Add(x > start[kind, s, m - 1])
        if kind == 'f' and s:
            model.Add(x >= start['f', s - 1, m] + f)
        if kind == 'b':
            before = start['b', s + 1, m] + b if s < S - 1 else start['f', s, m] + f
            model.Add(x >= before)
            if m >= S:  # sets that wait for W
                model.Add(x >= start['w', s, m - S] + w)
        if kind == 'w':
            model.Add(x >= start['b', s, m] + b)
        if kind == 'f' and m >= S:  # inputs: the one made here, and the one that arrives
            model.Add(x >= start['b', 0, m - S] + b) if s == 0 else None
            if s < S - 1:
                model.Add(x + f >= start['b', s + 1, m - S] + b)
    end = model.NewIntVar(0, hint, '')
    model.AddMaxEquality(end, [start['w', s, M - 1] + w for s in range(S)])
    return solved(model, end, hint)


def least_in_lock_step(S: int, M: int, costs: tuple[int, ...], hint: int, ticks: int):
    """Returns the least time if a tick lasts as long as its slowest stage."""
    model = model_of().CpModel()
    # done[kind, s, t] units before tick t: microbatches keep their order
    done = {
        (kind, s, t): model.NewIntVar(0, M, '')
        for kind in range(3)
        for s in range(S)
        for t in range(ticks + 1)
    }
    lengths = [model.NewIntVar(0, sum(costs), '') for _ in range(ticks)]
    for (kind, s, t), x in done.items():
        if t == 0:
            model.Add(x == 0)
        elif t == ticks:
            model.Add(x == M)
        if t < ticks:
            after = done[kind, s, t + 1]
            model.Add(after >= x)
            model.Add(after <= x + 1)
    for t in range(ticks):
        for s in range(S):
            now = [done[kind, s, t] for kind in range(3)]
            after = [done[kind, s, t + 1] for kind in range(3)]
            work = sum(c * (y - x) for c, x, y in zip(costs, now, after, strict=True))
            model.Add(lengths[t] >= work)
            if s:
                model.Add(after[0] <= done[0, s - 1, t])
                model.Add(done[0, s - 1, t + 1] - after[1] <= S)  # inputs that arrive
            else:
                model.Add(after[0] - now[1] <= S)  # inputs that are made
            model.Add(after[1] <= (done[1, s + 1, t] if s < S - 1 else after[0]))
            model.Add(after[2] <= after[1])
            model.Add(after[1] - now[2] <= S)  # sets that wait for W
    return solved(model, sum(lengths), hint)


def measure() -> list[common.Figures]:
    rows = []
    for S in map(int, FLAGS.stages):
        for M in map(int, FLAGS.microbatches):
            for costs in COSTS:
                row: common.Figures = {'stages': S, 'microbatches': M, 'costs': str(costs)}
                for clock in CLOCKS:
                    begin = time.perf_counter()
                    schedule = make_schedule('zero_bubble', S, M, 1, costs, clock)
                    seconds = time.perf_counter() - begin
                    got = int(TIMES[clock](schedule, costs))
                    if clock == 'free_running':
                        least, proved = least_free_running(S, M, costs, got)
                    else:
                        least, proved = least_in_lock_step(S, M, costs, got, schedule.ticks + 2)
                    row |= {
                        clock: got,
                        f'{clock}_least': least if proved else f'{least}?',
                        f'{clock}_over': round(got / least - 1, 3),
                        f'{clock}_seconds': round(seconds, 2),
                    }
                rows.append(row)
    return rows


if __name__ == '__main__':
    flags.DEFINE_list('stages', ['2', '3', '4'], 'Numbers of stages.')
    flags.DEFINE_list('microbatches', ['4', '8'], 'Numbers of microbatches.')
    flags.DEFINE_float('seconds', 60.0, 'Time of the solver for each least time.')
    common.run(measure)
