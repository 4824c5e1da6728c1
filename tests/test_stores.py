"""Small files in folders and buckets, and a run that lives in a bucket."""

import json
import resource

import pytest
import tensorstore as ts
from common_runs import share_programs
from servers import serve_s3
from training_worker import small_run

import train
from config import ConfigError
from storage import stores
from storage.stores import Lines, expanded, open_store, read_text, write_text


@pytest.fixture(scope='module')
def server():
    with serve_s3() as environment:
        yield environment


@pytest.fixture
def bucket(server, monkeypatch):
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return 's3://bucket'


@pytest.fixture(params=['folder', 'bucket'])
def place(request, tmp_path):
    return request.getfixturevalue('bucket') if request.param == 'bucket' else str(tmp_path)


def test_small_files(place):
    path = f'{place}/run/notes.txt'
    assert read_text(path) is None
    for text in ('first\n', 'second, é\n'):
        write_text(path, text)
        assert read_text(path) == text


@pytest.mark.parametrize('path', ['ftp://host/runs', 'gs://', 's3://No_bucket!/runs'])
def test_what_cannot_be_opened_is_refused(path):
    with pytest.raises(ConfigError, match=f'^{path} cannot be opened: .*; use a folder, gs://'):
        open_store(path)


def test_lines_go_on_where_a_file_ends(place):
    path = f'{place}/lines.txt'
    write_text(path, 'a\n')
    lines = Lines(path, seconds=0)
    for line in 'bcd':
        lines.add(line)
    lines.flush()
    lines.flush()
    assert read_text(path) == 'a\nb\nc\nd\n'


def test_lines_that_do_not_fit_are_kept_and_whole(tmp_path):
    path, long = str(tmp_path / 'lines.txt'), 'b' * 3000
    lines = Lines(path)
    lines.add('a')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        for add in (lambda: lines.add(long), lines.flush):
            with pytest.raises(OSError, match='File too large'):
                add()
            assert read_text(path) == 'a\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lines.add('c')
    assert read_text(path) == f'a\n{long}\nc\n'


def test_lines_go_on_after_a_bucket_failed(monkeypatch):
    class Failed:
        def write(self, *_) -> ts.Future:
            promise, future = ts.Promise.new()
            promise.set_exception(ValueError('UNAVAILABLE'))
            return future

    path = 'memory://run/lines.txt'
    context = ts.Context()
    monkeypatch.setattr(stores, 'open_store', lambda path: open_store(path, context))
    lines = Lines(path, seconds=3600)
    lines.add('a')
    with monkeypatch.context() as patch:
        patch.setattr(stores, 'open_store', lambda _: Failed())
        with pytest.raises(ConfigError, match=f'{path} cannot be written: UNAVAILABLE'):
            lines.flush()
    lines.add('b')
    lines.flush()
    assert read_text(path) == 'a\nb\n'


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / 'file').write_bytes(b'\xff')
    with pytest.raises(ConfigError, match=f'{tmp_path}/file is damaged: it is no text'):
        read_text(f'{tmp_path}/file')
    with pytest.raises(ConfigError, match=f'{tmp_path}/file/x cannot be written: '):
        write_text(f'{tmp_path}/file/x', '')


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_text('~/run/a.txt', 'text')
    assert (tmp_path / 'run/a.txt').read_text() == read_text('~/run/a.txt') == 'text'
    lines = Lines('~/run/lines.txt')
    lines.add('a')
    assert (tmp_path / 'run/lines.txt').read_text() == 'a\n'
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    for path in ('gs://~/a', 's3://b/~', 'file:///~/a', 'a/~', './~'):
        assert expanded(path) == path


def test_a_bucket_receives_lines_that_are_young_only_when_asked(bucket):
    lines = Lines(f'{bucket}/young.txt', seconds=3600)
    lines.add('a')
    assert read_text(f'{bucket}/young.txt') is None
    lines.flush()
    assert read_text(f'{bucket}/young.txt') == 'a\n'


def test_a_run_lives_in_a_bucket(bucket, tokens, tmp_path, monkeypatch):
    share_programs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    workdir, config = f'{bucket}/runs/a', small_run(tokens, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(train.StopSignals, 'asked', lambda self: True)  # after the first step
        train.train(config, workdir)
    train.train(config, workdir)
    steps = [
        json.loads(line)['step'] for line in read_text(f'{workdir}/metrics.jsonl').splitlines()
    ]
    assert steps == [1, 2, 3, 4]
    assert [e['from_step'] for e in json.loads(read_text(f'{workdir}/record.json'))] == [0, 1]
    assert json.loads(read_text(f'{workdir}/config.json'))['steps'] == 4
    assert not list(tmp_path.iterdir())  # and nowhere else
