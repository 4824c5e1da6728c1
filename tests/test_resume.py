"""A run goes on as if it had never been interrupted, and refuses what it could not go on with."""

import json
import pathlib
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
from common import set_up
from common_checkpoint import assert_placed, assert_same, config_on, state_on
from common_runs import final_state, records
from training_worker import small_run

import train
import train_step
from checkpoint import Checkpointer
from config import FIXED, ConfigError, check_alike, differences, saved_config
from configs import default
from decoding import generate
from generate import load
from parallel import make_mesh
from runtime import next_commands
from runtime.data_record import data_record
from runtime.evaluation import checkpoint_config
from runtime.lease import Lease
from runtime.resume import compared_data, load_params, restore_state
from runtime.workdir import read_json
from train_step import setup


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
    [
        {},
        {'fsdp': 2, 'tp': 2},
        {'fsdp': 2, 'cp': 2},
        *(pytest.param(m, marks=pytest.mark.slow) for m in SLOW_MESHES),
    ],
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
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_states_move_between_numbers_of_pipeline_chunks(optimizer, source, target, tmp_path):
    there, config = config_on(*source), config_on(*target)
    for c in (there, config):
        c.optimizer.update(name=optimizer, ema=0.9)
    target = train_step.abstract_state(set_up(config))
    state = state_on(there)
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = restore_state(checkpoints, 1, target)
    laid_out = jax.tree.map(lambda x, want: np.reshape(x, want.shape), state, target)
    assert_same(restored, laid_out)
    assert_placed(restored, target)


def test_a_step_is_logged_before_the_checkpoint_that_includes_it(tokens, tmp_path, monkeypatch):
    logged, original = [], Checkpointer.save

    def save(self: Checkpointer, step: int, *args, **named) -> None:
        logged.append((step, records(tmp_path)[-1]['step']))
        original(self, step, *args, **named)

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


def test_fields_of_an_inner_group_that_came_later_have_their_defaults():
    old = default.get_config().to_dict()
    del old['optimizer']['muon']['scale'], old['optimizer']['ema'], old['eval']['averaged']
    old['optimizer']['muon']['steps'] = 7
    found = saved_config(old)
    assert (found.optimizer.muon.scale, found.optimizer.muon.steps) == ('rms', 7)
    assert (found.optimizer.ema, found.eval.averaged) == (0.0, False)
    del old['optimizer']['muon']
    assert saved_config(old).optimizer.muon.steps == 5


