"""Preparation is exact and repeatable; batches are pure; every token and window comes once."""

import dataclasses
import gzip
import inspect
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import data
from data import EvaluationSet, File, Job, Loader, Split, find_files, permute, prefetch, prepare
from tokenizer import get_encoding

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = 'vocab/stdlib-4096.tiktoken'


def make_corpus(folder) -> dict[str, str]:
    """Files of all kinds below `folder`; returns the text of each document by its id."""
    rng = random.Random(0)

    def text() -> str:
        pieces = [*'abc é\n(=東', '<|endoftext|>']
        return ''.join(rng.choices(pieces, k=rng.randint(1, 1000)))

    texts = {f'{kind}/{i}.{kind}': text() for kind in ('txt', 'py', 'md') for i in range(12)}
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())
    (folder / 'txt/empty.txt').write_bytes(b'')
    for name in ('lines.jsonl', 'sub/lines.jsonl.gz'):
        (folder / name).parent.mkdir(exist_ok=True)
        records = {f'{name}:{i}': text() for i in range(1, 40)}
        lines = ''.join(json.dumps({'id': 3, 'text': t}) + '\n' for t in records.values()).encode()
        (folder / name).write_bytes(gzip.compress(lines) if name.endswith('.gz') else lines)
        texts |= records
    return texts


def prepared(tmp_path, texts: dict[str, str], tokenizer: str = 'bytes', share: float = 0.0) -> str:
    """A folder prepared from .txt documents in parts of about 1000 bytes; returns its path."""
    files = []
    for name, text in texts.items():
        path = tmp_path / 'input' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        files.append(File(name, str(path)))
    output = str(tmp_path / 'tokens')
    prepare(files, Job(output, tokenizer, share), part_bytes=1000)
    return output


def split_of_length(tmp_path, n: int) -> Split:
    """A training split of n tokens (byte values and one end-of-text a document) over shards."""
    texts = {}
    for i in range(0, n, 700):
        size = min(700, n - i) - 1
        texts[f'{i:06d}.txt'] = ''.join(chr(33 + (i + j) * 7 % 90) for j in range(size))
    assert min(map(len, texts.values())) > 0
    split = Split(prepared(tmp_path, texts), 'train')
    assert split.n_tokens == n
    return split


def contents(folder) -> dict[str, bytes]:
    paths = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# Preparation


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """(texts by id, prepared folder, the files) with many parts and a quarter for validation."""
    folder = tmp_path_factory.mktemp('corpus')
    texts = make_corpus(folder)
    files = find_files([f'{folder}/**/*'])
    output = str(tmp_path_factory.mktemp('tokens') / 'one')
    prepare(files, Job(output, SHIPPED, 0.25), part_bytes=8000)
    return texts, output, files


def test_tokens_decode_to_the_documents(corpus):
    texts, output, _ = corpus
    enc = get_encoding(SHIPPED)
    for name in data.SPLITS:
        split = Split(output, name)
        ids = split.read(0, split.n_tokens)
        assert ids.dtype == np.int32
        assert ids[-1] == split.end_of_text == enc.eot_token
        ends = np.flatnonzero(ids == split.end_of_text)
        found = [enc.decode(piece[:-1]) for piece in np.split(ids, ends + 1)[:-1]]
        expected = [text for doc, text in texts.items() if data.split_of(doc, 0.25) == name]
        assert sorted(found) == sorted(expected)
        assert len(expected) > 10


