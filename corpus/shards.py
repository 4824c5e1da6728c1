"""Token shards: zarr3 arrays of token ids and the manifest that lists them.

Each array DIR/train/00000 and so on holds the documents of one part of the input, one after the
other, each followed by the end-of-text token, and DIR/train/00000.lengths the documents' lengths
(corpus/lengths.py). DIR is a local folder or a tensorstore URL. Each chunk has a crc32c checksum,
which is checked as it is read. The manifest holds a digest of each shard, which inspection checks,
others of the checksums in it, which are checked when it is opened, and a digest of itself.
"""

import hashlib
import json
import math
import re
import sys
from array import array as compact_array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
import tiktoken

from config import ConfigError
from corpus.lengths import found_lengths, read_lengths, write_lengths
from storage.stores import expanded, local_folder, open_store, store_errors
from tokenizer import fingerprint, get_encoding

VERSION = 1  # of the arrays
MANIFEST_VERSION = 2  # version 1 has no digest
MANIFEST = 'manifest.json'
# Digests in a shard's entry: over the crc32c of each file's last chunk, compared when the shard is
# opened, and of all its chunks, compared before its first read unless it lies in a bucket, of which
# that is too much to ask.
CHECKSUMS = ('ends', 'checksums')
CRC_BYTES = 4  # of the crc32c behind the tokens of a chunk
SPLITS = ('train', 'validation')

CHUNK_TOKENS = 1 << 15  # tokens that the smallest read fetches and checks
OBJECT_TOKENS = 1 << 24  # tokens in one file or object of an array, a multiple of CHUNK_TOKENS
CACHE_BYTES = 256 << 20  # decoded chunks that a split keeps in memory
OPENED_AT_ONCE = 512  # shards compared when a split is opened; the others when first read

_TOTALS = ('tokens', 'documents', 'bytes')  # of a shard, and in all of a split


def array_spec(store: ts.KvStore, path: str) -> dict[str, Any]:
    """Returns the tensorstore spec of the token array at `path`."""
    return {
        'driver': 'zarr3',
        'kvstore': (store / f'{path}/').spec().to_json(),
        # By default zarr leaves out chunks that hold only the fill value, so that a lost chunk
        # would read as token 0. Here every chunk is written, and a missing one is an error.
        'store_data_equal_to_fill_value': True,
        'fill_missing_data_reads': False,
    }


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


class UnreadableError(OSError):
    """Tokens cannot be read, by this process at least; the message names the data and a remedy."""


