"""Damaged files of a run are named, set aside, and what can be read of them is kept."""

import json
import os
import pathlib
import random
import shutil

import pytest
from common_runs import share_programs
from servers import leads_to, serve_bucket
from training_worker import small_run

import train
from config import ConfigError
from parallel import make_mesh
from runtime.workdir import (
    RECORD,
    add_entry,
    changed_start,
    cores,
    keep_records,
    mend,
    read_json,
    read_records,
    set_aside,
    start_entry,
    unfinished_run,
)

LINES = [json.dumps({'step': i, 'loss': 0.5}) + '\n' for i in (1, 2, 3, 3, 4)]


def test_records_beyond_the_step_and_torn_lines_go(tmp_path):
    file = tmp_path / 'metrics.jsonl'
    assert keep_records(str(file), 3) == ''
    assert not file.exists()
    file.write_text(''.join(LINES) + '{"step": 5, "lo')
    assert keep_records(str(file), 3) == ''
    assert file.read_text() == ''.join(LINES[:4])
    assert os.listdir(tmp_path) == ['metrics.jsonl']


def test_nothing_is_written_if_there_is_nothing_to_drop(tmp_path, monkeypatch):
    """As on a full disk, where a rewritten file would need room; cutting one off needs none."""
    file = tmp_path / 'metrics.jsonl'
    monkeypatch.setattr('runtime.workdir.write_text', None)
    for text in (''.join(LINES[:4]), ''.join(LINES)):
        file.write_text(text)
        file.chmod(0o444)
        assert keep_records(str(file), 4) == ''
        assert file.read_text() == text
    assert keep_records(str(file), 3) == ''
    assert file.read_text() == ''.join(LINES[:4])


def test_lines_with_a_carriage_return_are_kept(tmp_path):
    file = tmp_path / 'metrics.jsonl'
    content = ''.join(LINES).replace('\n', '\r\n').encode()
    file.write_bytes(content + b'\r\n')
    records, complaints = read_records(str(file))
    assert [r['step'] for r in records] == [1, 2, 3, 3, 4]
    assert complaints == []
    assert keep_records(str(file), 4) == ''
    assert file.read_bytes().startswith(content)


@pytest.mark.parametrize(
    ('line', 'problem', 'salvaged'),
    [
        (b'{"step": 2, "loss" 0.5}\n', 'delimiter', []),
        (b'{"step": 2, "loss": "\xff"}\n', 'no UTF-8', []),
        (b'{"stap": 2, "loss": 0.5}\n', 'no step', []),
        (b'{"step": "2", "loss": 0.5}\n', 'no step', []),
        (b'[1]\n', 'no step', []),
        (b'\x00\x00\x00\n', 'Expecting value', []),
        (b'{"step": 2, "loss": 0.5}X{"step": 3, "loss": 0.5}\n', 'Extra data', [2, 3]),
        (b'{"step": 2, "lo{"step": 3, "loss": 0.5}\n', 'delimiter', [3]),
    ],
)
def test_a_damaged_line_is_named_and_the_others_are_kept(line, problem, salvaged, tmp_path):
    file = tmp_path / 'metrics.jsonl'
    damaged = LINES[0].encode() + line + LINES[4].encode()
    file.write_bytes(damaged)
    records, (complaint,) = read_records(str(file))
    assert [r['step'] for r in records] == [1, *salvaged, 4]
    assert complaint.startswith(f'{file}, line 2: ')
    assert problem in complaint
    said = keep_records(str(file))
    assert said.startswith(f'{file} is damaged in line 2 (')
    assert said.endswith(f'the file as it was is {file}.damaged-1')
    assert pathlib.Path(f'{file}.damaged-1').read_bytes() == damaged
    assert read_records(str(file)) == (records, [])


