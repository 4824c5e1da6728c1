"""The estimates of memory within 15 % of the compilers' figures: benchmarks/estimates.py."""

import dataclasses
import pathlib
import re

import pytest
from common_commands import benchmark

from config import ConfigError
from machine.chips import CHIPS
from planning import ranking
from planning.compiled import Compiled, compile_step
from planning.roofline import estimate

ROOT = pathlib.Path(__file__).resolve().parent.parent
estimates = benchmark('estimates')
CASES = estimates.CASES


def held(platform: str) -> list[str]:
    """The cases that tests compile."""
    return [x for x, c in CASES.items() if CHIPS[c.chip].platform == platform and not c.long]


def assert_within_15_percent(name: str) -> None:
    case = CASES[name]
    config, chip = case.make(), CHIPS[case.chip]
    e, peak = estimate(config, chip), compile_step(config, case.topology, chip).peak
    assert e.memory.peak == pytest.approx(peak, rel=0.15)
    assert e.fits
    assert peak < chip.memory


@pytest.mark.tpu
@pytest.mark.parametrize('name', held('tpu'))
def test_memory_is_what_the_tpu_compiler_says(name, tpu_devices):
    assert_within_15_percent(name)


@pytest.mark.gpu
@pytest.mark.parametrize('name', held('gpu'))
def test_memory_is_what_the_gpu_compiler_says(name, gpu_compiler):
    assert_within_15_percent(name)


def test_cases_run_and_fit():
    for name, case in CASES.items():
        e = estimate(case.make(), CHIPS[case.chip])
        assert e.fits, name
    of = [case.make() for case in CASES.values() if not case.long]
    assert len(of) >= 12
    assert any(c.mesh.cp > 1 and c.cp_style == style for c in of for style in ('ring', 'gather'))
    assert any(c.optimizer.name == 'muon' for c in of)
    assert any(c.model.remat_offload for c in of)


def test_a_row_has_the_estimate_beside_the_compilers_figure(monkeypatch):
    case = CASES['gpu']
    e = estimate(case.make(), CHIPS['h100'])
    answer = dict.fromkeys((f.name for f in dataclasses.fields(Compiled)), '')
    answer = Compiled(**answer | {'peak': e.memory.peak / 1.25, 'cost': None})
    monkeypatch.setattr(ranking, 'compile_step', lambda *_: answer)
    row = estimates.compare('gpu')
    assert row['off_%'] == pytest.approx(25)
    assert row['estimate_GB'] == pytest.approx(1.25 * row['compiled_GB'])
    assert (row['topology'], row['note']) == ('h100:8', '')

    def refuse(*_):
        raise NotImplementedError('no such kernel')

    monkeypatch.setattr(ranking, 'compile_step', refuse)
    row = estimates.compare('gpu')
    assert (row['compiled_GB'], row['note']) == (0, 'does not compile: no such kernel')


def test_cases_are_chosen_by_their_beginnings_and_compilers(monkeypatch):
    monkeypatch.setattr(estimates, 'compiler_of', lambda chip: 'x' * (chip in ('v4', 'h100')))
    assert estimates.chosen('gpu exp, tpu b') == [
        'tpu best', 'gpu experts', 'gpu experts, clipped', 'gpu experts apart'
    ]  # fmt: skip
    assert {CASES[x].chip for x in estimates.chosen('')} == {'v4', 'h100'}
    with pytest.raises(ConfigError, match='no case of --cases='):
        estimates.chosen('b200')


def test_xla_gpu_holds_more_beside_the_head():
    """By closed forms: each array that a dense model of one microbatch has there."""
    case = CASES['gpu muon']
    config = case.make()
    config.optimizer.name = 'adamw'
    m = estimate(config, CHIPS['h100']).memory
    D, F, V, L = 3072, 8192, 100_352, 28
    # w_o, w_down and the embedding are cut in their last dimension, D.
    assert m.copies == 4 * (L * (D * D + F * D) + V * D) / 8
    layer = 2 * D * D + 2 * D * 1024 + 3 * D * F  # 24 heads and 2 x 8 of 128
    norms = 2 * D
    tokens = 1024
    attention = tokens * (2 * D + 2 * (D + 2 * 1024) + (2 + 4 / 128) * D + 2 * D + 2 * D)
    zeros = 4 * L * (layer / 8 + norms)
    assert m.beside_head == pytest.approx(zeros + 2 * layer + attention, rel=0.01)
    # The only chunk: its logits and their gradient; the weight, laid out anew, and its gradient.
    assert m.logits == tokens * V * 6
    assert m.head == V * D * 6
    tpu = estimate(config, dataclasses.replace(CHIPS['v5p'], memory=1e12)).memory
    assert (tpu.copies, tpu.beside_head) == (0, 0)


def test_the_page_has_these_estimates():
    """The compilers' figures on it are within 15 %, and each estimate is today's."""
    page = (ROOT / 'docs/plan.md').read_text()
    rows = re.findall(r'^\| ([^|]+) \| (\S+) \| [^|]+ \| (\S+) \| (\S+) \| (\S+) % \|$', page, re.M)
    assert len({name for name, *_ in rows}) >= 12
    for name, topology, estimated, compiled, off in rows:
        case = CASES[name]
        assert topology == case.topology
        peak = estimate(case.make(), CHIPS[case.chip]).memory.peak / 1e9
        assert float(estimated) == pytest.approx(peak, abs=0.006)
        assert float(off) == pytest.approx(100 * (peak / float(compiled) - 1), abs=0.6)
        assert case.long or abs(float(off)) < 15
