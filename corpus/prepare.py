"""Turns text into token shards, part by part, on many processes or machines.

DIR/train/00000 and so on are zarr3 arrays of token ids, one for each part of the input and split.
A part that is written and has been read back is committed by a file DIR/parts/00000.json. At the
end these become DIR/manifest.json, without which DIR does not count as prepared. A job that is
killed therefore leaves whole parts, and the same job started again writes only the others. The
bytes of the output depend on the input alone: not on the number of workers, nor on interruptions.

A document's split follows from its id (`split_of`). If that leaves a split empty, as it does for
few documents, the part of one document is written again with that document moved, or, if there is
no other document, with its last part held out for validation.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tensorstore as ts
import tiktoken

from config import ConfigError
from corpus.documents import cut_into_parts, documents
from corpus.files import FILE_KINDS, File, ending_of, retry, unpacked
from corpus.hashes import digest_of, document_hash, split_of
from corpus.records import Bad, Binary, Document, Piece
from corpus.shards import (
    MANIFEST,
    SPLITS,
    VERSION,
    ArrayWriter,
    read_manifest,
    write_manifest,
)
from corpus.tally import COUNTS, ProgressBar, Tally, add_bad, total
from corpus.token_documents import tail_size
from corpus.token_documents import tail_start as token_tail
from corpus.token_files import TokenOptions, cut_tokens, is_flat
from corpus.token_import import write_tokens
from corpus.workers import run, start_server
from machine.progress import Progress, interruption
from storage.stores import local_folder, open_store, store_errors
from tokenizer import END_OF_TEXT, encode, end_of_text, fingerprint, get_encoding

PART_BYTES = 32 << 20  # of input in one part, unless a file that cannot be cut is larger

T = TypeVar('T')

_PART_FILE = re.compile(rb'\d{5,}\.json')
_ARRAY_FILE = re.compile(rb'(\d{5,})(/zarr\.json|/c/\d+|\.lengths)')


@dataclasses.dataclass(frozen=True)
class Job:
    """The choices that all parts of a preparation share."""

    output: str  # a folder or a tensorstore URL
    tokenizer: str  # a name that `get_encoding` takes
    validation_share: float = 0.01  # share of the documents
    text_field: str = 'text'  # field of a .jsonl record, or column of a Parquet file
    max_bad_share: float = 0.001  # share of bad records above which the job stops
    tokens: TokenOptions | None = None  # how files of token ids are read; None: files of text


class Move(NamedTuple):
    """A document whose split is another one than that of its id."""

    document: str  # its id
    to: str  # the split
    tail: bool  # True: only the end of the document goes there


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
    _check_output(job.output)
    threads = job.tokens is not None and is_flat(job.tokens)
    if workers > 1 and len(files) > 1 and not (ray or threads):
        start_server()  # it is ready when the files are cut
    store = open_store(job.output)
    silent = 1.0 if progress else math.inf
    if job.tokens:
        parts = cut_tokens(files, job.tokens, part_bytes)
    else:
        with Progress('cutting files into parts', len(files), silent=silent) as cutting:
            parts = cut_into_parts(files, part_bytes, job.text_field, cutting.show)
    manifest = _empty_manifest(job, enc, parts, part_bytes)
    with store_errors(f'{job.output} cannot be read'):
        finished = store.read(MANIFEST).result()
    if finished.state == 'value':
        return _finished(job, store, manifest)

    move = _lone_document(job, files)
    keys = [_part_key(manifest, part, move) for part in parts]
    with store_errors(f'{job.output} cannot be read'):
        done = _committed_parts(store, keys)
    todo = [i for i in range(len(parts)) if i not in done]
    if done and progress:
        print(f'{len(done)} of {len(parts)} parts are there already', file=sys.stderr)
    tasks = [(job, i, keys[i], parts[i], move) for i in todo]
    if ray:
        tasks = [_absolute(*task) for task in tasks]
    tally = Tally(parts, job.max_bad_share)
    with (
        interruption(
            lambda: (
                f'{len(_committed_parts(store, keys))} of {len(parts)} parts are done, and '
                f'stay in {job.output}; give the same command again to go on'
            )
        ),
        contextlib.closing(ProgressBar(tally, done if progress else None)) as bar,
        contextlib.closing(run(_retry_part, enc, tasks, workers, ray, threads)) as results,
    ):
        for i in range(len(parts)):
            tally.add(done[i] if i in done else next(results))
            bar.show()
    if not any(result['shards'] for result in tally.results):
        what = 'tokens' if job.tokens else 'text'
        raise ConfigError(
            tally.complaint(f'no {what} in {len(files):,} input files: check --input')
        )
    move = _fill_empty_split(enc, job, manifest, parts, tally.results, ray, move)
    if move:
        manifest['moved'] = move._asdict()
    for name in SPLITS:
        shards = [result['shards'][name] for result in tally.results if name in result['shards']]
        manifest['splits'][name] = total(shards) | {'shards': shards}
    reports = [report for result in tally.results for report in result['reports']]
    binary = {'binary': dict(sorted(tally.binary.items()))} if tally.binary else {}
    manifest['input'] |= {**tally.counts, **binary, 'reports': reports}
    with store_errors(f'{job.output} cannot be written'):
        write_manifest(store, manifest)
        _remove_leftovers(store, manifest)
    return manifest


def _lone_document(job: Job, files: Sequence[File]) -> Move | None:
    """Returns the move of the only document, if the names of the files tell that there is one."""
    of_many = job.tokens or files[0].kind not in FILE_KINDS
    if job.validation_share and len(files) == 1 and not of_many:
        return Move(unpacked(files[0].name), 'validation', tail=True)
    return None


def _fill_empty_split(
    enc: tiktoken.Encoding,
    job: Job,
    manifest: dict[str, Any],
    parts: list[list[Piece]],
    results: list[dict[str, Any]],
    ray: str | None,
    move: Move | None,
) -> Move | None:
    """Moves a document if a split is empty, and replaces the result of its part.

    Returns the move: the given one if it is done already, None if there is none. Raises ConfigError
    if a split stays empty though there are several documents.
    """

    def empty_splits() -> list[str]:
        return [name for name in SPLITS if not any(name in r['shards'] for r in results)]

    def write_again(i: int, move: Move | None) -> None:
        task = (job, i, _part_key(manifest, parts[i], move), parts[i], move)
        tasks = [_absolute(*task) if ray else task]
        with contextlib.closing(run(_retry_part, enc, tasks, 1, ray)) as written:
            results[i] = next(written)

    if job.validation_share and not move and (empty := empty_splits()):
        for i, result in enumerate(results):
            if 'first' not in result:  # written by an earlier version
                write_again(i, None)
        everything = total([shard for r in results for shard in r['shards'].values()])
        ranked = sorted((*first, i) for i, r in enumerate(results) for first in r['first'])
        # Not the one that holds most of the text, or the other split would be left with scraps.
        small = [first for first in ranked if first[2] <= everything['bytes'] / 2]
        _, document, _, i = (small or ranked)[0]
        alone = everything['documents'] == 1
        move = Move(document, 'validation' if alone else empty[0], alone)
        write_again(i, move)
    documents_in_all = total([s for r in results for s in r['shards'].values()])['documents']
    if job.validation_share and documents_in_all > 1 and (empty := empty_splits()):
        raise ConfigError(
            f'no document of {documents_in_all:,} is left for {empty[0]}: change '
            f'validation_share={job.validation_share}, or use 0 to hold nothing out'
        )
    return None if empty_splits() else move


def _check_output(output: str) -> None:
    """Makes a local output folder. Raises ConfigError if it cannot be written.

    A finished one need not be writable.
    """
    folder = local_folder(output)
    if folder is None or os.path.exists(os.path.join(folder, MANIFEST)):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        problem = '' if os.access(folder, os.W_OK) else 'no permission'
    except OSError as error:
        problem = 'it is a file' if os.path.isfile(folder) else str(error.strerror)
    if problem:
        raise ConfigError(
            f'--output={output} cannot be written ({problem}): choose a folder that can, or that '
            'is not there yet'
        )


def _checked_encoding(job: Job, workers: int) -> tiktoken.Encoding:
    """Checks the job and returns its encoding. Raises ConfigError for what cannot run."""
    if not 0 <= job.validation_share < 1:
        raise ConfigError(
            f'validation_share lies in [0, 1), but is {job.validation_share}: use 0.01, or 0'
        )
    if not 0 <= job.max_bad_share <= 1:
        raise ConfigError(f'max_bad_share lies in [0, 1], but is {job.max_bad_share}: use 0.001')
    if workers < 1:
        raise ConfigError(f'workers counts processes, from 1 up, but is {workers}')
    enc = get_encoding(job.tokenizer)
    if end_of_text(enc) is None:
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
    listing = sorted((f.name, f.size, *(['text'] * f.as_text)) for f in files)
    return {
        'version': 0,  # `write_manifest` knows it
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
            'listing': digest_of(listing),
            'text_field': job.text_field,
            'part_bytes': part_bytes,
            **({'tokens': dataclasses.asdict(job.tokens)} if job.tokens else {}),
        },
    }


def _dtype(enc: tiktoken.Encoding) -> np.dtype:
    """Returns the smaller of the types uint16 and uint32 that holds all ids."""
    return np.dtype(np.uint16 if enc.n_vocab <= 1 << 16 else np.uint32)


def _finished(job: Job, store: ts.KvStore, manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest that a finished job left.

    Raises ConfigError if it is damaged, or not that of the job that was asked for, which `manifest`
    begins.
    """
    found = read_manifest(store, job.output)
    pairs = {
        'the vocabulary': (
            found['tokenizer']['fingerprint'],
            manifest['tokenizer']['fingerprint'],
        ),
        'validation_share': (found['validation_share'], manifest['validation_share']),
    }
    old, new = found.get('input', {}), manifest['input']
    pairs |= {f'the input ({k})': (old.get(k), new.get(k)) for k in [*new, 'tokens']}
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


