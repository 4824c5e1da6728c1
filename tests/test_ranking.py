"""`plan.py --search --compile`: the best layouts compiled, and both orders side by side."""

import importlib
import json
import pathlib
from dataclasses import fields, replace

import jax
import pytest
from common_commands import run_command
from ml_collections import ConfigDict

import plan
from config import ConfigError
from machine.chips import CHIPS
from machine.memory import OutOfMemoryError
from planning import ranking
from planning.compiled import Compiled
from planning.prices import Cost, Traffic
from planning.ranking import Ranked, in_order, ranked
from planning.report import overrides, seconds
from planning.roofline import Estimate, Work, estimate
from planning.search import expected, same_mesh, same_remat, search

ROOT = pathlib.Path(plan.__file__).parent
TPU_V4 = f'--config={ROOT}/configs/tpu_v4.py'
SMALL = ('--config.batch_size=8', '--config.model.n_layers=12', '--devices=2')


def load(name: str) -> ConfigDict:
    return importlib.import_module(f'configs.{name}').get_config()


def answer(time: float, exposed: float = 0.0, peak: float = 1e9, unpriced: float = 0) -> Compiled:
    traffic = {('all-gather', 'fsdp'): Traffic(1, 1.0, 9.0, exposed)}
    cost = Cost(time, unpriced=unpriced, traffic=traffic)
    return compiled(peak, cost)


def compiled(peak: float, cost: Cost | None = None, why: str = '') -> Compiled:
    given = {'topology': 'v4:2x2x1', 'seconds': 1.0, 'arguments': 1.0, 'temporary': 1.0}
    rest = {f.name: '' for f in fields(Compiled)}
    return Compiled(**rest | given | {'peak': peak, 'cost': cost, 'why': why})


class Compilers:
    """Stands in for `compile_step`: answers its calls one after the other."""

    def __init__(self, *answers: Compiled | Exception) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, config: ConfigDict, topology: str, _: object) -> Compiled:
        self.asked.append((config, topology))
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def rank(monkeypatch, *answers: Compiled | Exception, chip: str = 'v4') -> list[Ranked]:
    """Ranks as many layouts, of which the estimate of each is the same, by these answers."""
    monkeypatch.setattr(ranking, 'compile_step', Compilers(*answers))
    config, chips = load('tpu_v4_best'), CHIPS | {'unclocked': replace(CHIPS['v4'], clock=0.0)}
    e = estimate(config, chips[chip])
    return ranked([(config, e)] * len(answers), 'v4:2x2x1')


def test_work_and_the_network_that_is_waited_for_rank(monkeypatch):
    rows = rank(monkeypatch, answer(1.0, 2.0), answer(2.5, 0.25), answer(1.5, 1.0))
    assert [(row.place, row.seconds) for row in rows] == [(3, 2.5), (2, 2.75), (1, 3.0)]


def test_what_fits_comes_before_what_does_not_or_does_not_compile(monkeypatch):
    memory = CHIPS['v4'].memory
    rows = rank(
        monkeypatch,
        NotImplementedError('no such operation'),
        OutOfMemoryError('out of memory: 40 of 32 GB\nSettings that take less: ...'),
        answer(0.5, peak=memory + 1),
        answer(3.0, peak=memory),
        jax.errors.JaxRuntimeError('INTERNAL: a bug\nof many lines'),
    )
    assert [row.place for row in rows] == [4, 3, 1, 2, 5]
    assert [row.fits for row in rows] == [True, False, False, False, False]
    assert [row.why for row in rows[2:]] == [
        'does not compile: no such operation', 'out of memory: 40 of 32 GB',
        'does not compile: INTERNAL: a bug',
    ]  # fmt: skip
    shown = ranking.text(rows, 'v4:2x2x1').splitlines()
    assert shown[4].split()[:6] == [
        '1',
        '4',
        *f'3.00 s {seconds(expected(rows[0].estimate))}'.split(),
    ]
    assert 'does not fit in 34.4 GB' in shown[6]
    assert 'out of memory: 40 of 32 GB' in shown[10]


