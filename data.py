"""Text to token shards (a command), and token shards to batches (a library).

    python data.py --input='corpus/**/*.txt' --tokenizer=cl100k_base --output=DIR

writes, for each part of the input and each split, one zarr3 array of token ids, DIR/train/00000
and so on, and last DIR/manifest.json, without which DIR does not count as prepared. Every
document ends with the end-of-text token. Which split a document goes to depends on its id alone,
and the bytes of the output on the input alone, not on the number of workers.

`Loader.batch_at(step)` is a pure function of the seed, the step and the manifest: training
resumes with a step number, on any number of processes, and each process reads its own rows.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts
import tiktoken
from absl import app, flags

from tokenizer import END_OF_TEXT, fingerprint, get_encoding, stdlib_files

VERSION = 1  # of the manifest and the arrays
MANIFEST = 'manifest.json'
SPLITS = ('train', 'validation')

FILE_KINDS = ('.txt', '.py', '.md')  # a document a file
LINE_KINDS = ('.jsonl', '.jsonl.gz')  # a document a line

PART_BYTES = 32 << 20  # of input in one part, unless a single file is larger
CHUNK_TOKENS = 1 << 15  # what one small read fetches and checks
OBJECT_TOKENS = 1 << 24  # tokens in one file or object of an array, a multiple of CHUNK_TOKENS
CACHE_BYTES = 256 << 20  # of decoded chunks kept in memory by a split

T = TypeVar('T')


def _store(path: str) -> ts.KvStore:
    """The key-value store under a local folder or a URL such as gs://bucket/folder."""
    if '://' in path:
        return ts.KvStore.open(path.rstrip('/') + '/').result()
    return ts.KvStore.open({'driver': 'file', 'path': os.path.abspath(path) + '/'}).result()


def _array_spec(store: ts.KvStore, path: str) -> dict[str, Any]:
    return {
        'driver': 'zarr3',
        'kvstore': (store / f'{path}/').spec().to_json(),
        # A lost chunk must not read as a run of token 0: all are written, all must be there.
        'store_data_equal_to_fill_value': True,
        'fill_missing_data_reads': False,
    }


# ---------------------------------------------------------------------------------------------
# From text to token shards
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class File:
    """An input file. Its `name`, which document ids start with, is the same wherever it lies."""

    name: str
    path: str


@dataclasses.dataclass(frozen=True)
class Job:
    """What every part of a preparation shares."""

    output: str  # a folder or a tensorstore URL
    tokenizer: str
    validation_share: float = 0.01  # of the documents
    text_field: str = 'text'  # of a .jsonl record