class ArrayWriter:
    """A zarr3 array of tokens that grows by documents.

    It is written object by object, so that at most OBJECT_TOKENS are held in memory.
    """

    def __init__(self, folder: str, path: str, dtype: np.dtype, end_of_text: int):
        """Starts the array at `path` below `folder`, a local one or a tensorstore URL."""
        self.documents = self._bytes = 0
        self._store, self._path, self._dtype = open_store(folder), path, dtype
        self._name = f'{folder}/{path}'
        self._end = np.array([end_of_text], dtype)
        self._waiting = np.empty(OBJECT_TOKENS, dtype)
        self._n_waiting = self._n_written = 0
        self._lengths = compact_array('I')  # of the documents
        self._array: ts.TensorStore | None = None
        self._hash = hashlib.blake2b(digest_size=16)

    def append(self, ids: np.ndarray, n_bytes: int) -> None:
        """Adds a document: its ids, and the number of bytes of its text.

        Raises ConfigError if an object cannot be written, OSError if it reads back otherwise.
        """
        start, stop = self._n_waiting, self._n_waiting + len(ids)
        if stop < OBJECT_TOKENS - 1:  # most documents
            self._waiting[start:stop] = ids
            self._waiting[stop] = self._end[0]
            self._n_waiting = stop + 1
        else:
            self._put(ids)
            self._put(self._end)
        self._lengths.append(len(ids) + 1)
        self.documents += 1
        self._bytes += n_bytes

    def append_ended(self, ids: np.ndarray, lengths: np.ndarray, n_bytes: int) -> None:
        """Adds documents of these lengths, which have their end-of-text tokens already.

        Raises as `append`, OverflowError for a document of 2**32 tokens.
        """
        if len(lengths) and lengths.max() > np.iinfo(np.uintc).max:
            raise OverflowError(f'a document of {lengths.max():,} tokens is too long')
        self._put(ids)
        self._lengths.frombytes(lengths.astype(np.uintc).tobytes())
        self.documents += len(lengths)
        self._bytes += n_bytes

    def _put(self, ids: np.ndarray) -> None:
        """Adds ids, and writes an object whenever one is full."""
        while len(ids):
            start = self._n_waiting
            taken = ids[: OBJECT_TOKENS - start]
            self._waiting[start : start + len(taken)] = taken
            self._n_waiting += len(taken)
            ids = ids[len(taken) :]
            if self._n_waiting == OBJECT_TOKENS:
                self._flush()

    def finish(self) -> dict[str, Any]:
        """Writes the rest and returns the shard's entry of the manifest. Raises as `append`."""
        if self._n_waiting:
            self._flush()
        with store_errors(f'{self._name} cannot be written and read back'):
            lengths = write_lengths(self._store, self._path, self._lengths)
        return {
            'path': self._path,
            'tokens': self._n_written,
            'documents': self.documents,
            'bytes': self._bytes,
            'digest': self._hash.hexdigest(),
            'lengths': lengths,
            **self._checksums(),
        }

    def _checksums(self) -> dict[str, str]:
        """Returns the digests by which `Split` knows the array when it opens it."""
        with store_errors(f'{self._name} cannot be read back'):
            return {
                name: checksums_of(read_checksums(self._store, self._path, self._array, name))
                for name in CHECKSUMS
            }

    def _flush(self) -> None:
        """Writes the waiting tokens as an object, reads them back from the store and compares."""
        tokens = self._waiting[: self._n_waiting]
        start, stop = self._n_written, self._n_written + len(tokens)
        with store_errors(f'{self._name} cannot be written and read back'):
            if self._array is None:
                self._array = self._create(len(tokens))
            elif stop > self._array.shape[0]:
                self._array = self._array.resize(
                    exclusive_max=[stop], resize_metadata_only=True
                ).result()
            writing = self._array[start:stop].write(tokens)
            # Without waiting for the disk; if the write fails, nobody asks for the digest.
            self._hash.update(tokens.astype(tokens.dtype.newbyteorder('<'), copy=False))
            writing.result()
            written = ts.open(array_spec(self._store, self._path), read=True).result()
            same = np.array_equal(written[start:stop].read().result(), tokens)
        if not same:
            raise OSError(
                f'{self._name} reads back otherwise than it was written: check the storage and '
                'start again'
            )
        self._n_written, self._n_waiting = stop, 0

    def _create(self, length: int) -> ts.TensorStore:
        """Creates the array with `length` tokens; `resize` makes room for more."""
        per_object = min(OBJECT_TOKENS, math.ceil(length / CHUNK_TOKENS) * CHUNK_TOKENS)
        little_endian = {'name': 'bytes', 'configuration': {'endian': 'little'}}
        sharding = {
            'chunk_shape': [CHUNK_TOKENS],
            'codecs': [little_endian, {'name': 'crc32c'}],
            'index_codecs': [little_endian, {'name': 'crc32c'}],
        }
        metadata = {
            'shape': [length],
            'data_type': self._dtype.name,
            'fill_value': 0,
            'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [per_object]}},
            'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
        }
        # Replaces what an interrupted job left there, which no record names.
        spec = {**array_spec(self._store, self._path), 'metadata': metadata}
        return ts.open(spec, create=True, delete_existing=True).result()


def read_blocks(store: ts.KvStore, path: str) -> Iterator[np.ndarray]:
    """Yields the token ids of an array, OBJECT_TOKENS at a time, in the type they are stored in."""
    array = ts.open(array_spec(store, path), read=True).result()
    n = array.shape[0]
    for start in range(0, n, OBJECT_TOKENS):
        yield array[start : min(start + OBJECT_TOKENS, n)].read().result()