def test_a_bug_is_not_taken_for_a_refusal(monkeypatch):
    with pytest.raises(KeyError):
        rank(monkeypatch, KeyError('%x'))


@pytest.mark.parametrize(
    ('given', 'chip', 'why'),
    [
        (compiled(1e9, None, 'INTERNAL'), 'v4', 'cannot be read'),
        (answer(1.0, unpriced=3), 'v4', '3 calls of kernels have no estimate'),
        (answer(1.0), 'unclocked', 'the clock of a TPU v4'),
    ],
)
def test_a_program_without_seconds_says_why(monkeypatch, given, chip, why):
    (row,) = rank(monkeypatch, given, chip=chip)
    assert row.fits
    assert row.seconds is None
    assert why in row.why
    assert f'{row.why}; placed by the estimate' in ranking.text([row], 'v4:2x2x1')


def test_kernels_without_matmuls_do_not_keep_a_gpu_from_its_seconds(monkeypatch):
    (row,) = rank(monkeypatch, answer(1.0, unpriced=3), chip='h100')
    assert row.seconds == 1.0


def test_a_layout_without_seconds_is_placed_by_its_estimate_at_the_others_scale():
    """Compiled steps take twice what is expected: one expected at 1.1 comes before 1.2 -> 2.4."""
    config = load('tpu_v4_best')
    e = estimate(config, CHIPS['v4'])
    times = [1.0, 1.1, 1.2]
    answers = [answer(2.0), compiled(1.0, None, 'x'), answer(2.4)]
    rows = [
        Ranked(config, scaled_to(e, t), i, a, 'unread' * (a.cost is None))
        for i, (t, a) in enumerate(zip(times, answers, strict=True), 1)
    ]
    assert [row.place for row in in_order(rows)] == [1, 2, 3]
    # Where the others change places, at the median of 3 and 1.5 it takes 2.475.
    rows[0] = Ranked(config, scaled_to(e, 1.0), 1, answer(3.0))
    rows[2] = Ranked(config, scaled_to(e, 1.2), 3, answer(1.8))
    assert [row.place for row in in_order(rows)] == [3, 2, 1]
    rows[2] = Ranked(config, scaled_to(e, 1.2), 3, answer(2.5))  # 2.5 and 3: their median is 2.54
    assert [row.place for row in in_order(rows)] == [3, 2, 1]


def scaled_to(e: Estimate, time: float) -> Estimate:
    """Returns an estimate of which a step is expected to take so many seconds."""
    work = [Work('a part', 0.0, 1e12)]
    each = expected(replace(e, work=work, transfers=[]))
    work = [Work('a part', 0.0, 1e12 * time / each)]
    return replace(e, work=work, transfers=[])


@pytest.fixture
def run_plan(capsys, monkeypatch):
    """The command with a fake of the compiler: its answers, its flags -> what it prints."""

    def run(answers: list[Compiled | Exception], *argv: str) -> tuple[str, Compilers]:
        compilers = Compilers(*answers)
        monkeypatch.setattr(ranking, 'compile_step', compilers)
        monkeypatch.setattr(plan, 'check_devices', lambda *_: None)
        run_command(plan, TPU_V4, *SMALL, *argv)
        return capsys.readouterr().out, compilers

    return run


