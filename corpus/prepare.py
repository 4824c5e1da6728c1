"""Turns text into token shards, part by part, on many processes or machines.

DIR/train/00000 and so on are zarr3 arrays of token ids, one for each part of the input and split.
A part that is written and has been read back is committed by a file DIR/parts/00000.json. At the
end these become DIR/manifest.json, without which DIR does not count as prepared. A job that is
killed therefore leaves whole parts, and the same job started again writes only the others. The
bytes of the output depend on the input alone: not on the number of workers, nor on interruptions.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts
import tiktoken

from config import ConfigError
from corpus.documents import Bad, Document, Piece, cut_into_parts, documents
from corpus.files import File, retry
from corpus.shards import MANIFEST, SPLITS, VERSION, ArrayWriter, split_of
from corpus.workers import run
from storage.stores import open_store, store_errors
from tokenizer import END_OF_TEXT, fingerprint, get_encoding

PART_BYTES = 32 << 20  # of input in one part, unless a file that cannot be cut is larger
REPORTS = 100  # bad records of one part that the manifest names; the others are only counted
REPORTS_SHOWN = 10  # bad records that an error message names
COUNTS = ('records', 'empty', 'bad', 'lost_bytes')  # counted for each part and the whole input

T = TypeVar('T')

_PART_FILE = re.compile(rb'\d{5,}\.json')
_ARRAY_FILE = re.compile(rb'(\d{5,})/(zarr\.json|c/\d+)')


@dataclasses.dataclass(frozen=True)
class Job:
    """The choices that all parts of a preparation share."""

    output: str  # a folder or a tensorstore URL
    tokenizer: str  # a name that `get_encoding` takes
    validation_share: float = 0.01  # share of the documents
    text_field: str = 'text'  # field of a .jsonl record, or column of a Parquet file
    max_bad_share: float = 0.001  # share of bad records above which the job stops


# ---------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------


def prepare(
    files: Sequence[File],
    job: Job,
    workers: int = 1,
    part_bytes: int = PART_BYTES,
    progress: bool = False,
    ray: str | None = None,
) -> dict[str, Any]:
    """Tokenizes the files into `job.output`, and returns the manifest of its token shards.

    `ray` is the address of a Ray cluster that does the work in place of `workers` processes. If a
    job over the same input has finished in `job.output`, only returns its manifest. Raises
    ConfigError if another job has finished there, if there is no text, or if too many records are
    bad; RemoteError if a remote input fails; OSError or WorkerError if the work cannot go on.
    """
    enc = _checked_encoding(job, workers)
    store = open_store(job.output)
    parts = cut_into_parts(files, part_bytes, job.text_field)
    manifest = _empty_manifest(job, enc, parts, part_bytes)
    with store_errors(f'{job.output} cannot be read'):
        finished = store.read(MANIFEST).result()
    if finished.state == 'value':
        return _finished(job, store, finished.value, manifest)

    keys = [_part_key(manifest, part) for part in parts]
    with store_errors(f'{job.output} cannot be read'):
        done = _committed_parts(store, keys)
    todo = [i for i in range(len(parts)) if i not in done]
    if done and progress:
        print(f'{len(done)} of {len(parts)} parts are there already', file=sys.stderr)
    tasks = [(job, i, keys[i], parts[i]) for i in todo]
    if ray:
        tasks = [_absolute(*task) for task in tasks]
    tally = _Tally(job, parts)
    bar = _ProgressBar(tally, done) if progress else None
    with contextlib.closing(run(_retry_part, enc, tasks, workers, ray)) as results:
        for i in range(len(parts)):
            tally.add(done[i] if i in done else next(results))
            if bar:
                bar.show()
    if not any(result['shards'] for result in tally.results):
        raise ConfigError(f'the {len(files)} input files hold no text: check the input')
    for name in SPLITS:
        shards = [result['shards'][name] for result in tally.results if name in result['shards']]
        manifest['splits'][name] = _total(shards) | {'shards': shards}
    reports = [report for result in tally.results for report in result['reports']]
    manifest['input'] |= {**tally.counts, 'reports': reports}
    with store_errors(f'{job.output} cannot be written'):
        store.write(MANIFEST, json.dumps(manifest, indent=1).encode() + b'\n').result()
        _remove_leftovers(store, manifest)
    return manifest


def _checked_encoding(job: Job, workers: int) -> tiktoken.Encoding:
    """Checks the job and returns its encoding. Raises ConfigError for what cannot run."""
    if not 0 <= job.validation_share < 1:
        raise ConfigError(f'validation_share lies in [0, 1), but is {job.validation_share}')
    if not 0 <= job.max_bad_share <= 1:
        raise ConfigError(f'max_bad_share lies in [0, 1], but is {job.max_bad_share}')
    if workers < 1:
        raise ConfigError(f'workers counts processes, from 1 up, but is {workers}')
    enc = get_encoding(job.tokenizer)
    if END_OF_TEXT not in enc.special_tokens_set:
        raise ConfigError(
            f'the tokenizer {job.tokenizer} has no {END_OF_TEXT}, which ends each document: add '
            'it to the special tokens of its sidecar, or choose another tokenizer'
        )
    return enc


def _empty_manifest(
    job: Job, enc: tiktoken.Encoding, parts: list[list[Piece]], part_bytes: int
) -> dict[str, Any]:
    """Returns the manifest without its splits and counts, which reading the parts will tell."""
    files = {piece.file for part in parts for piece in part}
    listing = sorted((file.name, file.size) for file in files)
    return {
        'version': VERSION,
        'tokenizer': {
            'name': job.tokenizer,
            'fingerprint': fingerprint(enc),
            'n_vocab': enc.n_vocab,
            'end_of_text': enc.eot_token,
        },
        'dtype': _dtype(enc).name,
        'validation_share': job.validation_share,
        'splits': {},
        'input': {
            'files': len(files),
            'bytes': sum(file.size or 0 for file in files),
            'listing': _digest(listing),
            'text_field': job.text_field,
            'part_bytes': part_bytes,
        },
    }


def _digest(value: Any) -> str:
    """Returns 32 hex digits over a value that JSON can express."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _dtype(enc: tiktoken.Encoding) -> np.dtype:
    """Returns the smaller of the types uint16 and uint32 that holds all ids."""
    return np.dtype(np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32)