@pytest.mark.parametrize('links', [True, False])
def test_without_room_a_damaged_file_stays(links, tmp_path, monkeypatch):
    def full(*_):
        raise ConfigError('No space left on device')

    def no_links(*_):
        raise OSError

    monkeypatch.setattr('runtime.workdir.write_text', full)
    if not links:
        monkeypatch.setattr('os.link', no_links)
    metrics, record = tmp_path / 'metrics.jsonl', tmp_path / 'record.json'
    for file, text in ((metrics, 'X\n' + LINES[0]), (record, '[\n {"from_step": 1},\n {"fr')):
        file.write_text(text)
        with pytest.raises(ConfigError, match='No space'):
            mend(str(tmp_path), 3)
        assert file.read_text() == (tmp_path / f'{file.name}.damaged-1').read_text() == text
        file.unlink()


def test_metrics_of_a_run_whose_checkpoints_are_gone_are_set_aside(tmp_path):
    file = tmp_path / 'metrics.jsonl'
    for n in (1, 2):
        file.write_text(''.join(LINES))
        (said,) = mend(str(tmp_path), 0)
        assert said.endswith(f'is now {file}.before-{n}')
        assert (tmp_path / f'metrics.jsonl.before-{n}').read_text() == ''.join(LINES)
        assert not file.exists()
    assert mend(str(tmp_path), 0) == []


def complaint_about(file: pathlib.Path) -> str:
    """Returns what reading a file is refused with, '' if it can be read."""
    try:
        read_json(str(file))
    except ConfigError as error:
        return str(error)
    return ''


@pytest.mark.parametrize('name', ['config.json', 'record.json', 'tokenizer.json', 'wandb.json'])
def test_every_byte_that_may_be_damaged_is_survived(name, tmp_path):
    """The file is readable, or named in a ConfigError; after `mend` it is readable or gone."""
    file = tmp_path / name
    content = {
        'config.json': {'steps': 3, 'batch_size': 2, 'seq_len': 4, 'text': 'ä'},
        'record.json': [{'from_step': i, 'mesh': {'dp': 1}} for i in range(3)],
        'tokenizer.json': {'name': 'bytes', 'fingerprint': 'abc'},
        'wandb.json': {'id': 'abc'},
    }[name]
    good = (json.dumps(content, indent=1, ensure_ascii=False) + '\n').encode()
    rng = random.Random(name)
    damaged = 0
    for i in range(len(good)):
        file.write_bytes(good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :])
        message = complaint_about(file)
        said = mend(str(tmp_path), 0)
        if not message:
            assert said == []
            continue
        damaged += 1
        assert message.startswith(f'{file} is damaged in line ')
        assert said[0].startswith(f'{message}; it is set aside as {file}.damaged-1')
        if name == 'record.json':
            assert len(read_json(str(file))) >= 1
            add_entry(str(tmp_path), {'from_step': 9})
            assert read_json(str(file))[-1] == {'from_step': 9}
        else:
            assert read_json(str(file)) is None
        os.remove(f'{file}.damaged-1')
    assert damaged > 5


def test_damaged_files_are_numbered(tmp_path):
    file = tmp_path / 'wandb.json'
    for n in (1, 2, 3):
        file.write_text(str(n))
        assert set_aside(str(file)) == f'{file}.damaged-{n}'
    assert (tmp_path / 'wandb.json.damaged-2').read_text() == '2'


def test_damaged_files_in_a_bucket(monkeypatch):
    with serve_bucket() as store:
        for name, value in leads_to(store).items():
            monkeypatch.setenv(name, value)
        store.objects['run/wandb.json'] = b'{'
        store.objects['run/metrics.jsonl'] = LINES[0].encode() + b'{"step"\n'
        assert len(mend('gs://bucket/run', 5)) == 2
        assert store.objects == {
            'run/wandb.json.damaged-1': b'{',
            'run/metrics.jsonl.damaged-1': LINES[0].encode() + b'{"step"\n',
            'run/metrics.jsonl': LINES[0].encode(),
        }


