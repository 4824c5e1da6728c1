"""Schedules keep the rules of tables, and have the published bubbles; check() finds broken ones."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from config import ConfigError
from pipeline import zero_bubble
from pipeline.schedules import (
    CLOCKS,
    NAMES,
    describe,
    free_running,
    ideal,
    lock_step,
    make_schedule,
)

GRID = list(itertools.product([1, 2, 3, 4, 8], [1, 2, 3, 4, 7, 8, 16]))
RECOMPUTE = (1.0, 2.0, 1.0)  # costs of F, B and W if B runs the forward again


def bubble(name, stages, microbatches, chunks=1, costs=(1.0, 1.0, 1.0), time=lock_step):
    schedule = make_schedule(name, stages, microbatches, chunks, costs)
    return time(schedule, costs) - ideal(schedule, costs)


def assert_all_work_is_done_once(schedule):
    """Checks the tables of work directly, apart from the rules that Schedule.check() knows."""
    tables = {'f': schedule.f, 'b': schedule.b, 'w': schedule.w}
    asked = {'f': True, 'b': schedule.name != 'forward', 'w': schedule.split}
    for name, table in tables.items():
        units = list(range(schedule.microbatches * schedule.chunks)) if asked[name] else []
        for column in table.T:
            assert sorted(column[column >= 0]) == units, (name, schedule)


@pytest.mark.parametrize('name', ['gpipe', '1f1b', 'zero_bubble', 'forward'])
def test_any_number_of_stages_and_microbatches(name):
    for stages, microbatches in GRID:
        for costs in ((1, 1, 1), RECOMPUTE, (1, 1.3, 0.9)):
            schedule = make_schedule(name, stages, microbatches, 1, costs)
            assert_all_work_is_done_once(schedule)


@pytest.mark.parametrize('name', ['interleaved', 'forward'])
def test_chunks(name):
    for stages, chunks, groups in itertools.product([1, 2, 4], [2, 3], [1, 2, 3]):
        assert_all_work_is_done_once(make_schedule(name, stages, groups * stages, chunks))


def test_number_of_ticks():
    for stages, microbatches in GRID:
        assert make_schedule('1f1b', stages, microbatches).ticks == microbatches + 2 * (stages - 1)
        assert make_schedule('gpipe', stages, microbatches).ticks == (
            2 * (microbatches + stages) - 3
        )
    assert make_schedule('zero_bubble', 4, 8).ticks == 27


@pytest.mark.parametrize('time', [lock_step, free_running])
@pytest.mark.parametrize('costs', [(1, 1, 1), RECOMPUTE, (2, 3, 1)])
def test_bubbles_are_the_published_ones(time, costs):
    """(stages - 1)·(F + B + W), over chunks if interleaved: Narayanan et al. 2021, section 2.2."""
    for stages, microbatches in ((2, 4), (4, 4), (4, 8), (4, 3), (8, 16)):
        whole = (stages - 1) * sum(costs)
        assert bubble('gpipe', stages, microbatches, 1, costs, time) == pytest.approx(whole)
        assert bubble('1f1b', stages, microbatches, 1, costs, time) == pytest.approx(whole)
    for chunks in (2, 4):
        part = bubble('interleaved', 4, 8, chunks, costs, time)
        assert part == pytest.approx(3 * sum(costs) / chunks)


@pytest.mark.parametrize('time', [lock_step, free_running])
def test_zero_bubble_has_a_third_of_the_bubble(time):
    """(stages - 1)·(F + B - W), Qi et al. 2023, table 2, from microbatches = stages on."""
    for stages, microbatches in ((2, 4), (4, 4), (4, 8), (4, 32), (8, 16)):
        assert bubble('zero_bubble', stages, microbatches, time=time) == stages - 1
        assert bubble('1f1b', stages, microbatches, time=time) == 3 * (stages - 1)


def test_zero_bubble_is_laid_out_for_the_costs():
    """If B costs as much as F and W, a table for equal costs would be slower than 1F1B."""
    for stages, microbatches in GRID[7:]:
        zero = bubble('zero_bubble', stages, microbatches, 1, RECOMPUTE)
        assert zero < bubble('1f1b', stages, microbatches, 1, RECOMPUTE)
    fitting = make_schedule('zero_bubble', 4, 8, 1, RECOMPUTE)
    assert lock_step(fitting, RECOMPUTE) == 41
    assert lock_step(make_schedule('1f1b', 4, 8), RECOMPUTE) == 44
    assert lock_step(make_schedule('zero_bubble', 4, 8), RECOMPUTE) == 49
    assert fitting.s_depth == 1


# The least times that OR-tools' CP-SAT 9.15 proves, in lock step and free running, by
# `python benchmarks/zero_bubble.py`; by (stages, microbatches) and costs.
LEAST = {
    (2, 4): {(1, 1, 1): (13, 13), (1, 2, 1): (18, 18), (2, 3, 1): (28, 28), (1, 2, 2): (22, 22),
             (1, 3, 1): (23, 23)},
    (3, 4): {(1, 1, 1): (14, 14), (1, 2, 2): (24, 24), (1, 3, 1): (28, 26)},
    (4, 4): {(1, 1, 1): (15, 15), (1, 2, 1): (24, 22), (2, 3, 1): (38, 36), (1, 2, 2): (26, 26),
             (1, 3, 1): (31, 29)},
}  # fmt: skip
LEAST_FREE_RUNNING = {(4, 8): {(1, 2, 1): 38, (2, 3, 1): 60, (1, 2, 2): 46, (1, 3, 1): 49}}


@pytest.mark.parametrize(('stages', 'microbatches'), LEAST)
def test_zero_bubble_is_near_the_least_time_for_its_memory(stages, microbatches):
    for costs, (least, least_free) in LEAST[stages, microbatches].items():
        schedule = make_schedule('zero_bubble', stages, microbatches, 1, costs)
        assert least <= lock_step(schedule, costs) <= 1.03 * least
        free = make_schedule('zero_bubble', stages, microbatches, 1, costs, 'free_running')
        assert least_free <= free_running(free, costs) <= 1.03 * least_free


def test_zero_bubble_runs_free_in_the_least_time():
    for (stages, microbatches), cases in LEAST_FREE_RUNNING.items():
        for costs, least in cases.items():
            free = make_schedule('zero_bubble', stages, microbatches, 1, costs, 'free_running')
            assert free_running(free, costs) == least


def test_layouts_of_both_clocks_keep_as_much_as_zb_h1():
    for stages, microbatches in itertools.product([1, 2, 4, 7], [1, 3, 6]):
        for costs, clock in itertools.product([(1, 1, 1), RECOMPUTE, (3, 1, 2)], CLOCKS):
            schedule = make_schedule('zero_bubble', stages, microbatches, 1, costs, clock)
            assert_all_work_is_done_once(schedule)
            assert max(schedule.x_depth, schedule.s_depth) <= stages


def test_a_search_that_is_cut_off_leaves_the_greedy_layout(monkeypatch):
    for searches in ('NEAR', 'FAR', 'SMALLER'):
        monkeypatch.setattr(zero_bubble, searches, ((1.03, 10),))
    make_schedule.cache_clear()
    assert lock_step(make_schedule('zero_bubble', 4, 8, 1, (1, 3, 1)), (1, 3, 1)) == 59
    make_schedule.cache_clear()
    assert zero_bubble.search(4, 8, (1, 3, 1), 4, 1.03, 10) is None


def test_stash_depths():
    """Little's law: M + 2·(stages - 1) ticks need 2·stages - 1 inputs; ZB-H1 at most stages."""
    for stages, microbatches in GRID:
        assert make_schedule('gpipe', stages, microbatches).x_depth == microbatches
        one = make_schedule('1f1b', stages, microbatches)
        assert (one.x_depth, one.g_depth) == (min(microbatches, 2 * stages - 1), 1)
        zero = make_schedule('zero_bubble', stages, microbatches)
        assert zero.x_depth <= stages
        assert zero.s_depth <= stages
    depths = {make_schedule('interleaved', 4, m, 2).x_depth for m in (8, 16, 32)}
    assert len(depths) == 1, 'grows with microbatches'
    assert make_schedule('forward', 4, 16).x_depth == 1