def test_manifest_totals(corpus):
    texts, output, _ = corpus
    manifest = json.loads(contents(output)['manifest.json'])
    assert manifest['version'] == 1
    assert manifest['tokenizer'] == {
        'name': SHIPPED,
        'fingerprint': data.fingerprint(get_encoding(SHIPPED)),
        'n_vocab': 4096,
        'end_of_text': 4095,
    }
    for name in data.SPLITS:
        record, split = manifest['splits'][name], Split(output, name)
        assert len(record['shards']) > 3
        for key in ('tokens', 'documents', 'bytes'):
            assert record[key] == sum(shard[key] for shard in record['shards'])
            assert record[key] == getattr(split, f'n_{key}')
        mine = [text for doc, text in texts.items() if data.split_of(doc, 0.25) == name]
        assert split.n_documents == len(mine)
        assert split.n_bytes == sum(len(text.encode()) for text in mine)
        assert split.encoding().n_vocab == 4096
        assert split.tokenizer == SHIPPED


@pytest.mark.parametrize('workers', [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, workers):
    _, output, files = corpus
    prepare(files, Job(str(tmp_path / 'out'), SHIPPED, 0.25), workers, part_bytes=8000)
    assert contents(tmp_path / 'out') == contents(output)


def test_tokens_do_not_depend_on_the_cut_into_parts(corpus, tmp_path):
    _, output, files = corpus
    prepare(files, Job(str(tmp_path / 'out'), SHIPPED, 0.25))
    for name in data.SPLITS:
        one, many = Split(str(tmp_path / 'out'), name), Split(output, name)
        np.testing.assert_array_equal(one.read(0, one.n_tokens), many.read(0, many.n_tokens))


def test_rerun_over_the_leftovers_of_a_killed_run(corpus, tmp_path):
    _, output, files = corpus
    job = Job(str(tmp_path / 'out'), SHIPPED, 0.25)
    prepare(files[:9], job, part_bytes=8000)
    (tmp_path / 'out/manifest.json').unlink()
    prepare(files, job, part_bytes=8000)
    assert contents(tmp_path / 'out') == contents(output)


def test_validation_share_and_independence():
    names = [f'{i}.txt' for i in range(4000)]
    chosen = {name for name in names if data.split_of(name, 0.1) == 'validation'}
    assert 320 < len(chosen) < 480
    assert not any(data.split_of(name, 0.0) == 'validation' for name in names)
    larger = {name for name in names if data.split_of(name, 0.2) == 'validation'}
    assert chosen < larger
    # Fixed for ever: other values would mix validation text of old data into new training data.
    assert sorted(chosen, key=names.index)[:4] == ['14.txt', '48.txt', '68.txt', '71.txt']


def test_assignment_does_not_depend_on_other_documents_or_the_place(tmp_path):
    texts = {f'{i}.txt': f'text {i}' for i in range(60)}
    enc = get_encoding('bytes')
    kept = {}
    for label, names in {'all': list(texts), 'some': list(texts)[::-3]}.items():
        folder = prepared(tmp_path / label, {n: texts[n] for n in names}, share=0.3)
        split = Split(folder, 'validation')
        decoded = enc.decode(split.read(0, split.n_tokens))
        kept[label] = set(decoded.split('<|endoftext|>')[:-1])
    some = {texts[n] for n in list(texts)[::-3]}
    assert kept['some'] == kept['all'] & some
    assert 0 < len(kept['some']) < len(some)


def test_uint16_up_to_65536_ids_and_uint32_above(tmp_path):
    ranks = (tmp_path / 'big.tiktoken').with_suffix('.json')
    source = os.path.join(ROOT, SHIPPED)
    with open(source, 'rb') as f:
        (tmp_path / 'big.tiktoken').write_bytes(f.read())
    for end, dtype in [(65535, 'uint16'), (65536, 'uint32')]:
        ranks.write_text(json.dumps({'pattern': '.+', 'special_tokens': {'<|endoftext|>': end}}))
        folder = prepared(
            tmp_path / dtype, {'a.txt': 'abc', 'b.txt': 'd'}, str(tmp_path / 'big.tiktoken')
        )
        manifest = json.loads(contents(folder)['manifest.json'])
        assert manifest['dtype'] == dtype
        array = json.loads(contents(folder)['train/00000/zarr.json'])
        assert array['data_type'] == dtype
        split = Split(folder, 'train')
        assert (split.read(0, split.n_tokens) == end).sum() == 2


def test_arrays_open_with_zarr(corpus):
    zarr = pytest.importorskip('zarr')
    _, output, _ = corpus
    split = Split(output, 'train')
    manifest = json.loads(contents(output)['manifest.json'])
    arrays = [zarr.open(f'{output}/{s["path"]}') for s in manifest['splits']['train']['shards']]
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    found = np.concatenate([array[:] for array in arrays])
    np.testing.assert_array_equal(found, split.read(0, split.n_tokens))


def test_array_of_several_objects_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(data, 'CHUNK_TOKENS', 16)
    monkeypatch.setattr(data, 'OBJECT_TOKENS', 64)
    split = split_of_length(tmp_path, 2001)
    assert 'train/00000/c/1' in contents(tmp_path / 'tokens')
    ids = split.read(0, 2001)
    assert (ids[:699] == 33 + np.arange(699) * 7 % 90).all()


def test_damaged_shard_is_an_error(tmp_path):
    split_of_length(tmp_path, 500)
    path = tmp_path / 'tokens/train/00000/c/0'
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r'train/00000.*Digest mismatch'):
        Split(str(tmp_path / 'tokens'), 'train').read(0, 500)