def _finished(
    job: Job, store: ts.KvStore, content: bytes, manifest: dict[str, Any]
) -> dict[str, Any]:
    """Returns the manifest that a finished job left.

    Raises ConfigError if it is not that of the job that was asked for, which `manifest` begins.
    """
    try:
        found = json.loads(content)
        pairs = {
            'the vocabulary': (
                found['tokenizer']['fingerprint'],
                manifest['tokenizer']['fingerprint'],
            ),
            'validation_share': (found['validation_share'], manifest['validation_share']),
        }
        old = found.get('input', {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{job.output}/{MANIFEST} is not a manifest ({error!r}): remove it or choose another '
            'output'
        ) from error
    pairs |= {f'the input ({k})': (old.get(k), v) for k, v in manifest['input'].items()}
    differing = [name for name, (was, asked) in pairs.items() if was != asked]
    if differing:
        raise ConfigError(
            f'{job.output} is prepared already, with another value of {", ".join(differing)}: '
            'remove it or choose another output'
        )
    _remove_leftovers(store, found)  # of a job that was killed after it wrote the manifest
    print(
        f'{job.output} is prepared already, from files of the same names and sizes: nothing to do'
    )
    return found


def _part_key(manifest: dict[str, Any], part: list[Piece]) -> str:
    """Returns a digest over all that a part's arrays depend on, and its files' versions."""
    shared = [manifest['version'], manifest['tokenizer']['fingerprint']]
    shared += [manifest['validation_share'], manifest['input']['text_field']]
    return _digest([shared, [dataclasses.astuple(piece) for piece in part]])


def _committed_parts(store: ts.KvStore, keys: list[str]) -> dict[int, dict[str, Any]]:
    """Returns the results of the parts that this job committed when it ran before, by index."""
    committed = {}
    folder = store / 'parts/'
    names = [name for name in folder.list().result() if _PART_FILE.fullmatch(name)]
    for name, read in [(name, folder.read(name)) for name in names]:
        result = json.loads(read.result().value)
        index = int(name.removesuffix(b'.json'))
        if index < len(keys) and result.get('key') == keys[index]:
            committed[index] = result
    return committed


def _remove_leftovers(store: ts.KvStore, manifest: dict[str, Any]) -> None:
    """Removes the files in parts/, and the arrays that the manifest does not name.

    Such arrays come from jobs that were interrupted. Other files are left as they are.
    """
    named = {shard['path'] for name in SPLITS for shard in manifest['splits'][name]['shards']}
    removed = [
        store.write(f'parts/{key.decode()}', None)
        for key in (store / 'parts/').list().result()
        if _PART_FILE.fullmatch(key)
    ]
    for split in SPLITS:
        for key in (store / f'{split}/').list().result():
            match = _ARRAY_FILE.fullmatch(key)
            if match and f'{split}/{match[1].decode()}' not in named:
                removed.append(store.write(f'{split}/{key.decode()}', None))
    for future in removed:
        future.result()


class _Tally:
    """The results of the finished parts, in order, and their totals."""

    def __init__(self, job: Job, parts: list[list[Piece]]):
        self.results: list[dict[str, Any]] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.tokens = self.documents = self.bytes_read = 0
        self.sizes = [sum(piece.size for piece in part) for part in parts]
        self.bytes_in_all = max(1, sum(self.sizes))
        self._job, self._parts = job, parts

    def add(self, result: dict[str, Any]) -> None:
        """Adds the result of the next part.

        Raises ConfigError when so many records are bad that the rest cannot bring their share down
        to the limit.
        """
        self.bytes_read += self.sizes[len(self.results)]
        self.results.append(result)
        for name in COUNTS:
            self.counts[name] += result[name]
        for shard in result['shards'].values():
            self.tokens += shard['tokens']
            self.documents += shard['documents']
        limit, bad, lost = self._job.max_bad_share, self.counts['bad'], self.counts['lost_bytes']
        last = len(self.results) == len(self._parts)
        share_read = 1.0 if last else self.bytes_read / self.bytes_in_all
        expected = self.counts['records'] / max(share_read, 1e-9)  # records in the whole input
        if bad > limit * expected or lost > limit * self.bytes_in_all:
            raise ConfigError(self._complaint())

    def _complaint(self) -> str:
        """Returns the message that too many records are bad, which names the first ones."""
        lines, named = [], 0
        for result, part in zip(self.results, self._parts, strict=False):
            paths = {piece.file.name: piece.file.path for piece in part}
            for report in result['reports'][: REPORTS_SHOWN - len(lines)]:
                lines.append(Bad(**report).message(paths[report['file']]))
                named += report['count']
        if named < self.counts['bad']:
            lines.append(f'and {self.counts["bad"] - named:,} more')
        return (
            f'{self.counts["bad"]:,} of {self.counts["records"]:,} records are bad, and '
            f'{self.counts["lost_bytes"]:,} bytes of unknown records, more than '
            f'max_bad_share={self._job.max_bad_share}: repair the input or raise the share\n  '
            + '\n  '.join(lines)
        )


class _ProgressBar:
    """The progress of a job: one line, rewritten, on a terminal; elsewhere a line per tenth."""

    def __init__(self, tally: _Tally, done: dict[int, Any]):
        """`done` are the results of parts that were there before, which the speed leaves out."""
        self._tally, self._started, self._tenths = tally, time.monotonic(), 0
        self._bytes_before = sum(tally.sizes[i] for i in done)
        shards = [shard for result in done.values() for shard in result['shards'].values()]
        self._tokens_before = _total(shards)['tokens']

    def show(self) -> None:
        """Writes the present state to stderr."""
        tally = self._tally
        n, n_parts, terminal = len(tally.results), len(tally.sizes), sys.stderr.isatty()
        share = 1.0 if n == n_parts else tally.bytes_read / tally.bytes_in_all
        if not terminal and int(share * 10) <= self._tenths:
            return
        self._tenths = int(share * 10)
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = max(0, tally.tokens - self._tokens_before) / seconds
        read = max(1, tally.bytes_read - self._bytes_before)
        left = round((tally.bytes_in_all - tally.bytes_read) / read * seconds)
        line = (
            f'[{"#" * int(20 * share):20}] {share:4.0%}  {n}/{n_parts} parts  '
            f'{tally.documents:,} documents  {tally.tokens:,} tokens  '
            f'{speed / 1e6:.2f}M tokens/s  '
            f'ETA {left // 3600}:{left // 60 % 60:02}:{left % 60:02}'
        )
        end = '\r' if terminal and n < n_parts else '\n'
        print(line, end=end, file=sys.stderr, flush=True)


def _total(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the shards' tokens, documents and bytes of text in all."""
    return {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'bytes')}


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def write_part(
    enc: tiktoken.Encoding, job: Job, index: int, key: str, part: list[Piece]
) -> dict[str, Any]:
    """Writes the arrays of one part, reads them back, commits the part and returns its result.

    The result, a JSON object, holds the key, the COUNTS, the shards by split, and reports of bad
    records.
    """
    store = open_store(job.output)
    dtype, end = _dtype(enc), enc.eot_token
    arrays = {name: ArrayWriter(job.output, f'{name}/{index:05d}', dtype, end) for name in SPLITS}
    result = {'key': key, **dict.fromkeys(COUNTS, 0), 'shards': {}, 'reports': []}
    for piece in part:
        for item, ids in _encoded(enc, piece, job.text_field):
            if isinstance(item, Bad):
                result['records'] += item.count
                result['bad'] += item.count
                result['lost_bytes'] += item.lost_bytes
                if len(result['reports']) < REPORTS:
                    result['reports'].append(item._asdict())
                continue
            result['records'] += 1
            if len(ids):
                arrays[split_of(item.id, job.validation_share)].append(ids, item.n_bytes)
            else:
                result['empty'] += 1  # nothing to predict
    for split, array in arrays.items():
        if array.documents:
            result['shards'][split] = array.finish()
    with store_errors(f'{job.output} cannot be written'):
        store.write(f'parts/{index:05d}.json', json.dumps(result).encode()).result()
    return result


def _encoded(
    enc: tiktoken.Encoding, piece: Piece, text_field: str
) -> Iterator[tuple[Document | Bad, np.ndarray | None]]:
    """Yields the documents of a piece with the ids of their text, and its bad records with None."""
    items = documents(piece, text_field)
    for item in ahead(items) if '://' in piece.file.path else items:
        if isinstance(item, Bad):
            yield item, None
            continue
        try:
            # With nothing disallowed, '<|endoftext|>' in a text is encoded as ordinary text.
            ids = enc.encode_to_numpy(item.text, disallowed_special=())
        except ValueError as error:  # a megabyte of spaces, for example, is too long for the regex
            reason = f'the tokenizer cannot encode it ({error})'
            yield Bad(piece.file.name, f'document {item.id}', reason), None
        else:
            yield item, ids


def ahead(items: Iterator[T], size: int = 1024) -> Iterator[T]:
    """Yields the items, of which a thread reads `size` ahead.

    The tokenizer, which releases the interpreter's lock, then does not wait for the network.
    """

    def take() -> list[T]:
        return list(itertools.islice(items, size))

    with ThreadPoolExecutor(1, 'ahead') as thread:
        pending = thread.submit(take)
        while batch := pending.result():
            pending = thread.submit(take)
            yield from batch


def _retry_part(enc: tiktoken.Encoding, *task: Any) -> dict[str, Any]:
    """Calls `write_part`, again if a remote input fails."""
    return retry(write_part, enc, *task)


def _absolute(job: Job, index: int, key: str, part: list[Piece]) -> tuple:
    """Returns the task with absolute paths, because Ray's processes have other working folders."""
    pieces = []
    for piece in part:
        file = dataclasses.replace(piece.file, path=_absolute_path(piece.file.path))
        pieces.append(dataclasses.replace(piece, file=file))
    return dataclasses.replace(job, output=_absolute_path(job.output)), index, key, pieces


def _absolute_path(path: str) -> str:
    return path if '://' in path else os.path.abspath(path)