def test_an_unfinished_run_of_the_same_config_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_run('tokens')
    assert unfinished_run(config) is None
    for name, step, changes in (
        ('1', 4, {}),
        ('2', 8, {}),
        ('3', 20, {}),  # complete
        ('4', 6, {'seed': 1}),
        ('5', None, {}),
    ):
        folder = tmp_path / 'runs' / name
        folder.mkdir(parents=True)
        (folder / 'config.json').write_text(small_run('tokens', **changes).to_json(indent=2))
        if step:
            (folder / 'checkpoints' / str(step)).mkdir(parents=True)
            (folder / 'checkpoints' / str(step) / 'COMMIT').write_text('')
    (tmp_path / 'runs' / '6').mkdir()
    (tmp_path / 'runs' / '6' / 'config.json').write_text('{')
    assert unfinished_run(config) == ('runs/2', 8)


@pytest.fixture(scope='module')
def stopped(tokens, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('stopped') / 'run'
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_programs(monkeypatch)
        train.train(small_run(tokens, steps=4), str(workdir))
    return workdir


def test_a_run_goes_on_whatever_was_damaged(stopped, tokens, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / 'run'
    shutil.copytree(stopped, workdir)
    names = ('metrics.jsonl', 'record.json', 'config.json', 'tokenizer.json')
    for name in names:
        file = workdir / name
        content = file.read_bytes()
        file.write_bytes(content[:5] + b'\xff' + content[6:])
    share_programs(monkeypatch)
    train.train(small_run(tokens, steps=6), str(workdir))
    said = capsys.readouterr().out
    for name in names:
        assert f'{workdir / name} is damaged in line ' in said
        assert (workdir / f'{name}.damaged-1').exists()
    records, complaints = read_records(str(workdir / 'metrics.jsonl'))
    assert [r['step'] for r in records] == [2, 3, 4, 5, 6]  # the first line was damaged
    assert complaints == []
    for name in names[1:]:
        assert read_json(str(workdir / name))


# ---------------------------------------------------------------------------------------------
# What last bits depend on
# ---------------------------------------------------------------------------------------------


def test_what_changes_last_bits_is_told(tmp_path, tokens, monkeypatch):
    workdir, config = str(tmp_path), small_run(tokens)
    entry = start_entry(config, make_mesh({}), 10)
    assert entry['cores'] == cores() >= 1
    assert changed_start(workdir, entry) == ''  # there was no start before
    add_entry(workdir, entry)
    assert changed_start(workdir, entry) == ''
    later = entry | {'time': 'later', 'from_step': 20, 'cores': entry['cores'] + 2, 'processes': 4}
    later['versions'] = entry['versions'] | {'jax': '0.99'}
    later['environment'] = {'XLA_FLAGS': '--x'}
    said = changed_start(workdir, later)
    for change in (
        f'cores {entry["cores"]} -> {entry["cores"] + 2}',
        'processes 1 -> 4',
        f'versions.jax {entry["versions"]["jax"]} -> 0.99',
        '-> --x',
    ):
        assert change in said
    assert 'from_step' not in said
    # Cores of a host say nothing about what its accelerators compute.
    gpus = [e | {'devices': e['devices'] | {'platform': 'gpu'}} for e in (entry, later)]
    add_entry(workdir, gpus[0])
    assert 'cores' not in changed_start(workdir, gpus[1])
    without = {name: x for name, x in entry.items() if name != 'cores'}  # of an older version
    add_entry(workdir, without)
    assert changed_start(workdir, entry) == ''


def test_a_run_that_goes_on_elsewhere_says_so(tokens, tmp_path, monkeypatch, capsys):
    share_programs(monkeypatch)
    config = small_run(tokens, steps=2, checkpoint__every=1, checkpoint__keep=2)
    train.train(config, str(tmp_path))
    (entry,) = read_json(str(tmp_path / RECORD))
    for there, said in ((entry, False), (entry | {'cores': 96}, True)):
        shutil.rmtree(tmp_path / 'checkpoints' / '2')
        (tmp_path / RECORD).write_text(json.dumps([there]))
        capsys.readouterr()
        train.train(config, str(tmp_path))
        line = f'last bits from an unbroken run: cores 96 -> {cores()}\n'
        assert (line in capsys.readouterr().out) == said
    assert [e['cores'] for e in read_json(str(tmp_path / RECORD))] == [96, cores()]