def _part_key(manifest: dict[str, Any], part: list[Piece], move: Move | None) -> str:
    """Returns a digest over all that a part's arrays depend on, and its files' versions."""
    shared = [VERSION, manifest['tokenizer']['fingerprint']]
    shared += [manifest['validation_share'], manifest['input']['text_field']]
    shared += [manifest['input']['tokens']] if 'tokens' in manifest['input'] else []
    shared += [move] if move else []
    pieces = []
    for piece in part:
        file, *rest = dataclasses.astuple(piece)
        pieces.append([file if piece.file.as_text else file[:-1], *rest])
    return digest_of([shared, pieces])


def _committed_parts(store: ts.KvStore, keys: list[str]) -> dict[int, dict[str, Any]]:
    """Returns the results of the parts that this job committed when it ran before, by index.

    A part whose file is damaged counts as not committed, and is written again.
    """
    committed = {}
    folder = store / 'parts/'
    names = [name for name in folder.list().result() if _PART_FILE.fullmatch(name)]
    for name, read in [(name, folder.read(name)) for name in names]:
        try:
            result = json.loads(read.result().value)
        except ValueError:
            continue
        index = int(name.removesuffix(b'.json'))
        if index < len(keys) and isinstance(result, dict) and result.get('key') == keys[index]:
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


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def write_part(
    enc: tiktoken.Encoding,
    job: Job,
    index: int,
    key: str,
    part: list[Piece],
    move: Move | None = None,
) -> dict[str, Any]:
    """Writes the arrays of one part, reads them back, commits the part and returns its result.

    The result, a JSON object, holds the key, the COUNTS, the shards by split, the `first`
    documents by their hash, as (hash, id, bytes), reports of bad records, and if there are any the
    number of binary files by their ending.
    """
    store = open_store(job.output)
    commit = f'parts/{index:05d}.json'
    with store_errors(f'{job.output} cannot be written'):
        store.write(commit, None).result()  # of another job, over arrays that are now replaced
    dtype, end = _dtype(enc), enc.eot_token
    arrays = {name: ArrayWriter(job.output, f'{name}/{index:05d}', dtype, end) for name in SPLITS}
    result = {'key': key, **dict.fromkeys(COUNTS, 0), 'shards': {}, 'first': [], 'reports': []}
    for piece in part:
        if job.tokens:
            write_tokens(enc, job, piece, move, arrays, result)
            continue
        for item, hashed, texts in _encoded(enc, piece, job, move):
            if isinstance(item, Binary):
                binary = result.setdefault('binary', {})
                binary[ending_of(item.name)] = binary.get(ending_of(item.name), 0) + 1
                continue
            if isinstance(item, Bad):
                add_bad(result, item)
                continue
            result['records'] += 1
            result['empty'] += not texts
            for split, ids, n_bytes in texts:
                arrays[split].append(ids, n_bytes)
            if texts:
                first = result['first']
                if len(first) < 2 or hashed <= first[-1][0]:
                    result['first'] = sorted([*first, (hashed, item.id, item.n_bytes)])[:2]
                if move and item.id == move.document:
                    move = None  # a file and its compressed copy have the same ids
    for split, array in arrays.items():
        if array.documents:
            result['shards'][split] = array.finish()
    with store_errors(f'{job.output} cannot be written'):
        store.write(commit, json.dumps(result).encode()).result()
    return result