@pytest.fixture(scope='module')
def muon_run(tokens, tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted run of 4 steps by Muon, with averaged weights."""
    workdir = tmp_path_factory.mktemp('muon') / 'run'
    train.train(muon_config(tokens), str(workdir))
    return workdir


def muon_config(tokens, **changes):
    options = {'optimizer__name': 'muon', 'optimizer__ema': 0.9, 'eval__averaged': True}
    options |= {'eval__every': 2, 'checkpoint__keep': 0, 'steps': 4}
    return small_run(tokens, moe=True, **(options | changes))


@pytest.mark.parametrize(
    'mesh', [{}, pytest.param({'pp': 2, 'fsdp': 2, 'tp': 2}, marks=pytest.mark.slow)], ids=str
)
def test_a_run_by_muon_is_resumed(mesh, muon_run, tokens, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(muon_run, workdir)
    shutil.rmtree(workdir / 'checkpoints' / '4')
    config = muon_config(tokens)
    config.mesh.update(mesh)
    train.train(config, str(workdir))
    for a, b in zip(records(workdir), records(muon_run), strict=True):
        assert a == (pytest.approx(b, rel=1e-4) if mesh else b)
    if not mesh:
        assert_same(final_state(workdir, config), final_state(muon_run, config))


def test_averaged_weights_are_evaluated_and_started_from(muon_run, tokens, tmp_path):
    config = muon_config(tokens)
    state = final_state(muon_run, config)
    logged = [r['eval_loss'] for r in records(muon_run) if 'eval_loss' in r][-1]
    found = train.evaluate_only(config, str(muon_run), 4)['eval_loss']
    assert found == pytest.approx(logged, rel=1e-5)
    config.eval.averaged = False
    of_last = train.evaluate_only(config, str(muon_run), 4)['eval_loss']
    assert of_last != found
    assert train.evaluate_only(config, str(muon_run), 4, averaged=True)['eval_loss'] == found
    config.eval.averaged = True
    assert train.evaluate_only(config, str(muon_run), 4, averaged=False)['eval_loss'] == of_last
    lines = [json.loads(line) for line in (muon_run / 'eval.jsonl').read_text().splitlines()]
    assert [line.get('averaged', False) for line in lines] == [True, False, True, False]
    s = set_up(config)
    with Checkpointer(str(tmp_path)) as checkpoints:
        started = train.start_state(s, checkpoints, 0, str(muon_run), True)
    assert_same(started['params'], state['moments']['ema'])


def test_another_optimizer_is_refused_with_the_way_to_go_on(whole, muon_run, tokens, tmp_path):
    for workdir, changes, message in (
        (
            muon_run,
            {'optimizer__name': 'adamw'},
            "name='adamw' keeps .*; use optimizer.name='muon'",
        ),
        (whole, {'optimizer__name': 'muon'}, "'muon' keeps .*; use optimizer.name='adamw'"),
        (whole, {'optimizer__ema': 0.9}, r'optimizer\.ema=0\.9 keeps .*; use optimizer\.ema=0\.0'),
    ):
        make = muon_config if workdir == muon_run else small_run
        config = make(tokens, **(changes | {'steps': 30}))
        with pytest.raises(ConfigError, match=message) as caught:
            train.train(config, str(workdir))
        assert f'--init_from={workdir}' in str(caught.value)
    shapes = train_step.abstract_state(set_up(small_run(tokens)))['params']
    with pytest.raises(ConfigError, match='keeps no averaged weights'):
        load_params(str(whole), shapes, averaged=True)
    # The remedy trains, and no longer averaging needs none.
    config = small_run(tokens, steps=1, optimizer__name='muon')
    train.train(config, str(tmp_path / 'run'), str(whole))
    workdir = shutil.copytree(muon_run, tmp_path / 'muon')
    train.train(
        muon_config(tokens, steps=5, optimizer__ema=0.0, eval__averaged=False), str(workdir)
    )
    assert records(workdir)[-1]['step'] == 5


def test_a_run_of_cut_sequences_goes_on_without_and_is_sampled_from(whole, tokens, tmp_path):
    config = small_run(tokens, eval__every=5, checkpoint__every=10, checkpoint__keep=0)
    config.cp_style = 'gather'
    config.mesh.update(cp=4, tp=2)
    cut = tmp_path / 'cut'
    train.train(config, str(cut))
    for a, b in zip(records(cut), records(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    step, saved = checkpoint_config(str(cut), None, None)
    assert saved.mesh.cp == 4
    evaluated = train.evaluate_only(saved, str(cut), step)['eval_loss']
    assert evaluated == pytest.approx(records(whole)[-1]['eval_loss'], rel=1e-4)
    params, cfg, *_ = load(str(cut), tokenizer='bytes')
    assert len(generate(params, cfg, [[1, 2, 3]], 5, 32)[0]) == 5
    workdir = interrupted(cut, tmp_path / 'run')
    train.train(small_run(tokens, eval__every=5, checkpoint__keep=0), str(workdir))
    for a, b in zip(records(workdir), records(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_complete_run_ends_at_once(whole, tokens, monkeypatch, capsys):
    monkeypatch.setattr(train, 'init_state', None)
    monkeypatch.setattr(train, 'open_data', None)
    before = records(whole)
    assert train.train(small_run(tokens), str(whole)) == {}
    assert 'is complete: step 20 is saved, and steps=20' in capsys.readouterr().out
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


def test_the_summary_of_a_stopped_run_has_no_evaluation_of_another_step(
    tokens, tmp_path, monkeypatch
):
    config, due = small_run(tokens, steps=4, eval__every=2), train.due
    monkeypatch.setattr(train, 'due', lambda step, c, start, _: due(step, c, start, step == 3))
    assert 'eval_loss' not in train.train(config, str(tmp_path))
    assert 'eval_loss' in train.train(config, str(tmp_path))


def test_a_workdir_without_a_checkpoint_binds_nothing(whole, tokens, tmp_path, capsys):
    """The remedy that a refused start names can be taken in the same workdir."""
    workdir = tmp_path / 'run'
    with pytest.raises(ConfigError, match=r'model\.vocab_size=256 is below the 257 tokens'):
        train.train(small_run(tokens, model__vocab_size=256), str(workdir))
    assert not workdir.exists()
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / 'checkpoints')
    (workdir / 'checkpoints' / '10' / 'arrays').mkdir(parents=True)
    (workdir / 'tokenizer.json').write_text('{"name": "x", "fingerprint": "another"}')
    train.train(small_run(tokens, steps=2, seed=1, model__d_ff=32), str(workdir))
    assert [r['step'] for r in records(workdir)] == [1, 2]
    before = (workdir / 'metrics.jsonl.before-1').read_bytes()
    assert before == (whole / 'metrics.jsonl').read_bytes()
    assert [p.name for p in (workdir / 'checkpoints').iterdir()] == ['2']
    assert f'starting again: {workdir} holds no checkpoint' in capsys.readouterr().out
    assert read_json(str(workdir / 'config.json'))['seed'] == 1
    assert read_json(str(workdir / 'tokenizer.json'))['name'] == 'bytes'


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
    with pytest.raises(ValueError, match=r'the parameters of .*\n.*d_ff|\[2, 32, 48\]'):
        load_params(str(whole), shapes)
    with pytest.raises(ValueError, match='holds no checkpoint'):
        load_params(str(tmp_path), shapes)


# ---------------------------------------------------------------------------------------------
# Other data
# ---------------------------------------------------------------------------------------------


def recorded(whole: pathlib.Path, **changes) -> dict:
    """Returns the record of the whole run's data, with changes of its vocabulary or source."""
    with Checkpointer(f'{whole}/checkpoints') as checkpoints:
        record = checkpoints.metadata(20)['data']
    for part in (record['tokenizer'], record['sources']['data']):
        part |= {name: x for name, x in changes.items() if name in part}
    return record


def compare(record: dict, workdir: pathlib.Path, start: int, init_from: str = '') -> list[str]:
    with Checkpointer(f'{workdir}/checkpoints') as checkpoints:
        return compared_data(checkpoints, start, str(workdir), init_from, record)


def test_a_checkpoint_holds_the_record_of_its_data(whole, tokens):
    _, sources, encoding = train.opened_data(small_run(tokens))
    record = data_record(sources, encoding)
    assert record == recorded(whole)
    assert record['sources']['data']['digest'] == sources[0].train.digest
    assert record['tokenizer']['name'] == 'bytes'


@pytest.mark.parametrize('source', ['', 'run', 'run/checkpoints/10'])
def test_another_vocabulary_is_refused_and_other_tokens_are_said(source, whole, tmp_path):
    """On resuming, and from the newest or a named checkpoint of another run."""
    (tmp_path / 'run').symlink_to(whole)
    step = 10 if source.endswith('10') else 20
    start, workdir = (0, tmp_path / 'new') if source else (20, tmp_path / 'run')
    init_from = str(tmp_path / source) if source else ''
    holder = f'step {step} of {tmp_path / "run"}'
    assert compare(recorded(whole), workdir, start, init_from) == []
    other = recorded(whole, digest='0' * 64, tokens=12_345)
    (said,) = compare(other, workdir, start, init_from)
    assert said.startswith(f'the data differs from what {holder} was trained on: data: ')
    assert said.endswith('here')
    assert '12,345 tokens (000000000000) here' in said
    with pytest.raises(ConfigError) as caught:
        compare(recorded(whole, name='own', fingerprint='f' * 32), workdir, start, init_from)
    text = str(caught.value)
    assert text.startswith(f'{holder} was trained with the vocabulary bytes (')
    assert 'the data has own (ffffffffffff): prepare the data with that one' in text


def test_an_older_checkpoint_has_the_vocabulary_of_tokenizer_json(whole, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    original = Checkpointer.metadata

    def metadata(self: Checkpointer, step: int) -> dict:
        return {name: x for name, x in original(self, step).items() if name != 'data'}

    record, other = recorded(whole), recorded(whole, fingerprint='f' * 32)
    monkeypatch.setattr(Checkpointer, 'metadata', metadata)
    assert compare(record, workdir, 20) == []
    with pytest.raises(ConfigError, match='was trained with the vocabulary bytes'):
        compare(other, workdir, 20)
    with pytest.raises(ConfigError, match='was trained with the vocabulary bytes'):
        compare(other, tmp_path / 'new', 0, f'{workdir}/')
    for content in ('{"na', None):  # then nothing is known
        if content is None:
            (workdir / 'tokenizer.json').unlink()
        else:
            (workdir / 'tokenizer.json').write_text(content)
        assert compare(other, workdir, 20) == []


def test_another_vocabulary_leaves_the_run_as_it_was(whole, tokens, tmp_path, monkeypatch):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    before = {path: path.read_bytes() for path in workdir.glob('*.json*')}
    monkeypatch.setattr(train, 'data_record', lambda *_: recorded(whole, fingerprint='f' * 32))
    with pytest.raises(ConfigError, match='was trained with the vocabulary'):
        train.train(small_run(tokens, steps=22), str(workdir))
    with pytest.raises(ConfigError, match='was trained with the vocabulary'):
        train.evaluate_only(small_run(tokens), str(workdir), 20)
    assert {path: path.read_bytes() for path in workdir.glob('*.json*')} == before


def test_init_from_is_said_to_be_left_aside(whole):
    (said,) = compare(recorded(whole), whole, 20, 'another')
    assert said == '--init_from=another is left aside: the run has steps of its own'


# ---------------------------------------------------------------------------------------------
# What is printed to go on
# ---------------------------------------------------------------------------------------------


def said_next(monkeypatch, capsys, config, run: pathlib.Path, *arguments, named: bool) -> dict:
    """Returns the words of the commands that are printed, by purpose."""
    monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
    next_commands.say_next(config, str(run), named)
    lines = [line.strip().partition('  ') for line in capsys.readouterr().out.splitlines()]
    return {purpose: shlex.split(line) for purpose, _, line in lines}


def unreadable(*_):
    raise ConfigError('the checkpoints cannot be listed')


def test_commands_to_copy_are_quoted_and_a_complete_run_goes_on_with_more_steps(
    whole, tokens, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / 'my (first) run'
    shutil.copytree(whole, workdir)
    given = ('--config=a b.py', '--config.steps', '20', f'--workdir={workdir}')
    config = small_run(tokens)
    said = said_next(monkeypatch, capsys, config, workdir, *given, named=True)
    assert said == {
        'go on': ['python', 'train.py', given[0], given[3], '--config.steps=40'],
        'curves': ['python', 'train.py', f'--plot={workdir}'],
        'text': ['python', 'generate.py', f'--workdir={workdir}', '--prompt=The number 1 follows'],
    }
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, 'steps', unreadable)
        said = said_next(monkeypatch, capsys, config, workdir, *given, named=True)
        assert said['go on'] == ['python', 'train.py', *given]
    shutil.rmtree(workdir / 'checkpoints' / '20')
    said = said_next(monkeypatch, capsys, config, workdir, given[0], named=False)
    assert said['go on'] == ['python', 'train.py', given[0], f'--workdir={workdir}']
    config.data.path = 'nowhere'
    said = said_next(monkeypatch, capsys, config, workdir, given[0], named=False)
    assert said['text'][-1] == '--prompt=The'


def test_an_unfinished_run_of_the_same_config_is_said(whole, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config=a b.py'])
    workdir = tmp_path / 'runs' / '1'
    shutil.copytree(whole, workdir)
    config = saved_config(read_json(str(workdir / 'config.json')))
    next_commands.say_unfinished(config)
    assert capsys.readouterr().out == ''
    shutil.rmtree(workdir / 'checkpoints' / '20')
    next_commands.say_unfinished(config)
    assert capsys.readouterr().out == (
        "runs/1 stopped at step 10 of 20; to go on with it: python train.py '--config=a b.py' "
        '--workdir=runs/1\n'
    )
    with Lease('runs/1'):  # it is running
        next_commands.say_unfinished(config)
    assert capsys.readouterr().out == ''


def test_differences():
    old = {'a': 1, 'b': {'c': (1, 2), 'd': 3, 'gone': 1}}
    new = {'a': 1, 'b': {'c': [1, 3], 'd': 4, 'new': 1}}
    assert differences(old, new) == [('b.c', [1, 2], [1, 3]), ('b.d', 3, 4)]
