"""A run goes on as if it had never been interrupted, and refuses what it could not go on with."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from common import set_up
from common_checkpoint import assert_placed, assert_same, config_on, state_on
from common_runs import records
from training_worker import small_run

import train
import train_step
from checkpoint import Checkpointer
from config import FIXED, ConfigError, check_alike, differences, saved_config
from parallel import make_mesh
from runtime.evaluation import checkpoint_config
from runtime.resume import load_params, restore_state
from runtime.workdir import keep_records
from train_step import setup


def final_state(workdir: pathlib.Path, config):
    checkpoints = Checkpointer(f'{workdir}/checkpoints')
    shapes = train_step.abstract_state(set_up(config))
    return checkpoints.restore(checkpoints.latest_step(), shapes)


@pytest.fixture(scope='module')
def whole(tokens, tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted run of 20 steps."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    config = small_run(tokens, eval__every=5, checkpoint__every=10, checkpoint__keep=0)
    train.train(config, str(workdir))
    return workdir


def interrupted(whole: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """The whole run's workdir as a kill between steps 13 and 14 would leave it."""
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / 'checkpoints' / '20')
    lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
    after_13 = next(i for i, line in enumerate(lines) if json.loads(line)['step'] == 14)
    (workdir / 'metrics.jsonl').write_text(''.join([*lines[:after_13], lines[after_13][:20]]))
    return workdir


SLOW_MESHES = [{'dp': 2}, {'dp': 2, 'fsdp': 2, 'tp': 2}]


@pytest.mark.parametrize(
    'mesh',
    [{}, {'fsdp': 2, 'tp': 2}, *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW_MESHES)],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(mesh, whole, tokens, tmp_path, capsys):
    workdir = interrupted(whole, tmp_path / 'run')
    config = small_run(tokens, eval__every=5, checkpoint__every=10, checkpoint__keep=0)
    config.mesh.update(mesh)
    train.train(config, str(workdir))
    assert f'going on from step 10 of 20 in {workdir}/checkpoints' in capsys.readouterr().out
    found, expected = records(workdir), records(whole)
    if not mesh:
        assert found == expected
        config = small_run(tokens)
        assert_same(final_state(workdir, config), final_state(whole, config))
        return
    assert found[:12] == expected[:12]  # ten steps and two evaluations
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize(
    ('source', 'target'),
    [
        (({'pp': 2, 'ep': 2}, 1), ({'pp': 2, 'tp': 4}, 2)),
        (({'pp': 2, 'ep': 2}, 2), ({'fsdp': 2, 'tp': 2}, 1)),
        (({'pp': 2, 'ep': 2}, 2), ({'pp': 2, 'fsdp': 4}, 2)),
    ],
    ids=str,
)
def test_parameters_move_between_numbers_of_pipeline_chunks(source, target, tmp_path):
    config = config_on(*target)
    target = train_step.abstract_state(set_up(config))
    state = state_on(config_on(*source))
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = restore_state(checkpoints, 1, target)
    laid_out = jax.tree.map(lambda x, want: np.reshape(x, want.shape), state, target)
    assert_same(restored, laid_out)
    assert_placed(restored, target)


def test_a_step_is_logged_before_the_checkpoint_that_includes_it(tokens, tmp_path, monkeypatch):
    logged, original = [], Checkpointer.save

    def save(self: Checkpointer, step: int, *args) -> None:
        logged.append((step, records(tmp_path)[-1]['step']))
        original(self, step, *args)

    monkeypatch.setattr(Checkpointer, 'save', save)
    train.train(small_run(tokens, steps=4), str(tmp_path))
    assert logged == [(2, 2), (4, 4)]


def test_isolated_documents_are_resumed_and_evaluated_by_the_same_command(whole, tokens, tmp_path):
    """The token that ends a document comes from the data, and is written into no config."""
    config = small_run(tokens, steps=2, data__isolate_documents=True)
    before = config.to_json()
    train.train(config, str(tmp_path))
    config.steps = 4
    train.train(config, str(tmp_path))
    assert [r['step'] for r in records(tmp_path)] == [1, 2, 3, 4]
    step, saved = checkpoint_config(str(tmp_path), None, config)
    assert train.evaluate_only(saved, str(tmp_path), step)['eval_loss'] > 0
    config.steps = 2
    assert config.to_json() == before
    config.data.isolate_documents = False
    with pytest.raises(ConfigError, match='isolate_documents: True there, False here'):
        train.train(config, str(tmp_path))
    with pytest.raises(ConfigError, match='isolate_documents: True there, False here'):
        checkpoint_config(str(tmp_path), None, config)


def test_an_older_checkpoint_names_the_end_of_documents_itself():
    """Such a config is the same as one that leaves it to the data."""
    config = small_run('tokens', data__isolate_documents=True)
    old = config.to_dict() | {'model': dict(config.model) | {'document_end': 256}}
    del old['optimizer']['name']
    old['optimizer']['schedule'] = old['optimizer'].pop('lr_schedule')
    assert saved_config(old).optimizer.lr_schedule == 'cosine'
    assert differences(old, config.to_dict()) == []
    check_alike(old, config, FIXED, 'the workdir holds a run')
    config.data.isolate_documents = old['data']['isolate_documents'] = False
    with pytest.raises(ConfigError, match='document_end: 256 there, -1 here'):
        check_alike(old, config, FIXED, 'the workdir holds a run')


