"""Text to token shards: the parts of the input, tokenized by many processes or machines.

DIR/train/00000 and so on are zarr3 arrays of token ids, one for each part of the input and split.
A part that is written, and has been read back, is committed by a record DIR/parts/00000.json; the
records become DIR/manifest.json, without which DIR does not count as prepared. A run that is
killed therefore leaves whole parts, and the next one writes only the others. The bytes of the
output depend on the input alone: not on the number of workers, nor on interruptions.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts
import tiktoken

from corpus.documents import Bad, Document, Piece, cut_into_parts, documents
from corpus.files import File, retry
from corpus.shards import MANIFEST, SPLITS, VERSION, ArrayWriter, split_of
from storage.stores import open_store
from tokenizer import END_OF_TEXT, fingerprint, get_encoding

PART_BYTES = 32 << 20  # of input in one part, unless a file that cannot be cut is larger


REPORTS = 100  # bad records of a part that the manifest names; the others are only counted


REPORTS_SHOWN = 10  # in a message

# What write_part takes of the project's modules, for Ray's machines.
SHIPPED = (
    'config', 'corpus.documents', 'corpus.files', 'corpus.shards', 'storage.stores', 'tokenizer',
)  # fmt: skip
COUNTS = ('records', 'empty', 'bad', 'lost_bytes')  # of a part, and of the whole input

T = TypeVar('T')

_PART_RECORD = re.compile(rb'\d{5,}\.json')


_ARRAY_FILE = re.compile(rb'(\d{5,})/(zarr\.json|c/\d+)')


@dataclasses.dataclass(frozen=True)
class Job:
    """What every part of a preparation shares."""

    output: str  # a folder or a tensorstore URL
    tokenizer: str
    validation_share: float = 0.01  # of the documents
    text_field: str = 'text'  # of a .jsonl record; the column of a Parquet file
    max_bad_share: float = 0.001  # of the records; above it the job stops


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
    """Tokenizes the files into the token shards and the manifest of `job.output`.

    `ray` is the address of a Ray cluster that does the work in place of `workers` processes.
    Returns the manifest; if a job over the same input has finished there, that is all. Raises
    ValueError if another job has, if there is no text, or if too many records are bad.
    """
    enc = _checked_encoding(job, workers)
    store = open_store(job.output)
    parts = cut_into_parts(files, part_bytes, job.text_field)
    manifest = _empty_manifest(job, enc, parts, part_bytes)
    if (finished := store.read(MANIFEST).result()).state == 'value':
        return _finished(job, store, finished.value, manifest)

    keys = [_part_key(manifest, part) for part in parts]
    done = _committed_parts(store, keys)
    todo = [i for i in range(len(parts)) if i not in done]
    if done and progress:
        print(f'{len(done)} of {len(parts)} parts are there already', file=sys.stderr)
    tasks = [(job, i, keys[i], parts[i]) for i in todo]
    tally = _Tally(job, parts)
    bar = _ProgressBar(tally, done) if progress else None
    with contextlib.closing(_run(tasks, enc, workers, ray)) as results:
        for i in range(len(parts)):
            tally.add(done[i] if i in done else next(results))
            if bar:
                bar.show()
    if not any(record['shards'] for record in tally.records):
        raise ValueError(f'the {len(files)} input files hold no text: check the input')
    for name in SPLITS:
        shards = [record['shards'][name] for record in tally.records if name in record['shards']]
        manifest['splits'][name] = _total(shards) | {'shards': shards}
    reports = [report for record in tally.records for report in record['reports']]
    manifest['input'] |= {**tally.counts, 'reports': reports}
    store.write(MANIFEST, json.dumps(manifest, indent=1).encode() + b'\n').result()
    _remove_leftovers(store, manifest)
    return manifest


def _checked_encoding(job: Job, workers: int) -> tiktoken.Encoding:
    if not 0 <= job.validation_share < 1:
        raise ValueError(f'validation_share lies in [0, 1), but is {job.validation_share}')
    if not 0 <= job.max_bad_share <= 1:
        raise ValueError(f'max_bad_share lies in [0, 1], but is {job.max_bad_share}')
    if workers < 1:
        raise ValueError(f'workers counts processes, from 1 up, but is {workers}')
    enc = get_encoding(job.tokenizer)
    if END_OF_TEXT not in enc.special_tokens_set:
        raise ValueError(
            f'the tokenizer {job.tokenizer} has no {END_OF_TEXT}, which ends each document: add '
            'it to the special tokens of its sidecar, or choose another tokenizer'
        )
    return enc


def _empty_manifest(
    job: Job, enc: tiktoken.Encoding, parts: list[list[Piece]], part_bytes: int
) -> dict[str, Any]:
    """All of the manifest that is known before the first part is read."""
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
            'listing': _digest(listing),  # of names and sizes
            'text_field': job.text_field,
            'part_bytes': part_bytes,
        },
    }


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _dtype(enc: tiktoken.Encoding) -> np.dtype:
    return np.dtype(np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32)


def _finished(
    job: Job, store: ts.KvStore, content: bytes, manifest: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a finished job, which has to be the one that was asked for."""
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
        raise ValueError(
            f'{job.output}/{MANIFEST} is not a manifest ({error!r}): remove it or choose another '
            'output'
        ) from error
    pairs |= {f'the input ({k})': (old.get(k), v) for k, v in manifest['input'].items()}
    differing = [name for name, (was, asked) in pairs.items() if was != asked]
    if differing:
        raise ValueError(
            f'{job.output} is prepared already, with another value of {", ".join(differing)}: '
            'remove it or choose another output'
        )
    _remove_leftovers(store, found)  # of a run that was killed after its last write
    print(
        f'{job.output} is prepared already, from files of the same names and sizes: nothing to do'
    )
    return found


