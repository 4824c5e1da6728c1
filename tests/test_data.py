"""Batches are pure; every token and window comes once; mixtures keep their proportions."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from common_data import ROOT, SHIPPED, make_corpus, prepared, split_of_length
from ml_collections import ConfigDict

import data
from config import ConfigError
from configs import default
from corpus import order, stdlib
from corpus.files import RemoteError
from corpus.hashes import split_of
from corpus.order import permute
from corpus.shards import SPLITS, Split
from corpus.workers import WorkerError
from data import EvaluationSet, Loader, Mixture, open_data, prefetch, vocabulary_note
from tokenizer import get_encoding, stdlib_files

# ---------------------------------------------------------------------------------------------
# Order and batches
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65537])
def test_permutation_is_a_bijection(n):
    np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, 0, 0)), np.arange(n))


def test_permutations_differ_and_mix():
    index = np.arange(1000)
    drawn = [permute(index, 1000, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(drawn):
        assert abs(np.corrcoef(index, a)[0, 1]) < 0.15
        for b in drawn[:i]:
            assert (a == b).mean() < 0.02
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.15
    np.testing.assert_array_equal(permute(index[::-7], 1000, 1, 2), drawn[6][::-7])


def test_small_permutations_take_all_orders():
    orders = {tuple(permute(np.arange(3), 3, seed, 0)) for seed in range(200)}
    assert len(orders) == 6


def test_every_window_once_an_epoch(tmp_path):
    split = split_of_length(tmp_path, 2400)
    loader = Loader(split, batch_size=5, seq_len=16, seed=3)
    assert loader.n_windows == 149
    ids = split.read(0, 2400)
    windows = np.stack([ids[i * 16 : i * 16 + 17] for i in range(149)])
    stream = np.concatenate([loader.batch_at(step) for step in range(3 * 149 // 5 + 1)])
    assert stream.dtype == np.int32
    orders = []
    for epoch in range(3):
        rows = stream[epoch * 149 : (epoch + 1) * 149]
        assert sorted(map(tuple, rows)) == sorted(map(tuple, windows))
        orders.append(rows.tobytes())
    assert len(set(orders)) == 3


def test_batches_are_pure_and_rows_are_slices(tmp_path):
    split = split_of_length(tmp_path, 1500)
    loader = Loader(split, 8, 10, seed=1)
    forward = [loader.batch_at(step) for step in range(20)]  # an epoch is 18.6 steps
    fresh = Loader(Split(str(tmp_path / 'tokens'), 'train'), 8, 10, seed=1)
    for step in reversed(range(20)):
        np.testing.assert_array_equal(fresh.batch_at(step), forward[step])
        parts = [fresh.batch_at(step, slice(i, i + 2)) for i in range(0, 8, 2)]
        np.testing.assert_array_equal(np.concatenate(parts), forward[step])
    assert (Loader(split, 8, 10, seed=2).batch_at(0) != forward[0]).any()
    np.testing.assert_array_equal(loader.batch_at(10**12), fresh.batch_at(10**12))


def test_batch_size_does_not_change_the_order(tmp_path):
    split = split_of_length(tmp_path, 1500)
    by_four = [Loader(split, 4, 10, 0).batch_at(step) for step in range(10)]
    by_eight = [Loader(split, 8, 10, 0).batch_at(step) for step in range(5)]
    np.testing.assert_array_equal(np.concatenate(by_four), np.concatenate(by_eight))


def test_loader_errors(tmp_path):
    split = split_of_length(tmp_path, 100)
    assert Loader(split, 1, 99, 0).batch_at(0).shape == (1, 100)
    with pytest.raises(ConfigError, match=r'seq_len \+ 1 = 101 tokens.* 100.*smaller seq_len'):
        Loader(split, 1, 100, 0)
    with pytest.raises(ValueError, match='must be 1 or more, but are 0 and 4'):
        Loader(split, 0, 4, 0)
    with pytest.raises(ValueError, match='seed'):
        Loader(split, 1, 4, -1)


def test_loader_is_fast(tmp_path):
    loader = Loader(split_of_length(tmp_path, 9000), 64, 256, 0)
    loader.batch_at(0)
    seconds = []
    for i in range(1, 9):
        started = time.perf_counter()
        loader.batch_at(i)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) / 64 < 1e-3


@pytest.mark.parametrize('n', [2, 17, 18, 160, 161, 162, 1000])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_evaluation_set_covers_every_token_once(tmp_path, n, batch_size):
    split = split_of_length(tmp_path, n)
    evaluation = EvaluationSet(split, batch_size, seq_len=16, limit=0)
    batches = [evaluation.batch_at(i) for i in range(evaluation.n_batches)]
    assert {batch.shape for batch in batches} == {(batch_size, 17)}
    rows = np.concatenate(batches)
    ids = split.read(0, n)
    np.testing.assert_array_equal(rows[:, 1:][rows[:, 1:] >= 0], ids[1:])
    # The input of every target is the token before it.
    np.testing.assert_array_equal(rows[:, :-1][rows[:, 1:] >= 0], ids[:-1])
    n_rows = -(-(n - 1) // 16)
    assert (rows[n_rows:] == -1).all()
    assert len(rows) - n_rows < batch_size


def test_evaluation_limit_and_rows(tmp_path):
    split = split_of_length(tmp_path, 1000)
    whole = EvaluationSet(split, 4, 16, 0)
    limited = EvaluationSet(split, 4, 16, 3)
    assert whole.n_batches == 16
    assert limited.n_batches == 3
    assert EvaluationSet(split, 4, 16, 99).n_batches == 16
    for i in (0, 2):
        np.testing.assert_array_equal(limited.batch_at(i), whole.batch_at(i))
    parts = [whole.batch_at(15, slice(i, i + 1)) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.batch_at(15))
    with pytest.raises(ValueError, match='no batch 3'):
        limited.batch_at(3)


class Positions:
    """A split whose tokens are their own positions. Lists the windows that are read."""

    fingerprint, tokenizer = 'f', 'positions'

    def __init__(self, n_tokens: int):
        self.n_tokens, self.read = n_tokens, []

    def read_windows(self, starts, length: int) -> np.ndarray:
        self.read += [int(start) for start in starts]
        return np.asarray(starts)[:, None] + np.arange(length)


@pytest.mark.parametrize('left_out', [0, 1, 15])
def test_every_token_once_an_epoch(left_out):
    loader = Loader(Positions(1601 + left_out), batch_size=4, seq_len=16, seed=0)
    for epoch in range(3):
        rows = np.concatenate([loader.batch_at(epoch * 25 + step) for step in range(25)])
        np.testing.assert_array_equal(np.sort(rows[:, :-1].ravel()), np.arange(1600))
        np.testing.assert_array_equal(np.sort(rows[:, 1:].ravel()), np.arange(1, 1601))


def test_rows_of_others_are_not_read():
    splits = [Positions(1000), Positions(2000)]
    mixture = Mixture(splits, [1, 2], batch_size=12, seq_len=9, seed=0)
    whole = mixture.batch_at(5)
    everything = [split.read.copy() for split in splits]
    assert sum(map(len, everything)) == 12
    for split in splits:
        split.read.clear()
    np.testing.assert_array_equal(mixture.batch_at(5, slice(3, 6)), whole[3:6])
    assert sorted(splits[0].read + splits[1].read) == sorted(whole[3:6, 0])


# ---------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------


def sources(tmp_path, *lengths: int) -> list[Split]:
    """Returns splits with tokens of their own: source i holds the 20 ids from 20 * i + 33 on."""
    splits = []
    for i, n in enumerate(lengths):
        texts = {'a.txt': ''.join(chr(33 + 20 * i + j * 7 % 20) for j in range(n - 1))}
        splits.append(Split(prepared(tmp_path / f'{i}-{n}', texts), 'train'))
    return splits


def source_of(rows: np.ndarray) -> np.ndarray:
    return (rows[:, 0] - 33) // 20


def test_mixture_keeps_its_proportions_over_any_window(tmp_path):
    splits = sources(tmp_path, 400, 90, 200)
    weights = np.array([0.5, 0.2, 0.3])
    mixture = Mixture(splits, weights, batch_size=7, seq_len=8, seed=0)
    drawn = source_of(np.concatenate([mixture.batch_at(step) for step in range(60)]))
    counts = np.cumsum(drawn[:, None] == np.arange(3), axis=0)
    n = np.arange(1, len(drawn) + 1)[:, None]
    assert np.abs(counts - n * weights).max() < 1
    for length in (1, 5, 7, 10, 50, 333):
        window = counts[length:] - counts[:-length]
        assert np.abs(window - length * weights).max() < 2
    assert (counts[mixture.period :] - counts[: -mixture.period] == mixture.period * weights).all()


def test_each_source_of_a_mixture_comes_in_its_own_order(tmp_path):
    splits = sources(tmp_path, 300, 100)
    mixture = Mixture(splits, [3, 1], batch_size=4, seq_len=8, seed=5)
    rows = np.concatenate([mixture.batch_at(step) for step in range(100)])
    for i, split in enumerate(splits):
        mine = rows[source_of(rows) == i]
        alone = Loader(split, 4, 8, seed=5).windows(np.arange(len(mine)))
        np.testing.assert_array_equal(mine, alone)
        assert len(mine) == (300, 100)[i]


def test_mixtures_are_pure_and_rows_are_slices(tmp_path):
    splits = sources(tmp_path, 300, 200, 100)
    mixture = Mixture(splits, [0.21, 0.46, 0.33], 8, 10, seed=1)
    forward = [mixture.batch_at(step) for step in range(15)]  # a period is 12.5 steps
    fresh = Mixture(splits, [0.21, 0.46, 0.33], 8, 10, seed=1)
    for step in reversed(range(15)):
        np.testing.assert_array_equal(fresh.batch_at(step), forward[step])
        parts = [fresh.batch_at(step, slice(i, i + 2)) for i in range(0, 8, 2)]
        np.testing.assert_array_equal(np.concatenate(parts), forward[step])
    np.testing.assert_array_equal(fresh.batch_at(10**12), mixture.batch_at(10**12))
    alone = Mixture(splits[:1], [0.3], 8, 10, seed=1)
    np.testing.assert_array_equal(alone.batch_at(7), Loader(splits[0], 8, 10, 1).batch_at(7))


def test_source_order_is_never_a_whole_place_off():
    rng = np.random.default_rng(0)
    for _ in range(60):
        counts = rng.integers(1, 90, rng.integers(1, 9))
        places = order.source_order(counts.tolist())
        np.testing.assert_array_equal(np.bincount(places), counts)
        prefix = np.cumsum(places[:, None] == np.arange(len(counts)), axis=0)
        due = np.arange(1, len(places) + 1)[:, None] * counts / counts.sum()
        assert np.abs(prefix - due).max() < 1


def test_whole_shares():
    assert order.whole_shares([0.7, 0.3]) == [7, 3]
    assert order.whole_shares([1, 1, 2]) == [1, 1, 2]
    assert order.whole_shares([0.1, 0.2]) == [1, 2]
    assert order.whole_shares([1e9]) == [1]
    assert sum(order.whole_shares([1 / 7, 1 / 11, 0.3])) == order.MAX_PERIOD
    for weights in ([1, 0], [1, -1], [float('nan')], [float('inf')]):
        with pytest.raises(ConfigError, match='finite and above 0'):
            order.whole_shares(weights)
    with pytest.raises(ConfigError, match=r'at least 0\.0001 of their sum'):
        order.whole_shares([1, 1e-9])


def test_mixture_errors(tmp_path):
    splits = sources(tmp_path, 100, 100)
    with pytest.raises(ValueError, match='2 sources and 1 weights'):
        Mixture(splits, [1], 1, 8, 0)
    other = prepared(tmp_path / 'other', {'a.txt': 'other ' * 99}, SHIPPED)
    with pytest.raises(ConfigError, match=f'prepared with bytes, {SHIPPED}: prepare them'):
        Mixture([splits[0], Split(other, 'train')], [1, 1], 1, 8, 0)


def test_open_sources(tmp_path):
    texts = {f'{i}.txt': f'{i} ' * 50 for i in range(40)}
    paths = [prepared(tmp_path / name, texts, share=0.3) for name in 'ab']
    loader, opened = data.open_sources(
        [('a', paths[0], 1.0), ('b', paths[1], 3.0)], 'bytes', 4, 16, seed=2, eval_batches=5
    )
    splits = [Split(path, 'train') for path in paths]
    expected = Mixture(splits, [1.0, 3.0], 4, 16, seed=2)
    np.testing.assert_array_equal(loader.batch_at(3), expected.batch_at(3))
    assert [(source.name, source.share) for source in opened] == [('a', 0.25), ('b', 0.75)]
    assert [source.evaluation.n_batches for source in opened] == [5, 5]
    assert all(source.evaluation.split.name == 'validation' for source in opened)
    assert all(source.train.name == 'train' for source in opened)
    single, (only,) = data.open_sources([('a', paths[0], 9.0)], 'bytes', 4, 16, 2, 0)
    assert isinstance(single, Loader)
    assert only.share == 1.0


def data_config(**fields) -> ConfigDict:
    config = default.get_config()
    config.batch_size, config.seq_len, config.seed, config.eval.batches = 4, 16, 2, 5
    config.data.update(fields)
    return config


def test_open_data_writes_nothing_into_the_config(tmp_path):
    texts = {f'{i}.txt': f'{i} ' * 50 for i in range(40)}
    path = prepared(tmp_path, texts, share=0.3)
    config = data_config(path=path, isolate_documents=True)
    before = config.to_json()
    loader, (source,), encoding = open_data(config)
    assert config.to_json() == before
    expected = Loader(Split(path, 'train'), 4, 16, seed=2)
    np.testing.assert_array_equal(loader.batch_at(3), expected.batch_at(3))
    assert (source.name, source.share, source.evaluation.n_batches) == ('data', 1.0, 5)
    assert encoding.eot_token == 256
    config.model.vocab_size = 256
    with pytest.raises(ConfigError, match=r'vocab_size=256 is below the 257 tokens.*use 384'):
        open_data(config)


def test_data_without_validation_documents_is_for_training_alone(tmp_path):
    path = prepared(tmp_path, {'a.txt': 'text ' * 99})
    config = data_config(path=path)
    config.eval.every = 0
    loader, (source,), encoding = open_data(config)
    assert loader.batch_at(0).shape == (4, 17)
    assert source.evaluation is None
    assert (source.train.n_documents, encoding.n_vocab) == (1, 257)
    config.eval.every = 5
    with pytest.raises(ConfigError, match=r'eval\.every=5, but nothing is held out .*: use --'):
        open_data(config)


def test_note_on_a_vocabulary_much_smaller_than_the_model():
    enc = get_encoding('bytes')
    assert vocabulary_note(300, enc) == vocabulary_note(257, enc) == ''
    note = vocabulary_note(4096, enc)
    assert '4,096 and the tokenizer bytes has 257 ids: 94% of the embedding is unused' in note
    assert '--config.model.vocab_size=384 would do' in note


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({}, 'data.path is empty'),
        ({'path': 'a', 'sources': (('a', 'b', 1.0),)}, 'are both set'),
        ({'sources': ('web',)}, r"holds 'web'; use \(\(name, path, weight\)"),
        ({'sources': (('web', '', 1.0),)}, 'whose name or path is no text'),
        ({'sources': (('web', 'a', 0),)}, 'whose weight is not above 0'),
        ({'sources': (('web', 'a', 1), ('web', 'b', 1))}, 'twice; use a name of its own'),
    ],
)
def test_source_errors(fields, message):
    (error,) = data.source_errors(data_config(**fields))
    assert re.search(message, error)
    assert not list(data.source_errors(data_config(sources=(('a', 'b', 1), ('c', 'd', 0.5)))))


# ---------------------------------------------------------------------------------------------
# Prefetching
# ---------------------------------------------------------------------------------------------


def test_prefetch_keeps_the_order_and_runs_ahead():
    calls: list[int] = []

    def fn(i: int) -> int:
        calls.append(i)
        time.sleep(0.002 * (i % 3))
        return i * i

    stream = prefetch(fn, 3, 20, depth=2)
    assert not calls
    assert next(stream) == 9
    time.sleep(0.05)
    assert calls == [3, 4, 5]
    assert list(stream) == [i * i for i in range(4, 20)]
    assert calls == list(range(3, 20))
    assert list(prefetch(fn, 5, 5)) == []


def test_prefetch_raises_where_the_error_belongs():
    def fn(i: int) -> int:
        if i == 2:
            raise OSError(f'shard {i}')
        return i

    stream = prefetch(fn, 0, 10)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(OSError, match='shard 2'):
        next(stream)
    assert not running()


def test_prefetch_thread_ends_when_closed():
    stream = prefetch(lambda i: i, 0, 10**9)
    assert [next(stream) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert running()
    stream.close()
    assert not running()


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith('prefetch')]


# ---------------------------------------------------------------------------------------------
# The command and the standard library
# ---------------------------------------------------------------------------------------------


def test_command(tmp_path):
    (tmp_path / 'in').mkdir()
    texts = make_corpus(tmp_path / 'in')
    out = tmp_path / 'out'
    command = [sys.executable, os.path.join(ROOT, 'data.py'), '--tokenizer=bytes', '--workers=2']
    # A list with commas, a second flag, and words as a shell makes them of a glob.
    lists = f'--input={tmp_path}/in/**/*.jsonl,{tmp_path}/in/txt/0.txt'
    more = [str(path) for path in sorted((tmp_path / 'in/txt').glob('*.txt'))]
    inputs = [lists, '--input', *more]
    done = subprocess.run(
        [*command, *inputs, f'--output={out}', '--validation_share=0.2'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    chosen = [doc for doc in texts if doc.startswith('lines.jsonl:') or doc.endswith('.txt')]
    assert len(more) == 13
    documents = {name: Split(str(out), name).n_documents for name in SPLITS}
    assert sum(documents.values()) == len(chosen)
    for name, n in documents.items():
        assert f'{name}: {n} documents' in done.stdout
    assert '1 empty documents left out, 0 bad records' in done.stdout
    assert '100%' in done.stderr
    assert 'tokens/s' in done.stderr
    assert 'ETA 0:00:00' in done.stderr

    (out / 'validation/00000/c/0').unlink()
    inspect_it = [sys.executable, os.path.join(ROOT, 'data.py'), f'--inspect={out}']
    damaged = subprocess.run(inspect_it, capture_output=True, text=True)
    assert damaged.returncode == 1
    assert '--- train document 0' in damaged.stdout
    assert 'validation/00000 is damaged' in damaged.stderr
    nothing = subprocess.run(command, capture_output=True, text=True)
    assert nothing.returncode == 1
    assert 'give --input, --tokenizer and --output to prepare, or --inspect' in nothing.stderr


FLAGS = {
    'inspect': None, 'samples': 0, 'input': ['a.txt'], 'tokenizer': 'bytes', 'output': 'out',
    'validation_share': 0.0, 'text_field': 'text', 'max_bad_share': 0.0, 'workers': 1, 'ray': None,
    'extensions': [], 'as_text': False, 'format': None, 'token_field': '', 'token_dtype': '',
    'end_of_text': -1, 'borders': '',
}  # fmt: skip


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'input': ['none/*.txt']}, 'no file matches --input=none/'),
        ({'inspect': 'none'}, r'none holds no manifest\.json'),
        ({'tokenizer': 'none.tiktoken'}, 'there is no vocabulary'),
        ({'output': 'nosuch://bucket'}, 'nosuch://bucket cannot be opened'),
        ({'workers': 0}, 'workers counts processes'),
    ],
)
def test_command_ends_with_the_message_of_an_error(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('text')
    flags = types.SimpleNamespace(**(FLAGS | given))
    monkeypatch.setattr(data, 'flags', types.SimpleNamespace(FLAGS=flags))
    with pytest.raises(SystemExit, match=message):
        data.main([])


def test_words_are_further_inputs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('a.txt', 'b.txt', 'c,d.txt'):
        (tmp_path / name).write_text(name)
    flags = types.SimpleNamespace(**(FLAGS | {'input': ['a.txt,c,d.txt']}))
    monkeypatch.setattr(data, 'flags', types.SimpleNamespace(FLAGS=flags))
    data.main(['b.txt'])
    assert Split('out', 'train').n_documents == 3
    assert 'nothing is held out for validation (--validation_share=0): ' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='no file matches --input=e'):
        data.main(['e.txt'])
    flags.inspect = 'out'
    with pytest.raises(SystemExit, match=r'b\.txt'):
        data.main(['b.txt'])


def test_what_is_held_out_is_said():
    def manifest(tokens: int, **moved) -> dict:
        splits = {'validation': {'tokens': tokens}}
        return {'validation_share': 0.01, 'splits': splits, **({'moved': moved} if moved else {})}

    assert data.held_out(manifest(5)) == ''
    assert '--config.eval.every=0' in data.held_out(manifest(0))
    said = data.held_out(manifest(5, document='a.txt', to='validation', tail=True))
    assert said == 'held out for validation: the end of a.txt, the only document'
    said = data.held_out(manifest(5, document='a.txt', to='validation', tail=False))
    assert said.startswith('held out for validation: a.txt, since of so few documents')


@pytest.mark.parametrize(
    ('error', 'shown'),
    [
        (RemoteError('gone'), SystemExit),
        (WorkerError('gone'), SystemExit),
        (PermissionError('gone'), SystemExit),
        (ValueError('gone'), ValueError),  # a bug, which shows its traceback
    ],
)
def test_command_tells_errors_from_bugs(monkeypatch, error, shown):
    def fail(*_):
        raise error

    flags = types.SimpleNamespace(**FLAGS)
    monkeypatch.setattr(data, 'flags', types.SimpleNamespace(FLAGS=flags))
    monkeypatch.setattr(data, 'find_files', fail)
    with pytest.raises(shown, match='gone'):
        data.main([])


def test_stdlib_files():
    named, _ = stdlib_files()
    names = [name for name, _ in named]
    assert len(names) > 400
    assert names == sorted(set(names))
    assert {'dataclasses.py', 'json/decoder.py'} < set(names)
    assert not [name for name in names if name.startswith(('test/', '_sysconfigdata_'))]


def test_stdlib_corpus(tmp_path, monkeypatch, capsys):
    named, skipped = stdlib_files()
    some = [(name, path) for name, path in named if name == 'dataclasses.py' or name < 'b']
    monkeypatch.setattr(stdlib, 'stdlib_files', lambda: (some, skipped))
    monkeypatch.setenv('JAXFORMER_CACHE', str(tmp_path / 'cache'))
    folders: list[str] = []
    threads = [
        threading.Thread(target=lambda: folders.append(data.stdlib_corpus(SHIPPED)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 2
    assert os.listdir(tmp_path / 'cache') == [os.path.basename(folders[0])]
    # As open to other users as any folder that is made here.
    (tmp_path / 'plain').mkdir()
    assert os.stat(folders[0]).st_mode == os.stat(tmp_path / 'plain').st_mode
    capsys.readouterr()
    assert data.stdlib_corpus(SHIPPED) == folders[0]
    assert capsys.readouterr().out == ''
    train, validation = (Split(folders[0], name) for name in SPLITS)
    assert train.n_documents + validation.n_documents == len(some)
    text = inspect.getsource(dataclasses)
    split = train if split_of('dataclasses.py', 0.03) == 'train' else validation
    assert text in split.encoding().decode(split.read(0, split.n_tokens))


def test_folders_of_killed_preparations_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv('JAXFORMER_CACHE', str(tmp_path))
    monkeypatch.setattr(stdlib, 'stdlib_files', lambda: ([('a.py', stdlib.__file__)], 0))
    names = ('killed', 'alive', 'new', 'old')
    for name in names:
        (tmp_path / f'building-{name}/tokens').mkdir(parents=True)
    (tmp_path / 'building-killed/lock').write_text('')
    hour_ago = time.time() - 2 * stdlib.UNLOCKED_SECONDS
    os.utime(tmp_path / 'building-old', (hour_ago, hour_ago))
    code = 'import fcntl, sys; f = open(sys.argv[1], "w"); fcntl.flock(f, 2); print(1, flush=True)'
    command = [sys.executable, '-c', f'{code}; input()', f'{tmp_path}/building-alive/lock']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        folder = data.stdlib_corpus('bytes')
        left = sorted(name for name in os.listdir(tmp_path) if name.startswith('building-'))
        process.communicate(b'\n')
    assert left == ['building-alive', 'building-new']
    assert os.listdir(folder)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('JAXFORMER_CACHE', str(tmp_path / 'file'))
    with pytest.raises(ConfigError, match=r'cannot be written .*set JAXFORMER_CACHE'):
        data.stdlib_corpus('bytes')