def test_lost_chunk_is_an_error(tmp_path):
    split_of_length(tmp_path, 500)
    (tmp_path / 'tokens/train/00000/c/0').unlink()
    with pytest.raises(ValueError, match=r'train/00000.*is missing'):
        Split(str(tmp_path / 'tokens'), 'train').read(0, 500)


def test_chunks_of_the_fill_value_are_written(tmp_path):
    split = Split(prepared(tmp_path, {'a.txt': '\0' * (data.CHUNK_TOKENS + 9)}), 'train')
    assert not split.read(0, split.n_tokens - 1).any()


def test_text_that_the_tokenizer_refuses_is_named(tmp_path):
    lines = '{"text": "x"}\n' + json.dumps({'text': ' ' * 1_000_000 + 'x'})
    (tmp_path / 'a.jsonl').write_text(lines)
    with pytest.raises(ValueError, match=r'/a\.jsonl, document a\.jsonl:2: the tokenizer cannot'):
        prepare(find_files([f'{tmp_path}/*.jsonl']), Job(str(tmp_path / 'out'), SHIPPED))


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.txt', b'ab\xff', r'a\.txt: .*utf-8'),
        ('a.jsonl', b'{"text": "x"}\n\n{"text": ', r'a\.jsonl, line 3: Expecting value'),
        ('a.jsonl', b'{"text": "x"}\n{"text": "\xff"}', r'a\.jsonl, line 2: .*utf-8'),
        (
            'a.jsonl',
            b'{"content": "x"}',
            r"a\.jsonl, line 1: no text in a field 'text' \(--text_field\)",
        ),
        ('a.jsonl', b'{"text": 3}', r'a\.jsonl, line 1: no text'),
        ('a.jsonl', b'["text"]', r'a\.jsonl, line 1: no text'),
        ('a.jsonl', b'{"text": "\\ud800"}', r'a\.jsonl, line 1: .*surrogates'),
        ('a.jsonl.gz', b'not gzip', r'a\.jsonl\.gz is broken after line 0'),
        (
            'a.jsonl.gz',
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-4],
            r'a\.jsonl\.gz is broken after',
        ),
    ],
)
def test_bad_records_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(find_files([f'{tmp_path}/*.*']), Job(str(tmp_path / 'out'), 'bytes'))
    assert not (tmp_path / 'out/manifest.json').exists()


def test_bad_records_are_named_by_other_processes(tmp_path):
    for name in 'abcd':
        (tmp_path / f'{name}.txt').write_bytes(b'\xff' if name == 'c' else b'good')
    files = find_files([f'{tmp_path}/*.txt'])
    with pytest.raises(ValueError, match=r'c\.txt'):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes'), workers=2, part_bytes=1)
    assert not (tmp_path / 'out/manifest.json').exists()


