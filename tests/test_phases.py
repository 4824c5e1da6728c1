"""Schedules of batch_size and seq_len: each token once, exact on meshes and when resumed."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from common_checkpoint import assert_same
from common_runs import final_state, records, share_programs
from common_workers import Worker, arrays, assert_bit_equal
from ml_collections import ConfigDict
from training_worker import small_run

import train
from config import (
    ConfigError,
    Phase,
    in_phase,
    largest_phase,
    phase_at,
    phases,
    saved_config,
    without_schedule,
)
from configs import default
from corpus.batches import Loader, Mixture
from evaluate import evaluated_config
from machine.config_flag import override
from parallel import make_mesh
from planning.part import part_of
from runtime import scoring
from runtime.config_checks import validate
from runtime.metrics import Progress
from runtime.plot import Run
from runtime.scoring import row_lengths as rows
from train_step import setup


def scheduled(T: int, B: int, **schedule) -> ConfigDict:
    config = default.get_config()
    config.seq_len, config.batch_size, config.data.path = T, B, 'tokens'
    config.schedule.update(schedule)
    return config


# ---------------------------------------------------------------------------------------------
# Phases and batches
# ---------------------------------------------------------------------------------------------


def test_phases_follow_from_both_schedules():
    config = scheduled(16, 6, seq_len=('0:4', '10:16'), batch_size=('0:3', '7:6', '20:6'))
    first, second, third = phases(config)
    assert first == (0, 3, 4, 0, 0)
    assert second == (7, 6, 4, 6, 84)  # 21 rows of 4 are 5 windows of 16 and a part
    assert third == (10, 6, 16, 11, 156)  # 18 rows are 4.5
    assert [phase_at(phases(config), i).start for i in (0, 6, 7, 9, 10, 10**9)] == [
        0, 0, 7, 7, 10, 10,
    ]  # fmt: skip
    assert largest_phase(config) == third
    assert phases(scheduled(16, 6)) == ((0, 6, 16, 0, 0),)
    constant = scheduled(16, 6)
    assert in_phase(constant, phases(constant)[0]) is constant
    own = in_phase(config, second)
    assert (own.batch_size, own.seq_len, own.schedule.seq_len) == (6, 4, ())
    assert part_of(config, 'cpu').T == 16


def test_flags_and_saved_configs_hold_schedules():
    config = scheduled(16, 6)
    override(config, [('schedule.seq_len', '0:4,10:16'), ('schedule.batch_size', '0:6')])
    assert config.schedule.seq_len == ('0:4', '10:16')
    assert phases(saved_config(json.loads(config.to_json()))) == phases(config)
    old = json.loads(config.to_json())
    del old['schedule'], old['data']['packing'], old['data']['max_documents']
    assert saved_config(old).schedule.seq_len == ()


class Stream:
    """A split whose tokens are their own positions."""

    fingerprint, tokenizer = 'f', 'positions'

    def __init__(self, n_tokens: int, first: int = 0):
        self.n_tokens, self.first = n_tokens, first

    def read_windows(self, starts, length: int) -> np.ndarray:
        return self.first + np.asarray(starts)[:, None] + np.arange(length)


def test_each_token_once_an_epoch_through_all_phases():
    """A short row is a part of a window, the next one the next part; a border rounds up."""
    config = scheduled(16, 4, seq_len=('0:4', '10:8', '22:16'), batch_size=('0:2', '13:4'))
    loader = Loader(Stream(1601), 4, 16, 0, phases=phases(config))
    plain = Loader(Stream(1601), 4, 16, 0)
    assert [phase[:3] for phase in loader.phases] == [
        (0, 2, 4),
        (10, 2, 8),
        (13, 4, 8),
        (22, 4, 16),
    ]
    rows = [loader.batch_at(step) for step in range(40)]
    order = plain.windows(np.arange(100))[:, :-1]  # the windows of an epoch, in their order
    taken: list[int] = []
    for i, phase in enumerate(loader.phases):
        stop = [*(p.start for p in loader.phases[1:]), 40][i]
        tokens = np.concatenate([row[:, :-1].ravel() for row in rows[phase.start : stop]])
        want = order[phase.windows :].ravel()[: len(tokens)]
        np.testing.assert_array_equal(tokens, want)
        assert loader.tokens_before(phase.start) == len(taken)
        taken += tokens.tolist()
    assert [p.windows for p in loader.phases] == [0, 5, 8, 26]
    assert len(taken) == len(set(taken)) == loader.tokens_before(40)
    for row in rows:
        np.testing.assert_array_equal(np.diff(row, axis=1), 1)  # with the last target
    for step in (39, 3, 12):
        np.testing.assert_array_equal(loader.batch_at(step, slice(1, 2)), rows[step][1:2])


def test_without_a_schedule_nothing_changes():
    config = scheduled(16, 4, seq_len=('0:16',), batch_size=('0:4', '5:4'))
    loader = Loader(Stream(1000), 4, 16, 3, phases=phases(config))
    plain = Loader(Stream(1000), 4, 16, 3)
    for step in (0, 4, 5, 100):
        np.testing.assert_array_equal(loader.batch_at(step), plain.batch_at(step))


def test_sources_of_a_mixture_have_their_phases_together():
    config = scheduled(16, 6, seq_len=('0:4', '6:16'), batch_size=('0:3', '6:6'))
    splits = [Stream(3201), Stream(1601, 10_000)]
    mixture = Mixture(splits, [3, 1], 6, 16, 0, phases=phases(config))
    plain = Mixture(splits, [3, 1], 6, 16, 0)
    rows = [mixture.batch_at(step) for step in range(12)]
    want = plain.windows(np.arange(100))
    short = np.concatenate([row[:, :-1].ravel() for row in rows[:6]])
    np.testing.assert_array_equal(short, want[:, :-1].ravel()[:72])
    np.testing.assert_array_equal(np.concatenate(rows[6:]), want[5:41])
    assert mixture.tokens_before(7) == 72 + 96


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        ({'seq_len': ('0:128', '9:128')}, r'goes up to 128, and seq_len=256.*use seq_len=128'),
        ({'seq_len': ('0:96', '9:256')}, r'holds 96, which does not divide seq_len=256'),
        ({'seq_len': ('0:0', '9:256')}, r'schedule\.seq_len=.* holds a 0; use 1 or more'),
        ({'batch_size': ('0:64',)}, r'goes up to 64, and batch_size=32.*use batch_size=64'),
        ({'batch_size': ((0, 8), (5, 32))}, r"holds \(0, 8\); use texts, as in \('0:8',\)"),
        ({'batch_size': ('1:32',)}, r'STEP:VALUE whose steps rise from 0; write as in --config\.'),
        ({'batch_size': ('0:8', '5:32', '5:16')}, r'steps rise from 0'),
        ({'batch_size': ('0:8', '-5:32')}, r'steps rise from 0'),
        ({'batch_size': ('0', '5:32')}, r'steps rise from 0'),
        (
            {'batch_size': ('0:6', '5:32')},
            r'from the first step on: batch_size=6 is not divisible by mesh.dp .*=4; use a multip',
        ),
        (
            {'seq_len': ('0:256', '7:2'), 'batch_size': ('0:32',)},
            r'from step 8 on: seq_len=2 is not divisible by mesh.tp=4; use a tp of 1 or 2',
        ),
    ],
)
def test_schedules_that_cannot_be_kept(fields, said):
    config = scheduled(256, 32, **fields)
    config.mesh.dp = config.mesh.tp = 4
    with pytest.raises(ConfigError, match=said):
        validate(config, 16)


def test_evaluation_has_no_phases():
    """Tasks take rows of any length and another mesh, which the smallest batch need not fit."""
    config = scheduled(256, 32, seq_len=('0:128', '9:256'), batch_size=('0:2', '5:32'))
    own = evaluated_config(config, 'dp=8', 64)
    assert (own.batch_size, own.mesh.dp) == (64, 8)
    assert phases(own) == (Phase(0, 64, 256),)
    plain = default.get_config()
    assert without_schedule(plain) is plain


def test_scores_of_a_run_with_a_schedule_have_rows_of_all_lengths(monkeypatch):
    found = []
    monkeypatch.setattr(scoring, 'row_lengths', lambda config, n: found.append(rows(config, n)))
    scoring.make_scorer(setup(scheduled(256, 32, seq_len=('0:64', '9:256')), make_mesh({})))
    assert found == [[16, 32, 64, 128, 256]]


def test_speed_and_flops_are_those_of_each_phase():
    config = scheduled(32, 8, seq_len=('0:16', '4:32'), batch_size=('0:4', '6:8'))
    config.peak_flops = 1e12
    s = setup(config, make_mesh({}))
    said = type('Said', (), {'say': lambda self, text: None})()
    loader = Loader(Stream(10_000), 8, 32, 0, phases=phases(config))
    progress = Progress(s, said, loader.tokens_before)
    progress.start(2)
    short, long = progress._flops[0], progress._flops[1]
    assert short < long
    assert progress.flops(3) == 64 * short
    assert progress.flops(7) == 128 * short + 256 * long + 256 * long
    progress.start(6)
    assert progress.flops(8) == 2 * 256 * long


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


# 8 steps: 2 of 8 x 16 tokens, 2 of 8 x 32, then of 16 x 32.
SIZES = {
    'steps': 8, 'checkpoint.every': 1, 'checkpoint.keep': 0,
    'schedule.seq_len': ('0:16', '2:32'), 'schedule.batch_size': ('0:8', '4:16'),
}  # fmt: skip


def phased_run(tokens) -> ConfigDict:
    config = small_run(tokens)
    config.update_from_flattened_dict(SIZES)
    return config


@pytest.fixture(scope='module')
def whole(tokens, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('phases') / 'run'
    train.train(phased_run(tokens), str(workdir))
    return workdir


def test_a_phase_is_compiled_at_its_border(tokens, whole, tmp_path, monkeypatch, capsys):
    compiled = []
    lower = train.lower_train_step

    def lowered(s):
        compiled.append((s.config.batch_size, s.config.seq_len))
        return lower(s)

    monkeypatch.setattr(train, 'lower_train_step', lowered)
    found = train.train(phased_run(tokens), str(tmp_path / 'run'))
    assert compiled == [(8, 16), (8, 32), (16, 32)]
    tokens_of_steps = np.cumsum([128, 128, 256, 256, 512, 512, 512, 512]).tolist()
    assert [record['tokens'] for record in records(tmp_path / 'run')] == tokens_of_steps
    assert found['tokens'] == tokens_of_steps[-1]
    assert records(tmp_path / 'run') == records(whole)
    said = capsys.readouterr().out
    assert 'from step 3 on: batch_size 8 · seq_len 32' in said
    assert 'from step 5 on: batch_size 16 · seq_len 32' in said
    run = Run(str(tmp_path / 'run'))
    np.testing.assert_array_equal(run.tokens(np.arange(1, 9)), tokens_of_steps)


@pytest.mark.parametrize('step', [1, 2, 3, 4])
def test_a_run_goes_on_within_a_phase_and_at_a_border(step, whole, tokens, tmp_path, monkeypatch):
    share_programs(monkeypatch)
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    for later in range(step + 1, 9):
        shutil.rmtree(workdir / 'checkpoints' / str(later))
    config = phased_run(tokens)
    train.train(config, str(workdir))
    assert records(workdir) == records(whole)
    assert_same(final_state(workdir, config), final_state(whole, config))


def test_a_run_cannot_go_on_with_another_schedule(whole, tokens, tmp_path):
    config = phased_run(tokens)
    config.schedule.seq_len = ('0:16', '3:32')
    with pytest.raises(ConfigError, match=r"schedule\.seq_len: \['0:16', '2:32'\] there"):
        train.train(config, str(whole))


@pytest.mark.parametrize(
    'mesh',
    [
        {'dp': 2, 'cp': 2, 'tp': 2},
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in [{'fsdp': 2, 'tp': 2, 'pp': 2}, {'dp': 8}]
        ),
    ],
    ids=str,
)
def test_meshes_agree_in_all_phases(mesh, whole, tokens, tmp_path):
    assert jax.device_count() == 8
    config = phased_run(tokens)
    config.model.attention_block = 4
    config.mesh.update(mesh)
    train.train(config, str(tmp_path / 'run'))
    for a, b in zip(records(tmp_path / 'run'), records(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_processes_that_are_stopped_at_borders_end_as_one_that_is_not(tokens, tmp_path):
    config = {name.replace('.', '__'): x for name, x in SIZES.items()}
    setup = {'tokens': str(tokens), 'cache': str(tmp_path / 'cache'), 'config': config}
    Worker(tmp_path / 'whole', setup, folder=tmp_path).succeed()
    for step in (2, 3, 4):  # the last of a phase, the first of the next, and its last
        said = Worker(tmp_path / 'run', setup, folder=tmp_path, stop_at=[0, step]).succeed()
        assert f'step {step} is saved' in said
    Worker(tmp_path / 'run', setup, folder=tmp_path).succeed()
    assert records(tmp_path / 'run') == records(tmp_path / 'whole')
    last = [arrays(tmp_path / name / 'checkpoints' / '8') for name in ('run', 'whole')]
    assert_bit_equal(*last)