def find_files(patterns: Sequence[str]) -> list[File]:
    """The files that the globs match, each once, named relative to the fixed part of its glob."""
    files: dict[str, File] = {}
    for pattern in patterns:
        fixed = pattern
        while glob.has_magic(fixed):
            fixed = os.path.dirname(fixed)
        root = os.path.dirname(fixed) if fixed == pattern else fixed
        found = [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
        if not found:
            raise ValueError(f'no file matches --input={pattern}: check the pattern')
        named = [File(os.path.relpath(p, root or '.').replace(os.sep, '/'), p) for p in found]
        for file in sorted(named, key=lambda file: file.name):
            if not file.name.endswith(FILE_KINDS + LINE_KINDS):
                raise ValueError(
                    f'{file.path} is of no kind that can be read ({", ".join(FILE_KINDS)} and '
                    f'{", ".join(LINE_KINDS)}): narrow --input={pattern}'
                )
            files.setdefault(os.path.abspath(file.path), file)
    return list(files.values())


def prepare(
    files: Sequence[File],
    job: Job,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    progress: bool = False,
) -> dict[str, Any]:
    """Tokenizes the files into the token shards and the manifest of `job.output`.

    Returns the manifest. Raises ValueError if the output is prepared already, if there is no
    text, or for the first document that cannot be read, which the error names.
    """
    if not 0 <= job.validation_share < 1:
        raise ValueError(f'validation_share lies in [0, 1), but is {job.validation_share}')
    if workers < 1:
        raise ValueError(f'workers counts processes, from 1 up, but is {workers}')
    enc = get_encoding(job.tokenizer)
    if END_OF_TEXT not in enc.special_tokens_set:
        raise ValueError(
            f'the tokenizer {job.tokenizer} has no {END_OF_TEXT}, which ends each document: add '
            'it to the special tokens of its sidecar, or choose another tokenizer'
        )
    store = _store(job.output)
    if store.read(MANIFEST).result().state == 'value':
        raise ValueError(f'{job.output} is prepared already: remove it or choose another output')

    parts = _cut_into_parts(files, part_bytes)
    records: list[dict[str, dict[str, Any]]] = []
    started = time.monotonic()
    for record in _write_parts(parts, job, workers):
        records.append(record)
        if progress:
            _show_progress(records, len(parts), started)
    if not any(records):
        raise ValueError(f'the {len(files)} input files hold no text: check the input')
    shards = {name: [record[name] for record in records if name in record] for name in SPLITS}
    manifest = {
        'version': VERSION,
        'tokenizer': {
            'name': job.tokenizer,
            'fingerprint': fingerprint(enc),
            'n_vocab': enc.n_vocab,
            'end_of_text': enc.eot_token,
        },
        'dtype': _dtype(enc).name,
        'validation_share': job.validation_share,
        'splits': {name: _total(shards[name]) | {'shards': shards[name]} for name in SPLITS},
    }
    store.write(MANIFEST, json.dumps(manifest, indent=1).encode() + b'\n').result()
    return manifest


def _dtype(enc: tiktoken.Encoding) -> np.dtype:
    return np.dtype(np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32)


def _cut_into_parts(files: Sequence[File], part_bytes: int) -> list[list[File]]:
    """Consecutive files of about `part_bytes` together; the cut depends on the files alone."""
    parts: list[list[File]] = []
    room = 0
    for file in files:
        size = os.path.getsize(file.path)
        if not parts or size > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(file)
        room -= size
    return parts


def _write_parts(parts: list[list[File]], job: Job, workers: int) -> Iterator[dict[str, Any]]:
    write = functools.partial(_write_part, job)
    if workers == 1 or len(parts) < 2:
        yield from map(write, range(len(parts)), parts)
        return
    # A forked child would inherit the locks of tensorstore's threads without the threads.
    pool = ProcessPoolExecutor(min(workers, len(parts)), multiprocessing.get_context('spawn'))
    try:
        yield from pool.map(write, range(len(parts)), parts)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_part(job: Job, index: int, files: list[File]) -> dict[str, dict[str, Any]]:
    """Writes the arrays of one part; returns, for each split that has any, its shard's record."""
    enc = get_encoding(job.tokenizer)
    dtype = _dtype(enc)
    end = np.array([enc.eot_token], dtype)
    tokens: dict[str, list[np.ndarray]] = {}
    size = dict.fromkeys(SPLITS, 0)
    for file in files:
        for document, text in _documents(file, job.text_field):
            split = split_of(document, job.validation_share)
            try:
                ids = enc.encode_to_numpy(text, disallowed_special=())  # markers in text are text
            except ValueError as error:  # such as a megabyte of spaces, too long for the regex
                raise ValueError(
                    f'{file.path}, document {document}: the tokenizer cannot encode it ({error}): '
                    'shorten or remove it'
                ) from error
            tokens.setdefault(split, []).extend((ids.astype(dtype), end))
            size[split] += len(text.encode())
    store = _store(job.output)
    records = {}
    for split, pieces in tokens.items():
        path = f'{split}/{index:05d}'
        records[split] = {
            'path': path,
            'tokens': _write_array(store, path, np.concatenate(pieces)),
            'documents': len(pieces) // 2,
            'bytes': size[split],
        }
    return records


def _write_array(store: ts.KvStore, path: str, tokens: np.ndarray) -> int:
    per_object = min(OBJECT_TOKENS, math.ceil(len(tokens) / CHUNK_TOKENS) * CHUNK_TOKENS)
    little_endian = {'name': 'bytes', 'configuration': {'endian': 'little'}}
    sharding = {
        'chunk_shape': [CHUNK_TOKENS],
        'codecs': [little_endian, {'name': 'crc32c'}],
        'index_codecs': [little_endian, {'name': 'crc32c'}],
    }
    metadata = {
        'shape': [len(tokens)],
        'data_type': tokens.dtype.name,
        'fill_value': 0,
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [per_object]}},
        'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
    }
    # What an interrupted run left there, which no manifest names, makes room.
    array = ts.open(
        {**_array_spec(store, path), 'metadata': metadata}, create=True, delete_existing=True
    ).result()
    array.write(tokens).result()
    return len(tokens)