def read_checksums(
    store: ts.KvStore, path: str, array: ts.TensorStore, which: str
) -> dict[str, list[ts.Future[ts.KvStore.ReadResult]]]:
    """Starts to read the crc32c that stands behind chunks of an array, by file.

    `which` is one of CHECKSUMS. Behind the last chunk of a file its index is read, too.
    """
    per_file = array.chunk_layout.write_chunk.shape[0]
    per_chunk = array.chunk_layout.read_chunk.shape[0]
    nbytes = per_chunk * array.dtype.numpy_dtype.itemsize + CRC_BYTES
    reads = {}
    for i, start in enumerate(range(0, array.shape[0], per_file)):
        n = math.ceil(min(per_file, array.shape[0] - start) / per_chunk)
        chunks = range(1, n) if which == 'checksums' else ()
        places = [slice(k * nbytes - CRC_BYTES, k * nbytes) for k in chunks]
        places.append(slice(n * nbytes - CRC_BYTES, None))
        file = f'{path}/c/{i}'
        reads[file] = [store.read(file, byte_range=place) for place in places]
    return reads


def checksums_of(reads: dict[str, list[ts.Future[ts.KvStore.ReadResult]]]) -> str:
    """Returns 32 hex digits over what `read_checksums` has read. Raises OSError for a lost file."""
    digest = hashlib.blake2b(digest_size=16)
    for file, results in reads.items():
        for read in results:
            if read.result().state != 'value':
                raise OSError(f'{file} is missing')
            digest.update(read.result().value)
    return digest.hexdigest()


def check_array(array: ts.TensorStore, entry: dict[str, Any], dtype: str) -> None:
    """Raises ValueError if an array has another shape or type than the manifest's entry says."""
    if (list(array.shape), array.dtype.name) != ([entry['tokens']], dtype):
        raise ValueError(
            f'{entry["path"]} holds {array.dtype.name} {list(array.shape)}, the manifest says '
            f'{dtype} {[entry["tokens"]]}'
        )


