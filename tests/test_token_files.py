"""Files of token ids by other projects' own writers (tests/golden/make_token_files.py), and damaged
ones: read into shards, and straight from the file."""

import hashlib
import itertools
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from common_data import ROOT, contents
from common_runs import records, share_programs
from training_worker import small_run

import corpus.token_flat
import corpus.token_rows
import train
from config import ConfigError
from corpus.direct import direct_splits, is_direct, parsed_path
from corpus.files import READ_BYTES, find_files
from corpus.inspection import inspect
from corpus.prepare import Job, prepare
from corpus.shards import Split, UnreadableError
from corpus.token_files import TokenOptions, checked_options, find_token_files
from data import open_data
from runtime.config_checks import validate
from runtime.data_record import changed_data, data_record

GOLDEN = pathlib.Path(__file__).parent / 'golden/token_files'
DOCUMENTS = json.loads((GOLDEN / 'documents.json').read_text())
END = 256  # of the vocabulary 'bytes'
STREAM = [i for document in DOCUMENTS for i in (*document, END)]

# Files below GOLDEN, and how they are read; each holds DOCUMENTS.
FILES = {
    'megatron': ('megatron/ended.bin', {'format': 'megatron'}),
    'megatron, prefix': ('megatron/ended', {'format': 'megatron'}),
    'megatron, no end': ('megatron/plain.bin', {'format': 'megatron'}),
    'megatron, sentences': ('megatron/sentences.bin', {'format': 'megatron'}),
    'megatron, multimodal': ('megatron/multimodal.bin', {'format': 'megatron'}),
    'megatron, ends': ('megatron/ended.bin', {'format': 'megatron', 'borders': 'end_of_text'}),
    'llm.c': ('llmc/gpt2.bin', {'format': 'llmc'}),
    'llm.c, llama 3': ('llmc/llama3.bin', {'format': 'llmc'}),
    'nanogpt': ('nanogpt/train.bin', {'format': 'nanogpt', 'dtype': 'uint16'}),
    'datasets': ('datasets/saved', {'format': 'datasets'}),
    'parquet': ('datasets/large.parquet', {'format': 'parquet', 'field': 'ids'}),
    'mds, bytes, zstd': ('mds/bytes', {'format': 'mds', 'dtype': 'int64'}),
    'mds': ('mds/ndarray', {'format': 'mds'}),
    'mds, uint16': ('mds/uint16', {'format': 'mds'}),
    'levanter': ('levanter', {'format': 'levanter'}),
    'levanter, index': ('levanter/shard_ledger.json', {'format': 'levanter'}),
}
DIRECT = (
    'megatron',
    'megatron, no end',
    'megatron, sentences',
    'megatron, ends',
    'llm.c',
    'nanogpt',
)


def read(
    path: str | pathlib.Path,
    options: dict[str, str | int],
    output: pathlib.Path,
    share: float = 0.0,
    part_bytes: int = 1 << 20,
    workers: int = 1,
    max_bad_share: float = 0.001,
) -> dict:
    """Reads token files into shards and returns the manifest."""
    checked = checked_options(TokenOptions(**options))
    files = find_token_files([str(path)], checked)
    job = Job(str(output), 'bytes', share, max_bad_share=max_bad_share, tokens=checked)
    return prepare(files, job, workers, part_bytes)


def stream(folder: pathlib.Path, split: str = 'train') -> list[int]:
    """Returns the tokens of a prepared split."""
    opened = Split(str(folder), split)
    return opened.read(0, opened.n_tokens).tolist()