def _part_key(manifest: dict[str, Any], part: list[Piece]) -> str:
    """A digest over all that a part's record and arrays depend on, and its files' versions."""
    shared = [manifest['version'], manifest['tokenizer']['fingerprint']]
    shared += [manifest['validation_share'], manifest['input']['text_field']]
    return _digest([shared, [dataclasses.astuple(piece) for piece in part]])


def _committed_parts(store: ts.KvStore, keys: list[str]) -> dict[int, dict[str, Any]]:
    """The records of the parts that an earlier run of this job has committed, by index."""
    committed = {}
    folder = store / 'parts/'
    names = [name for name in folder.list().result() if _PART_RECORD.fullmatch(name)]
    for name, read in [(name, folder.read(name)) for name in names]:
        record = json.loads(read.result().value)
        index = int(name.removesuffix(b'.json'))
        if index < len(keys) and record.get('key') == keys[index]:
            committed[index] = record
    return committed


def _remove_leftovers(store: ts.KvStore, manifest: dict[str, Any]) -> None:
    """Removes the parts' records, and arrays of interrupted runs that the manifest does not name;
    nothing else, whatever lies there."""
    named = {shard['path'] for name in SPLITS for shard in manifest['splits'][name]['shards']}
    removed = [
        store.write(f'parts/{key.decode()}', None)
        for key in (store / 'parts/').list().result()
        if _PART_RECORD.fullmatch(key)
    ]
    for split in SPLITS:
        for key in (store / f'{split}/').list().result():
            match = _ARRAY_FILE.fullmatch(key)
            if match and f'{split}/{match[1].decode()}' not in named:
                removed.append(store.write(f'{split}/{key.decode()}', None))
    for future in removed:
        future.result()