def test_command_prints_both_orders(run_plan):
    answers = [answer(3.0), OutOfMemoryError('out of memory: much'), answer(1.0)]
    out, compilers = run_plan(answers, '--search', '--compile=v4:2x2x1', '--best=3', '--json')
    result = json.loads(out.splitlines()[-1])
    rows = result['ranked']
    assert [row['place'] for row in rows] == [1, 2, 3]
    assert [row['estimated_place'] for row in rows] == [3, 1, 2]
    assert [row['step_seconds'] for row in rows] == [1.0, 3.0, None]
    assert [row['fits'] for row in rows] == [True, True, False]
    assert rows[0]['compiled']['peak'] == rows[0]['peak'] == 1e9
    assert rows[2]['compiled'] is None
    assert rows[2]['why'] == 'out of memory: much'
    # What was compiled is what the search found, in its order, and the flags are its flags.
    assert [topology for _, topology in compilers.asked] == ['v4:2x2x1'] * 3
    by_estimate = sorted(rows, key=lambda row: row['estimated_place'])
    times = [row['expected_seconds'] for row in by_estimate]
    assert times == sorted(times) == [x['expected_seconds'] for x in result['best']]
    base = load('tpu_v4')
    base.update(batch_size=8)
    base.model.n_layers = 12
    for row, (config, _) in zip(by_estimate, compilers.asked, strict=True):
        assert row['flags'] == overrides(config, base)
        assert row['flags'] in out
    assert "compiled for v4:2x2x1, in the order of the compiler's figures" in out


def test_command_compiles_nothing_where_no_layout_fits(run_plan):
    out, compilers = run_plan(
        [], '--search', '--compile=v4:2x2x1', '--json', '--config.model.d_ff=4000000'
    )
    assert 'none fits' in out
    assert json.loads(out.splitlines()[-1])['best'] == []
    assert not compilers.asked


def test_a_topology_with_too_few_devices_is_refused_before_the_search(monkeypatch, capsys):
    def refuse(topology: str, needed: int) -> None:
        raise ConfigError(f'{needed} devices are more than {topology} has')

    monkeypatch.setattr(plan, 'check_devices', refuse)
    with pytest.raises(SystemExit, match='2 devices are more than v4:2x2x1 has'):
        run_command(plan, TPU_V4, *SMALL, '--search', '--compile=v4:2x2x1')
    assert capsys.readouterr().out == ''


def test_layouts_of_one_mesh_differ_in_rematerialization():
    """The fastest of each mesh and rematerialization, in the order of all of them; the fastest of
    each mesh are among them."""
    config = load('tpu_v4')
    config.batch_size = 8
    config.model.n_layers = 12
    (of_meshes, n), (found, m) = (
        search(config, 4, CHIPS['v4'], same=same) for same in (same_mesh, same_remat)
    )
    assert n == m
    keys = [(tuple(c.mesh.values()), c.model.remat, tuple(c.model.remat_keep)) for c, _ in found]
    assert len(set(keys)) == len(keys) > len(of_meshes)
    full = [mesh for mesh, remat, _ in keys if remat == 'full']
    assert len(set(full)) < len(full)  # some keep more by name
    times = [expected(e) for _, e in found]
    assert times == sorted(times)
    first = {}
    for c, e in found:
        first.setdefault(tuple(c.mesh.values()), (c, expected(e)))
    assert list(first.values()) == [(c, expected(e)) for c, e in of_meshes]


def real(config: str, topology: str, devices: int, capsys) -> list[dict]:
    """The rows of a small config by a real compiler."""
    flags = (
        f'--devices={devices}',
        '--best=2',
        '--json',
        '--config.compute_dtype=bfloat16',
        '--config.check_vma=False',
    )
    run_command(
        plan, f'--config={ROOT}/configs/{config}.py', '--search', f'--compile={topology}', *flags,
        f'--chip={topology.partition(":")[0]}',
    )  # fmt: skip
    return json.loads(capsys.readouterr().out.splitlines()[-1])['ranked']


@pytest.mark.tpu
def test_the_tpu_compiler_ranks(tpu_devices, capsys):
    assert_ranked(real('tiny_dense', 'v5e:2x2', 4, capsys))


@pytest.mark.gpu
def test_the_gpu_compiler_ranks(gpu_compiler, capsys):
    assert_ranked(real('tiny_dense', 'h100:2', 2, capsys))


def assert_ranked(rows: list[dict]) -> None:
    assert {row['estimated_place'] for row in rows} == {1, 2}
    assert all(row['fits'] and not row['why'] for row in rows)
    times = [row['step_seconds'] for row in rows]
    assert 0 < times[0] <= times[1]
    assert all(row['peak'] > row['compiled']['arguments'] > 0 for row in rows)