def documents_of(tokens: list[int]) -> list[list[int]]:
    """Returns the documents of a stream, without their ends."""
    cuts = [-1, *np.flatnonzero(np.array(tokens) == END).tolist()]
    return [tokens[a + 1 : b] for a, b in itertools.pairwise(cuts)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('JAXFORMER_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(corpus.token_flat, 'BLOCK_TOKENS', 100)
    monkeypatch.setattr(corpus.token_flat, 'SCANNED', 7)
    monkeypatch.setattr(corpus.token_rows, 'ROWS', 4)
    monkeypatch.setattr(corpus.token_rows, 'MDS_ROWS', 4)


# ---------------------------------------------------------------------------------------------
# What is read
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FILES)
def test_all_documents_are_read_with_one_end_each(name, tmp_path, small_blocks):
    path, options = FILES[name]
    whole = read(GOLDEN / path, options, tmp_path / 'one')
    assert stream(tmp_path / 'one') == STREAM
    assert whole['splits']['train']['bytes'] == sum(map(len, DOCUMENTS))
    assert whole['splits']['train']['documents'] == len(DOCUMENTS)
    empty = 1 if options['format'] in ('datasets', 'parquet', 'levanter') else 0
    assert (whole['input']['bad'], whole['input']['empty']) == (0, empty)
    assert inspect(str(tmp_path / 'one'), 0) == []
    lengths = Split(str(tmp_path / 'one'), 'train').document_lengths()
    assert (lengths == np.diff(np.flatnonzero(np.array(STREAM) == END), prepend=-1)).all()
    # The same in many parts.
    many = read(GOLDEN / path, options, tmp_path / 'many', part_bytes=300)
    assert stream(tmp_path / 'many') == STREAM
    assert len(many['splits']['train']['shards']) > 1


@pytest.mark.parametrize('name', ['mds/windows', 'datasets/windows.parquet'])
def test_windows_of_a_stream_are_put_together_again(name, tmp_path):
    options = {'format': 'mds' if 'mds' in name else 'parquet', 'borders': 'end_of_text'}
    read(GOLDEN / name, options, tmp_path / 'joined', part_bytes=100)
    n = len(STREAM) // 32 * 32
    assert stream(tmp_path / 'joined') == STREAM[:n] + [END] * (STREAM[n - 1] != END)
    manifest = read(GOLDEN / name, options | {'borders': 'records'}, tmp_path / 'cut')
    assert manifest['input']['records'] == manifest['splits']['train']['documents'] > n // 32


def splitmix(x: int) -> int:
    """Returns the finalizer of splitmix64 (Steele, Lea, Flood 2014), in plain integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@pytest.mark.parametrize('name', ['megatron', 'parquet', 'levanter, index'])
def test_the_split_follows_from_file_and_number(name, tmp_path, small_blocks):
    path, options = FILES[name]
    read(GOLDEN / path, options, tmp_path / 'out', 0.3, part_bytes=300)
    file = path.rpartition('/')[2].encode()
    seed = splitmix(int.from_bytes(hashlib.blake2b(file, digest_size=8).digest(), 'little'))
    out = [splitmix(splitmix(i) ^ seed) < 0.3 * 2**64 for i in range(1, len(DOCUMENTS) + 1)]
    assert 2 < sum(out) < 10
    for split, wanted in (('train', False), ('validation', True)):
        expected = [d for d, v in zip(DOCUMENTS, out, strict=True) if v == wanted]
        assert documents_of(stream(tmp_path / 'out', split)) == expected


def test_output_depends_neither_on_workers_nor_on_kills(tmp_path, monkeypatch):
    path, options = FILES['megatron, no end']
    read(GOLDEN / path, options, tmp_path / 'one', 0.2, 300)
    read(GOLDEN / path, options, tmp_path / 'two', 0.2, 300, workers=2)
    assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
    import corpus.prepare as module

    original = module.write_tokens
    calls = []

    def write(*args) -> None:
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(module, 'write_tokens', write)
    with pytest.raises(KeyboardInterrupt):
        read(GOLDEN / path, options, tmp_path / 'killed', 0.2, 300)
    assert not (tmp_path / 'killed/manifest.json').exists()
    n = len(calls)
    read(GOLDEN / path, options, tmp_path / 'killed', 0.2, 300)
    assert 0 < len(calls) - n < 14
    assert contents(tmp_path / 'killed') == contents(tmp_path / 'one')


def test_another_end_is_replaced_and_the_own_one_cuts(tmp_path):
    ids = np.array([10, 1, 2, 10, 3, 256, 4, 10, 10, 5], '<u2')
    ids.tofile(tmp_path / 'a.bin')
    options = {'format': 'nanogpt', 'dtype': 'uint16', 'end_of_text': 10}
    manifest = read(tmp_path / 'a.bin', options, tmp_path / 'out')
    assert documents_of(stream(tmp_path / 'out')) == [[1, 2], [3], [4], [5]]
    assert manifest['splits']['train']['bytes'] == 5
    path = f'nanogpt:{tmp_path}/a.bin,dtype=uint16,end_of_text=10,validation_share=0'
    train, _ = direct_splits(path, 'bytes')
    assert train.read(0, train.n_tokens).tolist() == stream(tmp_path / 'out')
    assert train.n_bytes == 5
    # An end beyond the vocabulary is none of its ids, and no bad one.
    np.where(ids == 10, 40_000, ids).astype('<u2').tofile(tmp_path / 'b.bin')
    read(tmp_path / 'b.bin', options | {'end_of_text': 40_000}, tmp_path / 'out_b')
    assert documents_of(stream(tmp_path / 'out_b')) == [[1, 2], [3], [4], [5]]


def test_of_a_lone_document_the_end_is_held_out(tmp_path):
    np.arange(100, dtype='<u2').tofile(tmp_path / 'a.bin')
    options = {'format': 'nanogpt', 'dtype': 'uint16'}
    manifest = read(tmp_path / 'a.bin', options, tmp_path / 'out', 0.2)
    assert manifest['moved'] == {'document': 'a.bin:0', 'to': 'validation', 'tail': True}
    assert stream(tmp_path / 'out') == [*range(80), END]
    assert stream(tmp_path / 'out', 'validation') == [*range(80, 100), END]
    assert inspect(str(tmp_path / 'out'), 0) == []


def test_of_the_documents_of_one_record_one_is_held_out(tmp_path):
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    pq.write_table(
        pa.table({'input_ids': [[1, 2, END, 3, 4, 5, END, 6, 7]]}), tmp_path / 'a.parquet'
    )
    manifest = read(tmp_path / 'a.parquet', {'format': 'parquet'}, tmp_path / 'out', 0.01)
    assert manifest['moved'] == {'document': 'a.parquet:1', 'to': 'validation', 'tail': False}
    assert documents_of(stream(tmp_path / 'out', 'validation')) == [[1, 2]]
    assert documents_of(stream(tmp_path / 'out')) == [[3, 4, 5], [6, 7]]


def test_a_finished_job_on_tokens_is_not_one_on_text(tmp_path):
    pytest.importorskip('pyarrow')
    path = GOLDEN / 'datasets/large.parquet'
    read(path, {'format': 'parquet', 'field': 'ids'}, tmp_path / 'out')
    with pytest.raises(ConfigError, match=r'the input \(tokens\)'):
        prepare(find_files([str(path)]), Job(str(tmp_path / 'out'), 'bytes', 0.0), 1, 1 << 20)


def test_random_streams_against_plain_python(tmp_path, small_blocks):
    rng = np.random.default_rng(0)
    for case in range(6):
        ids = rng.choice([1, 2, 3, 256, 7], 400, p=[0.2, 0.2, 0.2, 0.3, 0.1]).astype('<u2')
        ids.tofile(tmp_path / 'a.bin')
        expected = ''.join(chr(i) for i in ids).replace(chr(7), chr(END)).split(chr(END))
        options = {'format': 'nanogpt', 'dtype': 'uint16', 'end_of_text': 7}
        read(tmp_path / 'a.bin', options, tmp_path / f'out{case}', 0.0, int(rng.integers(2, 300)))
        found = documents_of(stream(tmp_path / f'out{case}'))
        assert found == [list(map(ord, text)) for text in expected if text]


# ---------------------------------------------------------------------------------------------
# Straight from the file
# ---------------------------------------------------------------------------------------------


def as_path(name: str, more: str = '') -> str:
    """Returns data.path for one of the FILES."""
    path, options = FILES[name]
    given = ''.join(f',{k}={v}' for k, v in options.items() if k != 'format')
    return f'{options["format"]}:{GOLDEN / path}{given}{more}'


@pytest.mark.parametrize('name', DIRECT)
def test_direct_stream_is_that_of_the_shards(name, tmp_path, small_blocks):
    path, options = FILES[name]
    read(GOLDEN / path, options, tmp_path / 'out', 0.3, 300)
    for _ in range(2):  # once more from the table that was kept
        splits = direct_splits(as_path(name, ',validation_share=0.3'), 'bytes')
        for split in splits:
            shards = Split(str(tmp_path / 'out'), split.name)
            for what in ('n_tokens', 'n_documents', 'n_bytes', 'fingerprint', 'end_of_text'):
                assert getattr(split, what) == getattr(shards, what), what
            whole = shards.read(0, shards.n_tokens)
            assert (split.read(0, split.n_tokens) == whole).all()
            starts = np.random.default_rng(0).integers(0, split.n_tokens, 20)
            for length in (1, 7, 300):
                found = split.read_windows(starts, length)
                assert found.dtype == np.int32
                assert (found == shards.read_windows(starts, length)).all()
            lengths = np.diff(np.flatnonzero(whole == END), prepend=-1)
            assert split.document_lengths().dtype == np.int64
            assert (split.document_lengths() == lengths).all()
    assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_validation_files_of_their_own(tmp_path):
    text = [[1, 2, 3], [4], [5, 6]]
    for name, documents in (('train', text), ('val', text[1:])):
        ids = [i for document in documents for i in (*document, END)]
        np.array(ids, '<u2').tofile(tmp_path / f'{name}.bin')
    path = f'nanogpt:{tmp_path}/train.bin,validation={tmp_path}/val.bin,dtype=uint16'
    train, validation = direct_splits(path, 'bytes')
    assert train.read(0, 9).tolist() == [1, 2, 3, END, 4, END, 5, 6, END]
    assert validation.read(0, 5).tolist() == [4, END, 5, 6, END]
    assert (train.n_bytes, validation.n_bytes) == (6, 3)
    _, none = direct_splits(
        f'nanogpt:{tmp_path}/train.bin,validation_share=0,dtype=uint16', 'bytes'
    )
    assert none is None


def test_a_folder_of_files_is_one_stream(tmp_path, small_blocks):
    for name, ids in {'b': [END, 1, 2, END, 3], 'a': [4, 5, END], 'c': [], 'd': [END]}.items():
        np.array(ids, '<u2').tofile(tmp_path / f'{name}.bin')
    options = {'format': 'nanogpt', 'dtype': 'uint16'}
    read(tmp_path, options, tmp_path / 'out')
    expected = [4, 5, END, 1, 2, END, 3, END]
    assert stream(tmp_path / 'out') == expected
    train, _ = direct_splits(f'nanogpt:{tmp_path}/*.bin,dtype=uint16,validation_share=0', 'bytes')
    assert train.read(0, 8).tolist() == expected
    assert train.document_lengths().tolist() == [3, 3, 2]
    for empty in ('c', 'd'):
        with pytest.raises(ConfigError, match='no tokens in 1 input files'):
            read(tmp_path / f'{empty}.bin', options, tmp_path / 'none')
        with pytest.raises(ConfigError, match='no document for training: it has 0 in all'):
            direct_splits(f'nanogpt:{tmp_path}/{empty}.bin,dtype=uint16', 'bytes')


def test_a_changed_file_is_noticed(tmp_path):
    for name in ('a.bin', 'a.idx'):
        shutil.copy(GOLDEN / f'megatron/ended.{name[2:]}', tmp_path / name)
    before, _ = direct_splits(f'megatron:{tmp_path}/a', 'bytes')
    again, _ = direct_splits(f'megatron:{tmp_path}/a.bin', 'bytes')
    assert before.digest == again.digest
    content = bytearray((tmp_path / 'a.bin').read_bytes())
    content[2] ^= 1
    (tmp_path / 'a.bin').write_bytes(content)
    os.utime(tmp_path / 'a.bin', ns=(1, 1))
    with pytest.raises(UnreadableError, match=r'a\.bin.* has changed'):
        before.read(0, 5)
    after, _ = direct_splits(f'megatron:{tmp_path}/a', 'bytes')
    assert after.digest != before.digest
    os.unlink(tmp_path / 'a.bin')
    with pytest.raises(UnreadableError, match='has changed'):
        after.read(0, 5)


def test_paths_of_token_files():
    path = 'nanogpt:a,b.bin,dtype=uint16,end_of_text=7,validation_share=0.5'
    parsed = parsed_path(path)
    assert (parsed.files, parsed.share, parsed.validation) == ('a,b.bin', 0.5, '')
    assert (parsed.options.dtype, parsed.options.end_of_text) == ('uint16', 7)
    for wrong, message in {
        'megatron:': 'no file is named',
        'nanogpt:a.bin': 'token_dtype=uint16',
        'nanogpt:a.bin,dtype=float32': 'no type of integers',
        'megatron:a,dtype=uint16': 'say the type',
        'megatron:a,validation=b,validation_share=0.1': 'both',
        'megatron:a,validation_share=1.5': r'\[0, 1\)',
        'megatron:a,validation_share=x': 'no number',
        'megatron:a,validation=b,c=d': "'c=d' is no option",
        'llmc:a,borders=records': 'no records',
        'nanogpt:a.bin,token_dtype=uint16': "'token_dtype=uint16' is no option",
        'megatron:a,borders=lines': 'is none of',
    }.items():
        with pytest.raises(ConfigError, match=message):
            parsed_path(wrong)
    for path in ('megatron:gs://bucket/a', 'nanogpt:a.bin,validation=gs://b,dtype=uint16'):
        assert is_direct(path)
        with pytest.raises(ConfigError, match=r'not local|no file matches data\.path: a\.bin'):
            direct_splits(path, 'bytes')
    assert not any(map(is_direct, ('megatron', 'megatron/a', 'gs://a', 'nanogpt://a', 'llm:a')))


def test_of_few_documents_none_is_held_out(tokens, tmp_path):
    put_together(tokens, tmp_path)
    path = f'nanogpt:{tmp_path}/train.bin,dtype=uint16,validation_share=0'
    config = small_run('', data__path=path, data__tokenizer='bytes', eval__every=5)
    with pytest.raises(ConfigError, match=r'eval\.every=0, or name files by validation=FILES'):
        open_data(config)


def test_a_table_that_cannot_be_read_is_made_again(tmp_path):
    first, _ = direct_splits(as_path('nanogpt', ',validation_share=0.3'), 'bytes')
    (kept,) = (tmp_path / 'cache').iterdir()
    content = kept.read_bytes()
    for damaged in (b'', content[:100], content[: len(content) // 2], bytes(len(content))):
        kept.write_bytes(damaged)
        split, _ = direct_splits(as_path('nanogpt', ',validation_share=0.3'), 'bytes')
        assert (split.digest, split.n_tokens) == (first.digest, first.n_tokens)
        assert len(kept.read_bytes()) == len(content)


def put_together(tokens: pathlib.Path, path: pathlib.Path) -> None:
    """Writes the two splits of a prepared folder as files of nanoGPT."""
    for name, file in (('train', 'train.bin'), ('validation', 'val.bin')):
        np.array(stream(tokens, name), '<u2').tofile(path / file)


@pytest.mark.parametrize('mixed', [False, True])
def test_batches_from_the_files_are_those_of_their_shards(mixed, tokens, tmp_path):
    put_together(tokens, tmp_path)
    path = f'nanogpt:{tmp_path}/train.bin,validation={tmp_path}/val.bin,dtype=uint16'
    found = []
    for source in (str(tokens), path):
        config = small_run('' if mixed else source, eval__every=5, data__tokenizer='bytes')
        if mixed:
            config.data.sources = (('a', source, 0.25), ('b', str(tokens), 0.75))
        loader, sources, encoding = open_data(config)
        batches = [loader.batch_at(step) for step in range(3)]
        for opened in sources:
            evaluation = opened.evaluation
            batches += [evaluation.batch_at(i) for i in range(evaluation.n_batches)]
        found.append((loader, sources, encoding, batches))
    (_, sources, encoding, expected), (_, files, _, batches) = found
    assert len(batches) > 3
    assert all((a == b).all() for a, b in zip(batches, expected, strict=True))
    # Another token in the file is another digest in the record of a run.
    record = data_record(files, encoding)
    assert changed_data(record, data_record(open_data(config)[1], encoding), 'step 5') == ''
    content = bytearray((tmp_path / 'train.bin').read_bytes())
    content[0] ^= 1
    (tmp_path / 'train.bin').write_bytes(content)
    changed = data_record(open_data(config)[1], encoding)
    assert 'differs from what step 5 was trained on' in changed_data(record, changed, 'step 5')


@pytest.mark.slow
def test_a_run_from_the_files_is_that_from_their_shards(tokens, tmp_path, monkeypatch, capsys):
    """Interrupted, with documents apart from each other."""
    share_programs(monkeypatch)
    put_together(tokens, tmp_path)
    path = f'nanogpt:{tmp_path}/train.bin,validation={tmp_path}/val.bin,dtype=uint16'
    found = []
    for source in (str(tokens), path):
        config = small_run(source, eval__every=5, steps=10, data__tokenizer='bytes')
        config.data.isolate_documents = True
        workdir = tmp_path / source[:3].strip('/')
        if source is path:  # the same in two turns
            config.checkpoint.update(every=5, keep=0)
            train.train(config, str(workdir))
            shutil.rmtree(workdir / 'checkpoints/10')
        train.train(config, str(workdir))
        found.append(records(workdir))
    assert found[0] == found[1]
    assert len(found[0]) > 10
    assert 'the data differs' not in capsys.readouterr().out


def test_the_config_is_checked():
    config = small_run('llmc:a.bin,validation=b.bin,x=y')
    with pytest.raises(ConfigError, match=r"data.path='llmc:a.bin.*: 'x=y' is no option"):
        validate(config, 1)
    config = small_run('', data__sources=(('a', 'nanogpt:a.bin', 1.0),))
    with pytest.raises(ConfigError, match='token_dtype=uint16'):
        validate(config, 1)


def test_the_command(tmp_path, capsys, monkeypatch):
    command = [sys.executable, f'{ROOT}/data.py', '--tokenizer=bytes', '--workers=1']
    command += ['--validation_share=0', f'--output={tmp_path}/out']

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False)

    done = run(f'--input={GOLDEN}/megatron/ended', '--format=megatron')
    assert done.returncode == 0, done.stderr
    assert f'{len(DOCUMENTS)} documents, {len(STREAM):,} tokens' in done.stdout
    done = run(f'--input={GOLDEN}/megatron/ended.bin', '--end_of_text=3')
    assert (done.returncode, done.stderr.count('\n')) == (1, 1)
    assert 'go with --format' in done.stderr
    done = run(f'--input={GOLDEN}/llmc/*.bin', '--format=megatron')
    assert (done.returncode, 'has no gpt2.idx beside it' in done.stderr) == (1, True)


@pytest.mark.parametrize(
    'name', ['megatron, no end', 'llm.c', 'parquet', 'mds, uint16', 'datasets']
)
def test_urls_give_what_local_files_give(name, tmp_path, small_blocks):
    fsspec = pytest.importorskip('fsspec')
    system = fsspec.filesystem('memory')
    path, options = FILES[name]
    system.put(str((GOLDEN / path).parent), f'/{tmp_path.name}', recursive=True)
    read(f'memory://{tmp_path.name}/{(GOLDEN / path).name}', options, tmp_path / 'out', 0.3, 300)
    read(GOLDEN / path, options, tmp_path / 'local', 0.3, 300)
    for split in ('train', 'validation'):
        assert stream(tmp_path / 'out', split) == stream(tmp_path / 'local', split)
    if name == 'megatron, no end':
        system.rm(f'/{tmp_path.name}/plain.idx')
        with pytest.raises(ConfigError, match=r'no plain\.idx beside it'):
            read(f'memory://{tmp_path.name}/plain.bin', options, tmp_path / 'out')


def test_remote_bytes_are_requested_about_once(tmp_path, monkeypatch):
    system = pytest.importorskip('fsspec').filesystem('memory')
    n = 600_000
    lengths = np.random.default_rng(0).integers(1, 20, n)
    ids = np.zeros(lengths.sum(), '<u2')
    ids[np.cumsum(lengths) - 1] = END
    places = 2 * (np.cumsum(lengths) - lengths)
    header = b'MMIDIDX\0\0' + struct.pack('<QBQQ', 1, 8, n, n + 1)
    arrays = lengths.astype('<i4'), places.astype('<i8'), np.arange(n + 1, dtype='<i8')
    index = header + b''.join(a.tobytes() for a in arrays)
    system.pipe(f'/{tmp_path.name}/a.bin', ids.tobytes())
    system.pipe(f'/{tmp_path.name}/a.idx', index)
    requests, opened = [], type(system.open(f'/{tmp_path.name}/a.bin'))
    reading = opened.read
    monkeypatch.setattr(
        opened, 'read', lambda self, *n: requests.append(reading(self, *n)) or requests[-1]
    )
    for options in ({'format': 'megatron'}, {'format': 'nanogpt', 'dtype': 'uint16'}):
        requests.clear()
        url = f'memory://{tmp_path.name}/a.bin'
        read(url, options, tmp_path / options['format'], part_bytes=2 * READ_BYTES)
        wanted = ids.nbytes + (len(index) if options['format'] == 'megatron' else 0)
        assert wanted <= sum(map(len, requests)) <= 2.2 * wanted
        assert len(requests) < 100
    assert stream(tmp_path / 'megatron') == stream(tmp_path / 'nanogpt')


def test_a_cache_of_levanter_at_a_url(tmp_path):
    pytest.importorskip('fsspec')
    read(f'file://{GOLDEN}/levanter', {'format': 'levanter'}, tmp_path / 'out')
    assert stream(tmp_path / 'out') == STREAM


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


def put(content: bytes, at: int, value: int, dtype: str) -> bytes:
    """Returns the content with a number at a byte."""
    new = np.array(value, dtype).tobytes()
    return content[:at] + new + content[at + len(new) :]


N = len(DOCUMENTS)  # and of sequences in megatron/ended
SIZE = len(STREAM) * 2  # bytes of it
DAMAGE: dict[str, tuple[str, str, Callable[[bytes], bytes | None], str]] = {
    'magic': ('megatron', 'a.idx', lambda b: b'TNTIDX\0\0' + b[8:], 'TNTIDX'),
    'version': ('megatron', 'a.idx', lambda b: put(b, 9, 2, '<u8'), 'version 2 at byte 9'),
    'type': ('megatron', 'a.idx', lambda b: put(b, 17, 6, 'u1'), 'code 6 at byte 17'),
    'count': ('megatron', 'a.idx', lambda b: put(b, 18, N + 1, '<u8'), f'{N + 1} sequences'),
    'header': ('megatron', 'a.idx', lambda b: b[:20], 'ends at byte 20'),
    'no header': ('megatron', 'a.idx', lambda b: b'', "starts with b''"),
    'cut index': ('megatron', 'a.idx', lambda b: b[:-3], f'{34 + 20 * N + 8 - 3} bytes'),
    'beyond': (
        'megatron', 'a.idx', lambda b: put(b, 34 + 4 * N + 8 * 5, SIZE, '<i8'),
        rf'a\.idx, byte {34 + 4 * N + 40}: sequence 5 ends beyond the \.bin, which has {SIZE:,}',
    ),
    'pointer': (
        'megatron', 'a.idx', lambda b: put(b, 34 + 4 * N + 8 * 5, 2, '<i8'),
        rf'byte {34 + 4 * N + 40}: sequence 5 starts elsewhere',
    ),
    'length': ('megatron', 'a.idx', lambda b: put(b, 34 + 4 * 3, -1, '<i4'), 'negative length'),
    'borders': (
        'megatron', 'a.idx', lambda b: put(b, 34 + 12 * N + 8 * 4, 99, '<i8'),
        rf'byte {34 + 12 * N + 32}: document border 4',
    ),
    'unfinished': (
        'megatron', 'a.idx', lambda b: put(b, 34 + 12 * N + 8 * N, N - 1, '<i8'),
        f'end at sequence {N - 1} of {N}',
    ),
    'no index': ('megatron', 'a.idx', lambda b: None, r'no a\.idx beside it'),
    'odd bytes': ('megatron', 'a.bin', lambda b: b[:-1], f'which has {SIZE - 1:,} bytes'),
    'long': ('megatron', 'a.bin', lambda b: b + b'00', f'take {SIZE:,} bytes, and the .bin has'),
    'odd nanogpt': ('nanogpt', 'a.bin', lambda b: b[:-1], f'byte {SIZE - 2:,}.* {SIZE - 1:,}'),
    'llm.c magic': ('llmc', 'a.bin', lambda b: put(b, 0, 20240522, '<i4'), 'magic number 20240522'),
    'llm.c version': ('llmc', 'a.bin', lambda b: put(b, 4, 7, '<i4'), r'version 7 \(byte 4\)'),
    'llm.c count': ('llmc', 'a.bin', lambda b: put(b, 8, 9, '<i4'), 'end at byte 1,042'),
    'llm.c header': ('llmc', 'a.bin', lambda b: b[:1000], 'has 1,000 bytes'),
    'llm.c empty': ('llmc', 'a.bin', lambda b: b'', 'has 0 bytes'),
    'ids': (
        'megatron', 'a.bin', lambda b: put(b, 100, 257, '<u2'),
        r'a\.bin, record 2, byte 100: id 257 is beyond the 257 of the vocabulary bytes',
    ),
    'ids, nanogpt': (
        'nanogpt', 'a.bin', lambda b: put(b, 100, 65_535, '<u2'),
        r'the document at token \d+, byte 100: id 65535',
    ),
}  # fmt: skip
SOURCES = {
    'megatron': ('megatron/ended', ('bin', 'idx'), {}),
    'nanogpt': ('nanogpt/train', ('bin',), {'dtype': 'uint16'}),
    'llmc': ('llmc/gpt2', ('bin',), {}),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_files_are_named_with_their_place(name, tmp_path):
    kind, file, change, message = DAMAGE[name]
    source, endings, more = SOURCES[kind]
    for ending in endings:
        content = (GOLDEN / f'{source}.{ending}').read_bytes()
        if file == f'a.{ending}':
            content = change(content)
        if content is not None:
            (tmp_path / f'a.{ending}').write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / 'a.bin', {'format': kind, **more}, tmp_path / 'out')
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / 'out/manifest.json').exists()
    given = ''.join(f',{k}={v}' for k, v in more.items())
    with pytest.raises(ConfigError, match=message):
        direct_splits(f'{kind}:{tmp_path}/a.bin{given}', 'bytes')
    assert not (tmp_path / 'cache').exists()


def test_bad_records_are_left_out_up_to_the_limit(tmp_path):
    content = (GOLDEN / 'megatron/ended.bin').read_bytes()
    at = 2 * (sum(len(d) + 1 for d in DOCUMENTS[:3]) + 4)
    (tmp_path / 'a.bin').write_bytes(put(content, at, 300, '<u2'))
    shutil.copy(GOLDEN / 'megatron/ended.idx', tmp_path / 'a.idx')
    manifest = read(
        tmp_path / 'a.bin', {'format': 'megatron'}, tmp_path / 'out', 0.0, max_bad_share=0.1
    )
    assert documents_of(stream(tmp_path / 'out')) == [*DOCUMENTS[:3], *DOCUMENTS[4:]]
    (report,) = manifest['input']['reports']
    assert report['place'] == f'record 4, byte {at}'
    assert (manifest['input']['bad'], manifest['input']['records']) == (1, len(DOCUMENTS))


def copied(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Copies a folder of GOLDEN."""
    return shutil.copytree(GOLDEN / name, folder / 'copy')


def rewritten(path: pathlib.Path, **values: object) -> None:
    """Changes values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut_short(path: pathlib.Path, n: int) -> None:
    """Leaves n bytes of a file."""
    path.write_bytes(path.read_bytes()[:n])


ROW_DAMAGE: dict[str, tuple[str, dict, Callable[[pathlib.Path], object], str]] = {
    'mds version': (
        'mds/uint16', {}, lambda p: rewritten(p / 'index.json', version=3), 'version 3; version 2',
    ),
    'mds shard': (
        'mds/uint16', {}, lambda p: (p / 'shard.00001.mds').unlink(), '00001.mds, which is not',
    ),
    'mds size': (
        'mds/uint16', {}, lambda p: cut_short(p / 'shard.00001.mds', 900), 'has 900 bytes, and',
    ),
    'mds column': ('mds/uint16', {'field': 'ids'}, lambda p: None, 'no column .ids.*id, tokens'),
    'mds text': ('mds/uint16', {'field': 'url'}, lambda p: None, 'as str: ids are read from'),
    'mds bytes': ('mds/bytes', {'dtype': ''}, lambda p: None, 'token_dtype=int64'),
    'mds places': (
        'mds/uint16', {},
        lambda p: (q := p / 'shard.00000.mds').write_bytes(put(q.read_bytes(), 8, 9999, '<u4')),
        r'shard.00000.mds, byte \d+ of the shard: sample \d+',
    ),
    'mds sizes': (
        'mds/uint16', {}, lambda p: wrong_size(p / 'shard.00000.mds'), 'sample 1 is broken',
    ),
    'mds zstd': (
        'mds/bytes', {'dtype': 'int64'},
        lambda p: (q := p / 'shard.00000.mds.zstd').write_bytes(b'0' * len(q.read_bytes())),
        '00000.mds.zstd is broken',
    ),
    'arrow': (
        'datasets/saved', {}, lambda p: cut_short(p / 'data-00001-of-00002.arrow', 700),
        'is broken',
    ),
    'arrow missing': (
        'datasets/saved', {}, lambda p: (p / 'data-00001-of-00002.arrow').unlink(),
        'lacks data-00001',
    ),
    'arrow column': ('datasets/saved', {'field': 'x'}, lambda p: None, 'input_ids, length'),
    'arrow numbers': ('datasets/saved', {'field': 'length'}, lambda p: None, 'holds int64'),
    'arrow order': (
        'datasets/saved', {},
        lambda p: rewritten(p / 'state.json', _indices_data_files=[{'filename': 'i.arrow'}]),
        'flatten_indices',
    ),
    'levanter unfinished': (
        'levanter', {}, lambda p: rewritten(p / 'shard_ledger.json', is_finished=False),
        'not finished',
    ),
    'levanter rows': (
        'levanter', {}, lambda p: rewritten(p / 'shard_ledger.json', total_num_rows=7), '7 rows',
    ),
    'levanter lost': (
        'levanter', {}, lambda p: shutil.rmtree(p / 'input_ids/data/c'), 'data cannot be read',
    ),
    'levanter column': ('levanter', {'field': 'x'}, lambda p: None, 'token_field=x'),
}  # fmt: skip


def wrong_size(path: pathlib.Path) -> None:
    """Makes the first sample's ids longer than the sample."""
    content = path.read_bytes()
    path.write_bytes(put(content, int(np.frombuffer(content, '<u4', 1, 4)[0]), 5000, '<u4'))


@pytest.mark.parametrize('name', ROW_DAMAGE)
def test_damaged_rows_are_named(name, tmp_path):
    source, more, change, message = ROW_DAMAGE[name]
    folder = copied(source, tmp_path)
    change(folder)
    options = {'format': source.partition('/')[0], **more}
    with pytest.raises(ConfigError, match=message) as error:
        read(folder, options, tmp_path / 'out')
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / 'out/manifest.json').exists()