def test_errors_of_the_input_and_the_output(tmp_path):
    with pytest.raises(ValueError, match=r'no file matches --input=.*\*\.txt'):
        find_files([f'{tmp_path}/*.txt'])
    (tmp_path / 'a.txt').write_bytes(b'')
    (tmp_path / 'b.csv').write_bytes(b'1,2')
    with pytest.raises(ValueError, match=r'b\.csv is of no kind'):
        find_files([f'{tmp_path}/*'])
    files = find_files([f'{tmp_path}/a.txt'])
    with pytest.raises(ValueError, match='hold no text'):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes'))
    (tmp_path / 'a.txt').write_bytes(b'text')
    prepare(files, Job(str(tmp_path / 'out'), 'bytes'))
    with pytest.raises(ValueError, match='prepared already'):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes'))
    with pytest.raises(ValueError, match=r'validation_share lies in \[0, 1\), but is 1'):
        prepare(files, Job(str(tmp_path / 'new'), 'bytes', 1.0))
    with pytest.raises(ValueError, match='workers'):
        prepare(files, Job(str(tmp_path / 'new'), 'bytes'), workers=0)


def test_names_are_relative_to_the_fixed_part_of_the_glob(tmp_path, monkeypatch):
    (tmp_path / 'x/y').mkdir(parents=True)
    (tmp_path / 'x/y/b.txt').write_text('b')
    (tmp_path / 'x/a.md').write_text('a')
    monkeypatch.chdir(tmp_path)
    for pattern in (f'{tmp_path}/x/**/*', 'x/**/*', './x/**/*.*'):
        assert [file.name for file in find_files([pattern])] == ['a.md', 'y/b.txt']
    assert [file.name for file in find_files(['x/a.md', 'x/*', 'x/y/b.txt'])] == ['a.md', 'b.txt']


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
    chosen = [doc for doc in texts if '.jsonl:' in doc or doc.endswith('.txt')]
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


# Splits


def test_read_across_shards(tmp_path):
    split = split_of_length(tmp_path, 2500)
    everything = split.read(0, 2500)
    for start, stop in [(0, 1), (699, 701), (650, 2200), (2499, 2500), (5, 5), (2500, 2500)]:
        np.testing.assert_array_equal(split.read(start, stop), everything[start:stop])
    for start, stop in [(-1, 3), (0, 2501), (4, 3)]:
        with pytest.raises(ValueError, match='no range of the 2500 tokens'):
            split.read(start, stop)


def test_split_of_a_url(tmp_path):
    split = split_of_length(tmp_path, 900)
    url = Split(f'file://{tmp_path}/tokens', 'train')
    np.testing.assert_array_equal(url.read(0, 900), split.read(0, 900))


def test_split_errors(tmp_path):
    with pytest.raises(ValueError, match=r'holds no manifest\.json.*python data\.py'):
        Split(str(tmp_path / 'nothing'), 'train')
    folder = prepared(tmp_path, {'a.txt': 'text'})
    with pytest.raises(ValueError, match='no document in its validation split'):
        Split(folder, 'validation')
    with pytest.raises(ValueError, match="not 'test'"):
        Split(folder, 'test')
    path = tmp_path / 'tokens/manifest.json'
    manifest = json.loads(path.read_text())
    manifest['tokenizer']['fingerprint'] = '0'
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match='another vocabulary than bytes'):
        Split(folder, 'train').encoding()
    path.write_text(json.dumps({**manifest, 'version': 99}))
    with pytest.raises(ValueError, match='format version 99'):
        Split(folder, 'train')
    path.write_text('[')
    with pytest.raises(ValueError, match='not a manifest'):
        Split(folder, 'train')


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
