"""A few faults of each cheap family of tests/attack.py, and its verdicts and counts."""

import attack
import pytest
from attack import Task, build, draw_tasks, table
from attack_faults import FAILURES, HARMLESS, REFUSED, WARNED, WRONG, Family


def attacked(family: Family, n: int) -> list[dict]:
    return [attack.attack(family, Task(family.name, i), seed=0) for i in range(n)]


def failures(outcomes: list[dict]) -> list[dict]:
    return [outcome for outcome in outcomes if outcome['verdict'] in FAILURES]


@pytest.mark.parametrize(('name', 'n'), [('tokens', 12), ('config', 20), ('corpus', 10)])
def test_a_few_faults_do_no_harm(name, n, tmp_path):
    if name != 'tokens':  # in one module
        pytest.importorskip('pyarrow')
        pytest.importorskip('zstandard')
    outcomes = attacked(build(name, tmp_path), n)
    assert not failures(outcomes)
    assert REFUSED in {outcome['verdict'] for outcome in outcomes}


def test_wrong_values_of_a_checkpoint_are_noticed(tmp_path):
    family = build('checkpoint', tmp_path)
    outcomes = attacked(family, 8)
    assert not failures(outcomes)
    assert {outcome['verdict'] for outcome in outcomes} >= {HARMLESS, REFUSED}
    newest = max(family.bits)
    family.bits[newest][0] = 'other bits'
    again = attacked(family, 8)  # the same faults
    assert [o['description'] for o in again] == [o['description'] for o in outcomes]
    expected = {HARMLESS: WRONG, REFUSED: REFUSED, WARNED: WARNED}
    assert [o['verdict'] for o in again] == [expected[o['verdict']] for o in outcomes]


def test_faults_are_spread_and_counted():
    tasks = draw_tasks(150, list(attack.FAMILIES))
    assert len(set(tasks)) == len(tasks) == 150
    assert {task.family for task in tasks[:60]} == set(attack.FAMILIES)
    verdicts = [HARMLESS, REFUSED, WARNED, WRONG, REFUSED]
    counted = table([{'family': 'tokens', 'verdict': verdict} for verdict in verdicts])
    assert counted.splitlines()[-1].split() == ['all', '5', '1', '2', '1', '1', '0', '0']