def digest_of(blocks: Iterable[np.ndarray]) -> str:
    """Returns 32 hex digits over token ids. They do not depend on the cut into blocks."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in blocks:
        digest.update(tokens.astype(tokens.dtype.newbyteorder('<'), copy=False))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Returns the sha256 of a manifest's content but for its digest, in hexadecimal."""
    content = {name: value for name, value in manifest.items() if name != 'digest'}
    text = json.dumps(content, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(store: ts.KvStore, manifest: dict[str, Any]) -> None:
    """Adds version and digest to a manifest, and writes it, with which `store` counts as prepared.

    Errors are tensorstore's.
    """
    manifest['version'] = MANIFEST_VERSION
    manifest['digest'] = manifest_digest(manifest)
    store.write(MANIFEST, json.dumps(manifest, indent=1).encode() + b'\n').result()


def read_manifest(store: ts.KvStore, path: str) -> dict[str, Any]:
    """Returns the manifest of the prepared data in `store`, which `path` names in messages.

    Raises ConfigError if there is none, or one that is damaged or that this code cannot read.
    """
    with store_errors(f'{path}/{MANIFEST} cannot be read'):
        found = store.read(MANIFEST).result()
    if found.state != 'value':
        raise ConfigError(
            f'{path} holds no {MANIFEST}, so no prepared data: run python data.py '
            f'--input=... --tokenizer=... --output={path}'
        )
    try:
        manifest = json.loads(found.value)
        version = manifest['version']
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{path}/{MANIFEST} is not a manifest ({error!r}): prepare again'
        ) from error
    if type(version) is not int or version not in (1, MANIFEST_VERSION):
        raise ConfigError(
            f'{path} has format version {version}, this code reads {MANIFEST_VERSION}: '
            'prepare again'
        )
    has_digest = version > 1 or 'digest' in manifest
    if has_digest and manifest.get('digest') != manifest_digest(manifest):
        raise ConfigError(
            f'{path}/{MANIFEST} is damaged, or was edited: its content has another digest; copy it '
            'from where the data was prepared, or prepare again'
        )
    try:
        _check_fields(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{path}/{MANIFEST} is damaged ({error!r}): prepare again') from error
    return manifest


def _check_fields(manifest: dict[str, Any]) -> None:
    """Raises an error if a manifest lacks a field, or has one that cannot be right.

    Manifests with a digest pass, but older ones have none, and anybody can write one.
    """
    tokenizer = manifest['tokenizer']
    n_vocab, end = tokenizer['n_vocab'], tokenizer['end_of_text']
    if not (type(n_vocab) is type(end) is int and 0 <= end < n_vocab <= 1 << 32):
        raise ValueError(f'n_vocab={n_vocab} and end_of_text={end} are no vocabulary')
    if not all(type(tokenizer[key]) is str for key in ('name', 'fingerprint')):
        raise ValueError(f'{tokenizer} names no vocabulary')
    if manifest['dtype'] not in ('uint16', 'uint32'):
        raise ValueError(f'dtype={manifest["dtype"]}')
    if manifest['splits'].keys() != {*SPLITS}:
        raise ValueError(f'the splits are not {", ".join(SPLITS)}')
    if not 0 <= manifest['validation_share'] < 1:
        raise ValueError(f'validation_share={manifest["validation_share"]}')
    for name, split in manifest['splits'].items():
        _check_split(split, name)


def _check_split(split: dict[str, Any], name: str) -> None:
    """Raises an error if the counts of a split in the manifest cannot be those of its shards."""
    shards = split['shards']
    for shard in shards:
        if not re.fullmatch(name + r'/\d{5,}', shard['path']):
            raise ValueError(f'{shard["path"]} is no shard of {name}')
        counts = [shard[key] for key in _TOTALS]
        if not all(type(n) is int for n in counts) or not counts[0] >= counts[1] > 0 <= counts[2]:
            raise ValueError(f'{shard["path"]} cannot have {counts} {", ".join(_TOTALS)}')
    paths = [shard['path'] for shard in shards]
    if paths != sorted(set(paths), key=lambda path: int(path.partition('/')[2])):
        raise ValueError(f'the shards of {name} are not in order')
    for key in _TOTALS:
        if (in_all := sum(shard[key] for shard in shards)) != split[key]:
            raise ValueError(f'{name} has {split[key]} {key}, but its shards have {in_all}')


class Split:
    """The token stream of one split: the shards of the manifest, end to end.

    Attributes: name; n_tokens, n_documents, n_bytes (of text); tokenizer, a name that
    `get_encoding` takes; fingerprint of the vocabulary the data was prepared with; end_of_text, the
    id that ends each document; digest of the manifest, which covers counts and checksums of all
    shards.
    """

    def __init__(self, path: str, name: str, cache_bytes: int = CACHE_BYTES):
        """Opens split `name` ('train' or 'validation') of a prepared folder or tensorstore URL.

        Keeps at most `cache_bytes` of it in memory. Raises ConfigError if there is no such data, or
        the arrays are not those of the manifest.
        """
        if name not in SPLITS:
            raise ValueError(f'a split is one of {", ".join(SPLITS)}, not {name!r}')
        self._path, self._store = expanded(path), open_store(path)
        manifest = read_manifest(self._store, self._path)
        split = manifest['splits'][name]
        if not split['tokens']:
            raise ConfigError(
                f'{path} has no document in its {name} split at validation_share='
                f'{manifest["validation_share"]}: prepare it again with another share or more text'
            )
        self.name = name
        self.n_tokens: int = split['tokens']
        self.n_documents: int = split['documents']
        self.n_bytes: int = split['bytes']
        self.tokenizer: str = manifest['tokenizer']['name']
        self.fingerprint: str = manifest['tokenizer']['fingerprint']
        self.end_of_text: int = manifest['tokenizer']['end_of_text']
        self.digest = manifest_digest(manifest)
        self._dtype: str = manifest['dtype']
        self._shards = split['shards']
        self._starts = np.cumsum([0] + [shard['tokens'] for shard in self._shards])
        self._context = ts.Context({'cache_pool': {'total_bytes_limit': cache_bytes}})
        self._arrays: dict[int, ts.TensorStore] = {}
        self._to_compare = set(range(len(self._shards))) if local_folder(path) else set()
        first = np.linspace(0, len(self._shards) - 1, OPENED_AT_ONCE).astype(int)
        try:
            self._open(set(first.tolist()))
        except (OSError, ValueError) as error:
            raise ConfigError(self._unreadable(error)) from error

    def encoding(self) -> tiktoken.Encoding:
        """Returns the tokenizer. Raises ConfigError if its name now means another vocabulary."""
        enc = get_encoding(self.tokenizer)
        if fingerprint(enc) != self.fingerprint:
            raise ConfigError(
                f'the data was prepared with another vocabulary than {self.tokenizer} is now: '
                'restore that one, or prepare the data again'
            )
        return enc

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start..stop-1 of the stream, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f'[{start}, {stop}) is no range of the {self.n_tokens} tokens')
        return self.read_windows([start], stop - start)[0]

    def read_windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Returns `length` tokens from each start on, int32 [len(starts), length].

        Beyond the last token of the stream the rows hold -1. Raises OSError if a shard cannot be
        read, or is damaged.
        """
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
        try:
            self._open({shard for _, shard, _, _ in pieces})
            self._compare({shard for _, shard, _, _ in pieces} & self._to_compare, 'checksums')
            reads = [self._arrays[shard][a:b].read() for _, shard, a, b in pieces]
            for (target, *_), read in zip(pieces, reads, strict=True):
                target[:] = read.result()
        except (OSError, ValueError) as error:  # of one process alone: no ConfigError
            raise UnreadableError(self._unreadable(error)) from error
        return out

    def document_lengths(self) -> np.ndarray:
        """Returns the tokens of each document, its end-of-text token included: int64, in order.

        They stand beside the shards; shards of older preparations are read for them once, which is
        said. Raises ConfigError if they cannot be read.
        """
        old = sum('lengths' not in shard for shard in self._shards)
        if old:
            print(
                f'{self._path} has no lengths of documents for {old:,} shards, which are read for '
                'them; prepare the data again, into another folder, for a faster start',
                file=sys.stderr,
            )
        found = []
        try:
            for shard in self._shards:
                if 'lengths' in shard:
                    found.append(read_lengths(self._store, shard))
                    continue
                blocks = read_blocks(self._store, shard['path'])
                found.append(found_lengths(blocks, self.end_of_text))
        except (OSError, ValueError) as error:
            raise ConfigError(self._unreadable(error)) from error
        return np.concatenate(found)

    def _unreadable(self, error: Exception) -> str:
        """Returns the message that something of the data cannot be read."""
        return (
            f'{self._path} cannot be read (python data.py --inspect={self._path} names what is '
            f'damaged): {error}'
        )

    def _open(self, shards: set[int]) -> None:
        """Opens those of the shards that are not open, side by side, and checks them.

        Raises ValueError or OSError if an array is not the one that the manifest is about.
        """
        new = sorted(shards - self._arrays.keys())
        entries = [self._shards[i] for i in new]
        # Shards never change, so cached chunks are not checked against the store again.
        options = {'context': self._context, 'read': True, 'recheck_cached': False}
        opened = [ts.open(array_spec(self._store, e['path']), **options) for e in entries]
        arrays = [array.result() for array in opened]
        for array, entry in zip(arrays, entries, strict=True):
            check_array(array, entry, self._dtype)
        self._arrays.update(zip(new, arrays, strict=True))
        self._compare(set(new), 'ends')

    def _compare(self, shards: set[int], which: str) -> None:
        """Compares checksums of opened shards with the manifest.

        Raises ValueError or OSError if a shard is not the one that the manifest is about.
        """
        reads = {
            i: read_checksums(self._store, self._shards[i]['path'], self._arrays[i], which)
            for i in sorted(shards)
            if which in self._shards[i]
        }
        for i, read in reads.items():
            if checksums_of(read) != self._shards[i][which]:
                raise OSError(
                    f'{self._shards[i]["path"]} is not the shard that the manifest is about: it '
                    f'belongs to another preparation, or was exchanged'
                )
        if which == 'checksums':
            self._to_compare -= shards
