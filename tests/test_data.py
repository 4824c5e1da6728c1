"""Batches are pure; every token and window comes once; mixtures keep their proportions."""

import dataclasses
import inspect
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from test_prepare import SHIPPED, make_corpus
from test_shards import split_of_length

import data
from data import EvaluationSet, Loader, Split, permute, prefetch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# Order and batches


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
    forward = [loader.batch_at(step) for step in range(40)]
    fresh = Loader(Split(str(tmp_path / 'tokens'), 'train'), 8, 10, seed=1)
    for step in reversed(range(40)):
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
    with pytest.raises(ValueError, match=r'seq_len \+ 1 = 101 tokens.* 100.*smaller seq_len'):
        Loader(split, 1, 100, 0)
    with pytest.raises(ValueError, match='from 1 up, but are 0 and 4'):
        Loader(split, 0, 4, 0)
    with pytest.raises(ValueError, match='seed'):
        Loader(split, 1, 4, -1)


def test_loader_is_fast(tmp_path):
    loader = Loader(split_of_length(tmp_path, 20000), 64, 256, 0)
    loader.batch_at(0)
    best = min(timed(lambda i=i: loader.batch_at(i)) for i in range(1, 9))
    assert best / 64 < 1e-3


def timed(fn) -> float:
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


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


# Prefetching


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


# The command and the standard library


def test_command(tmp_path):
    (tmp_path / 'in').mkdir()
    texts = make_corpus(tmp_path / 'in')
    out = tmp_path / 'out'
    command = [sys.executable, os.path.join(ROOT, 'data.py'), '--tokenizer=bytes', '--workers=2']
    inputs = f'--input={tmp_path}/in/**/*.jsonl,{tmp_path}/in/**/*.txt'
    done = subprocess.run(
        [*command, inputs, f'--output={out}', '--validation_share=0.2'],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    chosen = [doc for doc in texts if doc.startswith('lines.jsonl:') or doc.endswith('.txt')]
    documents = {name: Split(str(out), name).n_documents for name in data.SPLITS}
    assert sum(documents.values()) == len(chosen)
    for name, n in documents.items():
        assert f'{name}: {n} documents' in done.stdout


def test_stdlib_corpus(tmp_path, monkeypatch, capsys):
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
    train, validation = (Split(folders[0], name) for name in data.SPLITS)
    assert train.n_documents > 400
    assert 5 <= validation.n_documents < 0.1 * train.n_documents
    text = inspect.getsource(dataclasses)
    name = 'dataclasses.py'
    split = train if data.split_of(name, 0.03) == 'train' else validation
    assert text in split.encoding().decode(split.read(0, split.n_tokens))