def split_of(document: str, validation_share: float) -> str:
    """The split of the document with this id, whatever other documents there are."""
    name = document.encode('utf-8', 'surrogateescape')  # what Linux allows in a file's name
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return 'validation' if int.from_bytes(digest, 'big') < validation_share * 2**64 else 'train'


def _documents(file: File, text_field: str) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents of a file, without empty ones, which have nothing to predict.

    Raises ValueError naming the file and the line.
    """
    if file.name.endswith(FILE_KINDS):
        with open(file.path, 'rb') as f:
            content = f.read()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f'{file.path}: {error}: repair or remove it') from error
        if text:
            yield file.name, text
        return
    number = 0
    with (gzip.open if file.name.endswith('.gz') else open)(file.path, 'rb') as f:
        try:
            for number, line in enumerate(f, 1):
                if line.strip() and (text := _record_text(line, text_field)):
                    yield f'{file.name}:{number}', text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f'{file.path} is broken after line {number} ({error}): fetch it again'
            ) from error
        except ValueError as error:  # of UTF-8, of JSON, or of the record
            raise ValueError(f'{file.path}, line {number}: {error}: repair or remove it') from error


def _record_text(line: bytes, text_field: str) -> str:
    record = json.loads(line.decode())
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        raise ValueError(f'no text in a field {text_field!r} (--text_field) of {line[:60]!r}')
    text = record[text_field]
    text.encode()  # refuses half a surrogate pair, which JSON can write and UTF-8 cannot
    return text


def _total(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'bytes')}


def _show_progress(records: list[dict[str, Any]], n_parts: int, started: float) -> None:
    total = _total([shard for record in records for shard in record.values()])
    speed = total['tokens'] / max(time.monotonic() - started, 1e-9) / 1e6
    done = f'{len(records)}/{n_parts} parts, {total["documents"]:,} documents'
    end = '\n' if len(records) == n_parts else '\r'
    text = f'{done}, {total["tokens"]:,} tokens, {speed:.2f}M tokens/s'
    print(text, end=end, file=sys.stderr, flush=True)


def stdlib_corpus(tokenizer: str, validation_share: float = 0.03) -> str:
    """The source of the running Python's standard library as a prepared folder; returns its path.

    Prepared once, in a cache folder: $JAXFORMER_CACHE, else $XDG_CACHE_HOME/jaxformer, else
    ~/.cache/jaxformer. Processes that do it at once do not disturb each other.
    """
    user_cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    cache = os.environ.get('JAXFORMER_CACHE') or os.path.join(user_cache, 'jaxformer')
    key = fingerprint(get_encoding(tokenizer))[:12]
    version = platform.python_version()
    folder = os.path.join(cache, f'stdlib-{version}-{key}-{validation_share:g}-v{VERSION}')
    if os.path.exists(os.path.join(folder, MANIFEST)):
        return folder
    try:
        os.makedirs(cache, exist_ok=True)
        building = tempfile.mkdtemp(prefix='building-', dir=cache)
    except OSError as error:
        raise ValueError(
            f'the cache folder {cache} cannot be written ({error}): set JAXFORMER_CACHE to '
            'one that can'
        ) from error
    try:
        named, skipped = stdlib_files()
        left_out = f', without {skipped} files that are not UTF-8' if skipped else ''
        print(f'preparing the standard library of Python {version} in {folder}{left_out}')
        files = [File(name, path) for name, path in named]
        # Not in `building` itself, which mkdtemp closes to other users of the cache.
        tokens = os.path.join(building, 'tokens')
        prepare(files, Job(tokens, tokenizer, validation_share))
        try:
            os.rename(tokens, folder)
        except OSError:
            # Another process was first. Its folder is complete: it, too, appeared by a rename.
            if not os.path.exists(os.path.join(folder, MANIFEST)):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


# ---------------------------------------------------------------------------------------------
# From token shards to batches
# ---------------------------------------------------------------------------------------------


class Split:
    """The token stream of one split: the shards of the manifest, end to end.

    Attributes: n_tokens, n_documents, n_bytes (of text); tokenizer, a name for `get_encoding`;
    fingerprint, of the vocabulary it was prepared with; end_of_text, an id.
    """

    def __init__(self, path: str, name: str):
        """Opens split `name` ('train' or 'validation') of a prepared folder or tensorstore URL."""
        if name not in SPLITS:
            raise ValueError(f'a split is one of {", ".join(SPLITS)}, not {name!r}')
        self._store = _store(path)
        found = self._store.read(MANIFEST).result()
        if found.state != 'value':
            raise ValueError(
                f'{path} holds no {MANIFEST}, so no prepared data: run python data.py '
                f'--input=... --tokenizer=... --output={path}'
            )
        try:
            manifest = json.loads(found.value)
            version = manifest['version']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}/{MANIFEST} is not a manifest ({error!r}): prepare again'
            ) from (error)
        if version != VERSION:
            raise ValueError(
                f'{path} has format version {version}, this code reads {VERSION}: prepare again'
            )
        split = manifest['splits'][name]
        if not split['tokens']:
            raise ValueError(
                f'{path} has no document in its {name} split at validation_share='
                f'{manifest["validation_share"]}: prepare it again with another share or more text'
            )
        self.n_tokens: int = split['tokens']
        self.n_documents: int = split['documents']
        self.n_bytes: int = split['bytes']
        self.tokenizer: str = manifest['tokenizer']['name']
        self.fingerprint: str = manifest['tokenizer']['fingerprint']
        self.end_of_text: int = manifest['tokenizer']['end_of_text']
        self._paths = [shard['path'] for shard in split['shards']]
        self._starts = np.cumsum([0] + [shard['tokens'] for shard in split['shards']])
        self._context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
        self._arrays: dict[int, ts.Future] = {}

    def encoding(self) -> tiktoken.Encoding:
        """The tokenizer; ValueError if its name now stands for another vocabulary."""
        enc = get_encoding(self.tokenizer)
        if fingerprint(enc) != self.fingerprint:
            raise ValueError(
                f'the data was prepared with another vocabulary than {self.tokenizer} is now: '
                'restore that one, or prepare the data again'
            )
        return enc

    def read(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens start..stop-1 of the stream."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f'[{start}, {stop}) is no range of the {self.n_tokens} tokens')
        return self.read_windows([start], stop - start)[0]

    def read_windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """int32 [len(starts), length]: the tokens from each start on; -1 beyond the last one."""
        out = np.full((len(starts), length), -1, np.int32)
        pieces = []
        for row, origin in enumerate(map(int, starts)):
            start, stop = origin, min(origin + length, self.n_tokens)
            shard = int(np.searchsorted(self._starts, start, 'right')) - 1
            while start < stop:
                first, after = map(int, self._starts[shard : shard + 2])
                end = min(stop, after)
                target = out[row, start - origin : end - origin]
                pieces.append((target, shard, start - first, end - first))
                start, shard = end, shard + 1
        # All arrays open at once, then all reads run at once.
        opened = [self._array(shard) for _, shard, _, _ in pieces]
        reads = [
            future.result()[a:b].read() for future, (_, _, a, b) in zip(opened, pieces, strict=True)
        ]
        for (target, *_), read in zip(pieces, reads, strict=True):
            target[:] = read.result()
        return out

    def _array(self, shard: int) -> ts.Future:
        if shard not in self._arrays:
            # Shards never change, so what is cached need not be asked for again.
            self._arrays[shard] = ts.open(
                _array_spec(self._store, self._paths[shard]),
                context=self._context,
                read=True,
                recheck_cached=False,
            )
        return self._arrays[shard]


class Loader:
    """Training batches: all windows of seq_len + 1 tokens at stride seq_len, in an order that is
    a new seeded permutation each epoch. The last target of a window is the next one's first input;
    up to seq_len - 1 tokens at the end of the stream, which fill no window, are not used."""

    def __init__(self, split: Split, batch_size: int, seq_len: int, seed: int):
        """`batch_size` counts the rows of the global batch, `seq_len` the targets of a row."""
        _check_sizes(batch_size, seq_len)
        if seed < 0:
            raise ValueError(f'the seed of the data order is from 0 up, but is {seed}')
        self.n_windows = (split.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise ValueError(
                f'a window needs seq_len + 1 = {seq_len + 1} tokens, but the split has '
                f'{split.n_tokens}: prepare more text or take a smaller seq_len'
            )
        self.split, self.batch_size, self.seq_len, self.seed = split, batch_size, seq_len, seed

    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """int32 [rows, seq_len + 1]: the given rows of the global batch of this step."""
        sample = step * self.batch_size + np.arange(self.batch_size)[rows]
        epoch, index = np.divmod(sample, self.n_windows)
        window = np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            window[here] = permute(index[here], self.n_windows, self.seed, int(e))
        return self.split.read_windows(window * self.seq_len, self.seq_len + 1)


class EvaluationSet:
    """Consecutive windows in file order, the same at every evaluation. Each token but the first
    is a target once; where rows or tokens run out, the last batch is padded with -1, no token."""

    def __init__(self, split: Split, batch_size: int, seq_len: int, limit: int):
        """At most `limit` batches; 0 takes the whole split."""
        _check_sizes(batch_size, seq_len)
        if limit < 0:
            raise ValueError(f'limit counts batches, 0 for all of them, but is {limit}')
        if split.n_tokens < 2:
            raise ValueError(
                f'the split has {split.n_tokens} token and nothing to predict: prepare more text'
            )
        n_windows = math.ceil((split.n_tokens - 1) / seq_len)
        self.n_batches = math.ceil(n_windows / batch_size)
        if limit:
            self.n_batches = min(self.n_batches, limit)
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len

    def batch_at(self, i: int, rows: slice = slice(None)) -> np.ndarray:
        """int32 [rows, seq_len + 1]: the given rows of batch i < n_batches."""
        if not 0 <= i < self.n_batches:
            raise ValueError(f'there is no batch {i}, the batches are 0 to {self.n_batches - 1}')
        window = i * self.batch_size + np.arange(self.batch_size)[rows]
        batch = self.split.read_windows(window * self.seq_len, self.seq_len + 1)
        # A row that would hold the stream's last token alone has no target.
        batch[batch[:, 1] < 0] = -1
        return batch


def _check_sizes(batch_size: int, seq_len: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise ValueError(
            f'batch_size and seq_len are from 1 up, but are {batch_size} and {seq_len}'
        )


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """int64, shape of `index`: where a permutation of 0..n-1, drawn by seed and epoch, sends it.

    A Feistel network permutes 0..4**half-1, the next power of 4; numbers that land beyond n go
    through it again until they are below, which leaves a permutation of the n.
    """
    half = max(1, math.ceil((n - 1).bit_length() / 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.array(index, np.uint64)
    beyond = np.ones(x.shape, bool)
    while beyond.any():
        left, right = x[beyond] >> np.uint64(half), x[beyond] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        x[beyond] = left << np.uint64(half) | right
        beyond = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, the finalizer of splitmix64: each bit in moves half of the bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def prefetch(fn: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yields fn(start) to fn(stop - 1), computed up to `depth` ahead in a background thread.

    An exception of `fn` is raised where its result would have come. The thread ends with the
    generator, at its end, by an exception, or when it is closed.
    """
    thread = ThreadPoolExecutor(1, 'prefetch')
    pending: deque = deque()
    try:
        for i in range(start, stop):
            pending.append(thread.submit(fn, i))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def _define_flags() -> None:
    flags.DEFINE_list('input', None, f'globs of {", ".join(FILE_KINDS + LINE_KINDS)} files')
    flags.DEFINE_string('tokenizer', None, "a tiktoken name, 'bytes', or a .tiktoken file")
    flags.DEFINE_string('output', None, 'the folder or tensorstore URL to write')
    flags.DEFINE_float('validation_share', 0.01, 'share of the documents kept for validation')
    flags.DEFINE_integer('workers', os.cpu_count(), 'processes')
    flags.DEFINE_string('text_field', 'text', 'the field of a .jsonl record that holds the text')
    flags.mark_flags_as_required(['input', 'tokenizer', 'output'])


def main(_: list[str]) -> None:
    args = flags.FLAGS
    job = Job(args.output, args.tokenizer, args.validation_share, args.text_field)
    manifest = prepare(find_files(args.input), job, args.workers, progress=True)
    for name, split in manifest['splits'].items():
        print(
            f'{args.output}/{name}: {split["documents"]:,} documents, {split["tokens"]:,} tokens, '
            f'{split["bytes"]:,} bytes of text'
        )


if __name__ == '__main__':
    _define_flags()
    app.run(main)
