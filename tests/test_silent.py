"""The table of silent faults: its edits and its tests are there, and some are seen to fall."""

import ast
import pathlib

import pytest
from silent import ROOT, check, row
from silent_faults import FAULTS, Fault

CHEAP = ('ServiceNow/Fast-LLM', 'hiyouga/LlamaFactory')  # that compile nothing to speak of
UNITS = ('test_optimizer', 'test_parallel', 'test_moe', 'test_attention', 'test_model')


def unit(fault: Fault) -> bool:
    """Returns whether the fault's test is one of a part of the step, which takes seconds."""
    return any(f'/{name}.py' in fault.test for name in UNITS)


def test_edits_and_tests_are_there():
    assert len(FAULTS) >= 30
    assert len({(f.project, f.number, f.fault) for f in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        code = pathlib.Path(ROOT, fault.file).read_text()
        assert code.count(fault.old) == 1, (fault.link, fault.old)
        changed = code.replace(fault.old, fault.new)
        assert changed != code
        ast.parse(changed)
        path, _, name = fault.test.partition('::')
        assert f'def {name.partition("[")[0]}(' in pathlib.Path(ROOT, path).read_text(), fault.test


def test_the_page_has_every_row():
    page = pathlib.Path(ROOT, 'docs/silent_bugs.md').read_text().splitlines()
    assert [line for line in page if line.startswith('| [')] == [row(f) for f in FAULTS]


def test_cheap_faults_are_seen():
    assert check([f for f in FAULTS if f.project in CHEAP]) == 0


def test_a_fault_that_no_test_sees_is_told(capsys):
    harmless = FAULTS[0]._replace(
        file='optimizer.py',
        old='SMALLEST_NORM = 1e-7',
        new='SMALLEST_NORM = 1.1e-7',
        test='tests/test_optimizer.py::test_cosine_schedule',
    )
    assert check([harmless]) == 1
    assert 'STANDS' in capsys.readouterr().out


@pytest.mark.slow
def test_faults_of_parts_are_seen():
    assert check([f for f in FAULTS if unit(f)]) == 0