@pytest.mark.parametrize(
    ('name', 'file', 'value'),
    [
        ('mds', 'index.json', []),
        ('mds', 'index.json', {'version': 2}),
        ('mds', 'index.json', {'version': 2, 'shards': [{'format': 'mds', 'version': 2}]}),
        ('datasets', 'state.json', []),
        ('datasets', 'state.json', {'_data_files': [{}]}),
        ('levanter', 'shard_ledger.json', 3),
    ],
)
def test_json_beside_tokens_that_says_something_else(name, file, value, tmp_path):
    path, options = FILES[name]
    shutil.copytree(GOLDEN / path, tmp_path / 'in')
    (tmp_path / 'in' / file).write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=rf'{file} does not say what it should'):
        read(tmp_path / 'in', options, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_other_files_of_a_datasets_folder(tmp_path):
    folder = copied('datasets/saved', tmp_path)
    shutil.copy(folder / 'data-00000-of-00002.arrow', folder / 'cache-0123.arrow')
    read(folder, {'format': 'datasets'}, tmp_path / 'out')
    assert stream(tmp_path / 'out') == STREAM
    both = tmp_path / 'both'
    for split in ('train', 'test'):
        shutil.copytree(GOLDEN / 'datasets/saved', both / split)
    (both / 'dataset_dict.json').write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r'several splits \(test, train\)'):
        read(both, {'format': 'datasets'}, tmp_path / 'out2')


def test_nulls_among_ids(tmp_path):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    rows = [[1, 2], None, [], [3, None], [4]]
    for name, kind in (('a', pa.list_(pa.int32())), ('b', pa.list_(pa.int64(), 2))):
        fitting = [row if name == 'a' or row is None or len(row) == 2 else [5, 6] for row in rows]
        table = pa.table({'input_ids': pa.array(fitting, kind)})
        pq.write_table(table, tmp_path / f'{name}.parquet')
        with pytest.raises(ConfigError, match=rf'{name}\.parquet, row 4: a null among the ids'):
            read(tmp_path / f'{name}.parquet', {'format': 'parquet'}, tmp_path / name)
        pq.write_table(table.slice(0, 3), tmp_path / f'{name}.parquet')
        manifest = read(tmp_path / f'{name}.parquet', {'format': 'parquet'}, tmp_path / f'{name}2')
        expected = [1, 2, END] if name == 'a' else [1, 2, END, 5, 6, END]
        assert stream(tmp_path / f'{name}2') == expected
        assert manifest['input']['empty'] == (2 if name == 'a' else 1)