def corrupted(schedule, table, index, value):
    changed = np.array(getattr(schedule, table))
    changed[index] = value
    return dataclasses.replace(schedule, **{table: changed})


@pytest.mark.parametrize(
    ('table', 'index', 'value', 'message'),
    [
        ('f', (0, 0), -1, 'stage 0 does F of unit 0 0 times; each is done 1 times'),
        ('b', (0, 0), 7, 'stage 0 does B of unit 7 2 times'),
        ('w', (26, 0), -1, 'stage 0 does W of unit 7 0 times'),
        ('f', (0, 0), 8, 'units end at 7'),
        ('f', (slice(0, 2), 1), (0, -1), 'F of microbatch 0 on virtual stage 1 is on tick 0'),
        ('b', ([7, 9], 0), (1, 0), 'B of microbatch 1 on virtual stage 0 is on tick 7'),
        ('b', (slice(2, 5), 3), (0, -1, -1), 'its own F allows it from tick 3'),
        ('w', ([3, 12], 3), (0, -1), 'its own B allows it from tick 4'),
        ('head', 3, -1, 'the head runs as'),
        ('x_arrival', (1, 1), -1, 'stage 1 files the x of unit -1 on tick 1'),
        ('g_arrival', (1, 1), 2, 'its neighbour sent that of unit -1'),
        ('x_slot', (0, slice(None)), 0, 'overwrites slot 0 of x'),
        ('x_slot', (0, 0), 4, 'there are 4'),
        ('s_slot', (0, slice(None)), 0, 'overwrites slot 0 of s'),
        ('g_slot', (3, 0), -1, 'uses slots -1'),
    ],
)
def test_broken_tables_are_found(table, index, value, message):
    schedule = make_schedule('zero_bubble', 4, 8)
    with pytest.raises(ValueError, match=message):
        corrupted(schedule, table, index, value).check()