def _encoded(
    enc: tiktoken.Encoding, piece: Piece, job: Job, move: Move | None
) -> Iterator[tuple[Document | Bad | Binary, str, list[tuple[str, np.ndarray, int]]]]:
    """Yields the documents, bad records and binary files of a piece.

    With each document come the hash of its id, and the texts that it gives: (split, ids, bytes). An
    empty one gives none.
    """
    items = documents(piece, job.text_field)
    for item in ahead(items) if '://' in piece.file.path else items:
        if not isinstance(item, Document):
            yield item, '', []
            continue
        hashed = document_hash(item.id)
        if move and item.id == move.document:
            texts = _moved(item, job, move)
        else:
            split = split_of(item.id, job.validation_share, hashed)
            texts = [(split, item.text, item.n_bytes)]
        try:
            encoded = [(split, encode(enc, text, n), n) for split, text, n in texts if n]
        except ConfigError as error:
            yield Bad(piece.file.name, f'document {item.id}', str(error)), '', []
        else:
            yield item, hashed, encoded


def _moved(item: Document, job: Job, move: Move) -> list[tuple[str, str, int]]:
    """Returns the (split, text, bytes) of the document that is moved."""
    if not move.tail:
        return [(move.to, item.text, item.n_bytes)]
    cut = tail_start(item.text, job.validation_share)
    texts = [('train', item.text[:cut]), (move.to, item.text[cut:])]
    return [(split, text, len(text.encode())) for split, text in texts]


def tail_start(text: str, share: float) -> int:
    """Returns where the last `share` of a text starts, at a paragraph, a line or a word.

    It is about as long as `token_documents.tail_size` says. A text of one character has no tail:
    its length is returned.
    """
    wanted = token_tail(len(text), share)
    if wanted == len(text):
        return wanted
    size = tail_size(len(text), share)
    for mark in ('\n\n', '\n', ' '):
        start = text.rfind(mark, max(0, wanted - round(size / 2)), wanted)
        if start > 0:
            return start + len(mark)
    return wanted


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


def _absolute(job: Job, index: int, key: str, part: list[Piece], move: Move | None) -> tuple:
    """Returns the task with absolute paths, because Ray's processes have other working folders."""
    pieces = []
    for piece in part:
        file = dataclasses.replace(piece.file, path=_absolute_path(piece.file.path))
        pieces.append(dataclasses.replace(piece, file=file))
    return dataclasses.replace(job, output=_absolute_path(job.output)), index, key, pieces, move


def _absolute_path(path: str) -> str:
    return path if '://' in path else os.path.abspath(path)