class _Tally:
    """The parts that are done, in order, and what was read in them."""

    def __init__(self, job: Job, parts: list[list[Piece]]):
        self.records: list[dict[str, Any]] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.tokens = self.documents = self.bytes_read = 0
        self.sizes = [sum(piece.size for piece in part) for part in parts]
        self.bytes_in_all = max(1, sum(self.sizes))
        self._job, self._parts = job, parts

    def add(self, record: dict[str, Any]) -> None:
        """Raises ValueError once so much is bad that the rest cannot make up for it."""
        self.bytes_read += self.sizes[len(self.records)]
        self.records.append(record)
        for name in COUNTS:
            self.counts[name] += record[name]
        for shard in record['shards'].values():
            self.tokens += shard['tokens']
            self.documents += shard['documents']
        limit, bad, lost = self._job.max_bad_share, self.counts['bad'], self.counts['lost_bytes']
        last = len(self.records) == len(self._parts)
        share_read = 1.0 if last else self.bytes_read / self.bytes_in_all
        expected = self.counts['records'] / max(share_read, 1e-9)  # records in the whole input
        if bad > limit * expected or lost > limit * self.bytes_in_all:
            raise ValueError(self._complaint())

    def _complaint(self) -> str:
        lines, named = [], 0
        for record, part in zip(self.records, self._parts, strict=False):
            paths = {piece.file.name: piece.file.path for piece in part}
            for report in record['reports'][: REPORTS_SHOWN - len(lines)]:
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
    """On a terminal a line that is written over; elsewhere a line for each tenth of the job."""

    def __init__(self, tally: _Tally, done: dict[int, Any]):
        self._tally, self._started, self._tenths = tally, time.monotonic(), 0
        # What earlier runs have done is no speed of this one.
        self._bytes_before = sum(tally.sizes[i] for i in done)
        shards = [shard for record in done.values() for shard in record['shards'].values()]
        self._tokens_before = _total(shards)['tokens']

    def show(self) -> None:
        tally = self._tally
        n, n_parts, terminal = len(tally.records), len(tally.sizes), sys.stderr.isatty()
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
    return {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'bytes')}


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def write_part(
    enc: tiktoken.Encoding, job: Job, index: int, key: str, part: list[Piece]
) -> dict[str, Any]:
    """Writes the arrays of one part, reads them back, and commits its record, which it returns."""
    store = open_store(job.output)
    dtype, end = _dtype(enc), enc.eot_token
    arrays = {name: ArrayWriter(store, f'{name}/{index:05d}', dtype, end) for name in SPLITS}
    record = {'key': key, **dict.fromkeys(COUNTS, 0), 'shards': {}, 'reports': []}
    for piece in part:
        for item, ids in _encoded(enc, piece, job.text_field):
            if isinstance(item, Bad):
                record['records'] += item.count
                record['bad'] += item.count
                record['lost_bytes'] += item.lost_bytes
                if len(record['reports']) < REPORTS:
                    record['reports'].append(item._asdict())
                continue
            record['records'] += 1
            if len(ids):
                arrays[split_of(item.id, job.validation_share)].append(ids, item.n_bytes)
            else:
                record['empty'] += 1  # nothing to predict
    for split, array in arrays.items():
        if array.documents:
            record['shards'][split] = array.finish()
    store.write(f'parts/{index:05d}.json', json.dumps(record).encode()).result()
    return record


def _encoded(
    enc: tiktoken.Encoding, piece: Piece, text_field: str
) -> Iterator[tuple[Document | Bad, np.ndarray | None]]:
    """What a piece holds, and the ids of a document's text."""
    items = documents(piece, text_field)
    for item in ahead(items) if '://' in piece.file.path else items:
        if isinstance(item, Bad):
            yield item, None
            continue
        try:
            ids = enc.encode_to_numpy(item.text, disallowed_special=())  # markers in text are text
        except ValueError as error:  # such as a megabyte of spaces, too long for the regex
            reason = f'the tokenizer cannot encode it ({error})'
            yield Bad(piece.file.name, f'document {item.id}', reason), None
        else:
            yield item, ids