@pytest.mark.parametrize('name', NAMES)
def test_a_moved_unit_is_found(name):
    """Moving any single B of the last stage to another tick breaks a rule."""
    schedule = make_schedule(name, 2, 4, 2 if name == 'interleaved' else 1)
    for tick in np.flatnonzero(schedule.b[:, 1] >= 0):
        for other in np.flatnonzero(schedule.b[:, 1] < 0):
            column = schedule.b[:, 1].copy()
            column[other], column[tick] = column[tick], -1
            with pytest.raises(ValueError, match=name):
                corrupted(schedule, 'b', (slice(None), 1), column).check()


@pytest.mark.parametrize('name', [*NAMES, 'forward'])
@pytest.mark.parametrize(('stages', 'microbatches'), [(1, 2), (2, 4), (4, 8), (4, 4), (3, 2)])
def test_rings_bring_every_message_to_its_reader(name, stages, microbatches):
    """Runs stages by the tables alone, with labels in place of activations and gradients."""
    if name == 'interleaved' and microbatches % stages:
        pytest.skip('needs whole groups of microbatches')
    schedule = make_schedule(name, stages, microbatches, 2 if name == 'interleaved' else 1)
    x, g, saved = (
        [[None] * depth for _ in range(stages)]
        for depth in (schedule.x_depth, schedule.g_depth, schedule.s_depth)
    )
    sent_y, sent_dx, taken = [None] * stages, [None] * stages, []
    for tick in range(schedule.ticks):
        y, dx = [None] * stages, [None] * stages
        for s in range(stages):
            if (u := schedule.x_arrival[tick, s]) >= 0:
                x[s][schedule.x_slot[s, u]] = sent_y[s - 1]
            if (u := schedule.g_arrival[tick, s]) >= 0:
                g[s][schedule.g_slot[s, u]] = sent_dx[(s + 1) % stages]
            if (u := schedule.f[tick, s]) >= 0:
                chunk, m = divmod(int(u), microbatches)
                if (chunk, s) == (0, 0):
                    x[s][schedule.x_slot[s, u]] = (0, m)
                assert x[s][schedule.x_slot[s, u]] == (chunk * stages + s, m)
                y[s] = (chunk * stages + s + 1, m)
        if (m := schedule.head[tick]) >= 0:
            assert y[-1] == (stages * schedule.chunks, m)
            g[-1][schedule.g_slot[-1, schedule.units - microbatches + m]] = y[-1]
        for s in range(stages):
            if (u := schedule.b[tick, s]) >= 0:
                chunk, m = divmod(int(u), microbatches)
                assert g[s][schedule.g_slot[s, u]] == (chunk * stages + s + 1, m)
                assert x[s][schedule.x_slot[s, u]] == (chunk * stages + s, m)
                dx[s] = saved[s][schedule.s_slot[s, u]] = (chunk * stages + s, m)
                taken += [dx[s]] if not schedule.split else []
            if (u := schedule.w[tick, s]) >= 0:
                assert saved[s][schedule.s_slot[s, u]] == (s, u)
                taken.append((s, u))
        sent_y, sent_dx = y, dx
    if name != 'forward':
        assert sorted(taken) == list(np.ndindex(stages * schedule.chunks, microbatches))


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('dualpipe', 4, 8), 'unknown; use one of gpipe, 1f1b, interleaved, zero_bubble'),
        (('1f1b', 4, 0), 'microbatches=0'),
        (('1f1b', 4, 8, 2), 'use 1, or interleaved'),
        (('interleaved', 4, 8, 1), 'use 2, or 1f1b'),
        (('interleaved', 4, 6, 2), 'not a multiple of stages=4; use 8'),
        (('interleaved', 4, 2, 2), 'not a multiple of stages=4; use 4'),
        (('zero_bubble', 4, 8, 1, (1, 0, 1)), 'costs above 0'),
        (('zero_bubble', 4, 8, 1, (1, 1, 1), 'wall'), 'use one of lock_step, free_running'),
    ],
)
def test_bad_settings_say_what_to_do(args, message):
    with pytest.raises(ConfigError, match=message):
        make_schedule(*args)