def test_a_complete_run_ends_at_once(whole, tokens, monkeypatch, capsys):
    monkeypatch.setattr(train, 'init_state', None)
    monkeypatch.setattr(train, 'open_data', None)
    before = records(whole)
    assert train.train(small_run(tokens), str(whole)) == {}
    assert 'is complete: step 20 of 20 is saved' in capsys.readouterr().out
    assert records(whole) == before


def test_more_steps_continue_a_complete_run(whole, tokens, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / 'run')
    config = small_run(tokens, steps=22, eval__every=0, optimizer__lr_schedule='wsd')
    train.train(config, str(tmp_path / 'run'))
    assert (
        " · optimizer.lr_schedule 'cosine' -> 'wsd' · steps 20 -> 22\n" in capsys.readouterr().out
    )
    found = records(tmp_path / 'run')
    assert found[: len(records(whole))] == records(whole)
    assert [r['step'] for r in found[-2:]] == [21, 22]
    entries = json.loads((tmp_path / 'run' / 'record.json').read_text())
    assert [(e['from_step'], e['config']['steps']) for e in entries] == [(0, 20), (20, 22)]


def test_another_model_or_order_of_the_data_is_refused(whole, tokens, tmp_path):
    config = small_run(
        tokens, model__d_ff=96, model__remat='full', seed=1, batch_size=8, optimizer__peak_lr=1.0
    )
    with pytest.raises(ValueError, match='the config cannot run') as caught:
        train.train(config, str(whole))
    text = str(caught.value)
    assert 'model.d_ff: 48 there, 96 here' in text
    assert 'seed: 0 there, 1 here' in text
    assert 'batch_size: 16 there, 8 here' in text
    assert text.count('\n  - ') == 3
    # So it is where the run ended before its first checkpoint.
    shutil.copytree(whole, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints')
    with pytest.raises(ValueError, match=r'model\.d_ff: 48 there, 96 here'):
        train.train(config, str(tmp_path / 'run'))


def test_without_a_checkpoint_the_run_starts_again(whole, tokens, tmp_path, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / 'checkpoints')
    (workdir / 'checkpoints' / '10' / 'arrays').mkdir(parents=True)
    train.train(small_run(tokens, steps=2), str(workdir))
    assert 'starting again' in capsys.readouterr().out
    assert [r['step'] for r in records(workdir)] == [1, 2]
    assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['2']


def test_init_from_takes_the_parameters_alone(whole, tokens, tmp_path):
    config = small_run(tokens, steps=1, seed=3)
    s = set_up(config)
    there = Checkpointer(f'{whole}/checkpoints')
    fresh = train_step.init_state(s)
    workdir = tmp_path / 'run'
    checkpoints = Checkpointer(f'{workdir}/checkpoints')
    for source, step in ((f'{whole}/', 20), (f'{whole}/checkpoints/10', 10)):
        state = train.start_state(s, checkpoints, 0, source)
        saved = there.restore(step, train_step.abstract_state(s))
        assert_same(state, fresh | {'params': saved['params']})
    # The same command goes on from its own checkpoint.
    train.train(config, str(workdir), str(whole))
    config.steps = 2
    train.train(config, str(workdir), str(whole))
    assert [r['step'] for r in records(workdir)] == [1, 2]
    assert records(workdir)[0]['loss'] < 5.3  # where log(264) is 5.6


def test_init_from_refuses_what_does_not_fit(whole, tokens, tmp_path):
    config = small_run(tokens, model__d_ff=96)
    shapes = train_step.abstract_state(setup(config, make_mesh({})))['params']
    with pytest.raises(
        ValueError, match=r'the config cannot run: the parameters of .*\n.*d_ff|\[2, 32, 48\]'
    ):
        load_params(str(whole), shapes)
    with pytest.raises(ValueError, match='holds no checkpoint'):
        load_params(str(tmp_path), shapes)


def test_records_beyond_the_step_and_torn_lines_go(tmp_path):
    file = tmp_path / 'metrics.jsonl'
    keep_records(str(file), 3)
    assert not file.exists()
    lines = [json.dumps({'step': i, 'loss': 0.5}) + '\n' for i in (1, 2, 3, 3, 4)]
    file.write_text(''.join(lines) + '{"step": 5, "lo')
    keep_records(str(file), 3)
    assert file.read_text() == ''.join(lines[:4])


def test_differences():
    old = {'a': 1, 'b': {'c': (1, 2), 'd': 3, 'gone': 1}}
    new = {'a': 1, 'b': {'c': [1, 3], 'd': 4, 'new': 1}}
    assert differences(old, new) == [('b.c', [1, 2], [1, 3]), ('b.d', 3, 4)]