def ahead(items: Iterator[T], size: int = 1024) -> Iterator[T]:
    """The items, `size` of them read ahead by a thread, so that the tokenizer, which holds no
    lock of the interpreter, does not wait for the network."""

    def take() -> list[T]:
        return list(itertools.islice(items, size))

    with ThreadPoolExecutor(1, 'ahead') as thread:
        pending = thread.submit(take)
        while batch := pending.result():
            pending = thread.submit(take)
            yield from batch


# ---------------------------------------------------------------------------------------------
# Processes and machines
# ---------------------------------------------------------------------------------------------


def _run(
    tasks: list[tuple], enc: tiktoken.Encoding, workers: int, ray: str | None
) -> Iterator[dict[str, Any]]:
    """The records of the tasks (job, index, key, part), in their order."""
    if ray and tasks:
        yield from _run_on_ray(tasks, enc, ray)
    elif workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield retry(write_part, enc, *task)
    else:
        yield from _run_in_processes(tasks, enc, workers)


def _run_in_processes(
    tasks: list[tuple], enc: tiktoken.Encoding, workers: int
) -> Iterator[dict[str, Any]]:
    # A forked child would inherit the locks of tensorstore's threads without the threads.
    context = multiprocessing.get_context('spawn')
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (enc,))
    try:
        yield from pool.map(_work, tasks)
    except BrokenProcessPool as error:
        raise RuntimeError(
            'a worker was killed, most likely for want of memory: start again with fewer workers; '
            'the parts that are done stay'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, tiktoken.Encoding] = {}  # what a worker process is given once


def _start_worker(enc: tiktoken.Encoding) -> None:
    _worker['encoding'] = enc
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        # Without it a worker outlives a parent that is killed, and writes into the next run's work.
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(task: tuple) -> dict[str, Any]:
    return retry(write_part, _worker['encoding'], *task)


def _run_on_ray(
    tasks: list[tuple], enc: tiktoken.Encoding, address: str
) -> Iterator[dict[str, Any]]:
    """Ships the code and the vocabulary, so the machines need only the packages; `input` and
    `output` have to mean the same on all of them."""
    try:
        import ray
        from ray import cloudpickle
    except ImportError as error:
        raise ImportError('--ray needs Ray: pip install -r requirements/data.txt') from error
    ship_code(cloudpickle)
    started = not ray.is_initialized()
    if started:
        try:
            host, _, port = address.rpartition(':')
            # Ray itself waits for minutes where nobody answers.
            if port.isdigit() and '://' not in address:
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level='warning')
        except (ConnectionError, TimeoutError, socket.gaierror) as error:
            raise ValueError(
                f'no Ray cluster answers at --ray={address} ({error}): start one with `ray start '
                '--head`, or use --ray=local for one on this machine alone'
            ) from error
    try:
        remote = ray.remote(num_cpus=1)(_ray_task)
        shared = ray.put(enc)
        pending = [remote.remote(shared, *_absolute(task)) for task in tasks]
        for reference in pending:
            yield ray.get(reference)
    finally:
        if started:
            ray.shutdown()


def ship_code(cloudpickle: types.ModuleType) -> None:
    """Has functions pickled with their code, where elsewhere they are only named."""
    for name in (__name__, *SHIPPED):
        cloudpickle.register_pickle_by_value(sys.modules[name])


def _ray_task(enc: tiktoken.Encoding, *task: Any) -> dict[str, Any]:
    return retry(write_part, enc, *task)


def _absolute(task: tuple) -> tuple:
    """The task with absolute paths, since Ray's processes have working folders of their own."""

    def absolute(path: str) -> str:
        return path if '://' in path else os.path.abspath(path)

    job, index, key, part = task
    pieces = []
    for piece in part:
        file = dataclasses.replace(piece.file, path=absolute(piece.file.path))
        pieces.append(dataclasses.replace(piece, file=file))
    return dataclasses.replace(job, output=absolute(job.output)), index, key, pieces