def test_diagram():
    text = describe(make_schedule('1f1b', 2, 3))
    assert text.splitlines()[:7] == [
        '1f1b: 2 stages, 3 microbatches, 5 ticks',
        '',
        'tick       0 1 2 3 4',
        'stage 0  F 0 1 2 . .',
        '         B . . 0 1 2',
        'stage 1  F . 0 1 2 .',
        '         B . 0 1 2 .',
    ]
    assert 'bubble  25.0% of 12, in lock step' in text
    assert 'stage inputs 3, output gradients 1' in text
    assert ' 3b ' in describe(make_schedule('interleaved', 4, 4, 2))


def test_commands():
    def run(*command):
        return subprocess.run(
            [sys.executable, *command, '--stages=4'], capture_output=True, text=True, check=False
        )

    good = run('parallel.py', '--schedule=zero_bubble', '--microbatches=8')
    assert good.returncode == 0, good.stderr
    assert 'zero_bubble: 4 stages, 8 microbatches, 27 ticks' in good.stdout
    assert 'bubble  11.1% of 27' in good.stdout
    assert 'sets of what W needs 4' in good.stdout
    bad = run('-m', 'pipeline.schedules', '--schedule=2f2b')
    assert bad.returncode == 1
    assert bad.stderr.startswith("pipeline schedule '2f2b' is unknown; use one of gpipe")
