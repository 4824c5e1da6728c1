"""Token shards: zarr3 arrays of token ids and the manifest that lists them.

Each array DIR/train/00000 and so on holds the documents of one part of the input, one after the
other, each followed by the end-of-text token. DIR is a local folder or a tensorstore URL. Each
chunk has a crc32c checksum, and the manifest holds a digest of each shard.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
import tiktoken

from config import ConfigError
from storage.stores import open_store, store_errors
from tokenizer import fingerprint, get_encoding

VERSION = 1  # of the manifest and the arrays
MANIFEST = 'manifest.json'
SPLITS = ('train', 'validation')

CHUNK_TOKENS = 1 << 15  # tokens that the smallest read fetches and checks
OBJECT_TOKENS = 1 << 24  # tokens in one file or object of an array, a multiple of CHUNK_TOKENS
CACHE_BYTES = 256 << 20  # decoded chunks that a split keeps in memory
SAMPLE_TOKENS = 200  # at most, of a document that --inspect shows


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


def split_of(document: str, validation_share: float) -> str:
    """Returns the split of the document with this id. It does not depend on other documents."""
    name = document.encode('utf-8', 'surrogateescape')  # Linux allows any bytes in a file's name
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return 'validation' if int.from_bytes(digest, 'big') < validation_share * 2**64 else 'train'


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


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
        self._array: ts.TensorStore | None = None
        self._hash = hashlib.blake2b(digest_size=16)

    def append(self, ids: np.ndarray, n_bytes: int) -> None:
        """Adds a document: its ids, and the number of bytes of its text.

        Raises ConfigError if an object cannot be written, OSError if it reads back otherwise.
        """
        self._put(ids)
        self._put(self._end)
        self.documents += 1
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
        return {
            'path': self._path,
            'tokens': self._n_written,
            'documents': self.documents,
            'bytes': self._bytes,
            'digest': self._hash.hexdigest(),
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
            self._array[start:stop].write(tokens).result()
            written = ts.open(array_spec(self._store, self._path), read=True).result()
            same = np.array_equal(written[start:stop].read().result(), tokens)
        if not same:
            raise OSError(
                f'{self._name} reads back otherwise than it was written: check the storage and '
                'start again'
            )
        self._hash.update(tokens.astype(tokens.dtype.newbyteorder('<'), copy=False))
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


def digest_of(blocks: Iterable[np.ndarray]) -> str:
    """Returns 32 hex digits over token ids. They do not depend on the cut into blocks."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens in blocks:
        digest.update(tokens.astype(tokens.dtype.newbyteorder('<'), copy=False))
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_manifest(store: ts.KvStore, path: str) -> dict[str, Any]:
    """Returns the manifest of the prepared data in `store`, which `path` names in messages.

    Raises ConfigError if there is none, or one that this code cannot read.
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
    if version != VERSION:
        raise ConfigError(
            f'{path} has format version {version}, this code reads {VERSION}: prepare again'
        )
    return manifest


class Split:
    """The token stream of one split: the shards of the manifest, end to end.

    Attributes: name; n_tokens, n_documents, n_bytes (of text); tokenizer, a name that
    `get_encoding` takes; fingerprint of the vocabulary the data was prepared with; end_of_text, the
    id that ends each document.
    """

    def __init__(self, path: str, name: str, cache_bytes: int = CACHE_BYTES):
        """Opens split `name` ('train' or 'validation') of a prepared folder or tensorstore URL.

        Keeps at most `cache_bytes` of it in memory. Raises ConfigError if there is no such data.
        """
        if name not in SPLITS:
            raise ValueError(f'a split is one of {", ".join(SPLITS)}, not {name!r}')
        self._path, self._store = path, open_store(path)
        manifest = read_manifest(self._store, path)
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
        self._paths = [shard['path'] for shard in split['shards']]
        self._starts = np.cumsum([0] + [shard['tokens'] for shard in split['shards']])
        self._context = ts.Context({'cache_pool': {'total_bytes_limit': cache_bytes}})
        self._arrays: dict[int, ts.Future] = {}

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
            # Starts to open all arrays before it waits for one, and then the reads likewise.
            opened = [self._array(shard) for _, shard, _, _ in pieces]
            reads = [
                future.result()[a:b].read()
                for future, (_, _, a, b) in zip(opened, pieces, strict=True)
            ]
            for (target, *_), read in zip(pieces, reads, strict=True):
                target[:] = read.result()
        except ValueError as error:  # tensorstore's, of one process alone: no ConfigError
            raise OSError(
                f'{self._path} cannot be read (--inspect verifies it): {error}'
            ) from error
        return out

    def _array(self, shard: int) -> ts.Future:
        """Returns the opened array of a shard, as a future."""
        if shard not in self._arrays:
            # Shards never change, so cached chunks are not checked against the store again.
            self._arrays[shard] = ts.open(
                array_spec(self._store, self._paths[shard]),
                context=self._context,
                read=True,
                recheck_cached=False,
            )
        return self._arrays[shard]


# ---------------------------------------------------------------------------------------------
# Inspection
# ---------------------------------------------------------------------------------------------


def inspect(path: str, n_samples: int = 3) -> list[str]:
    """Reads and checks all shards; returns a line for each damaged one.

    Prints the manifest, statistics of the tokens, and `n_samples` documents of each split.
    """
    store = open_store(path)
    manifest = read_manifest(store, path)
    summary = json.loads(json.dumps(manifest))
    for split in summary['splits'].values():
        split['shards'] = len(split['shards'])
    print(json.dumps(summary, indent=1))
    damage = []
    for name, split in manifest['splits'].items():
        if not split['tokens']:
            print(f'\n{name}: empty')
            continue
        counts = np.zeros(manifest['tokenizer']['n_vocab'], np.int64)
        lengths: list[np.ndarray] = []
        for shard in split['shards']:
            try:
                _check_shard(store, shard, manifest, counts, lengths)
            except (ValueError, OSError) as error:
                damage.append(f'{path}/{shard["path"]} is damaged: {error}')
        if not lengths:
            continue
        whole = Split(path, name)
        _print_statistics(whole, counts, np.concatenate(lengths))
        if not damage:
            _print_samples(whole, np.concatenate(lengths), n_samples)
    print(f'\n{len(damage)} damaged shards' if damage else '\nall shards are as the manifest says')
    return damage


def _check_shard(
    store: ts.KvStore,
    shard: dict[str, Any],
    manifest: dict[str, Any],
    counts: np.ndarray,
    lengths: list[np.ndarray],
) -> None:
    """Adds the shard's ids to `counts` [n_vocab] and the lengths of its documents to `lengths`.

    Raises ValueError or OSError if the shard is not as the manifest says.
    """
    ends, n = [], 0

    def blocks() -> Iterator[np.ndarray]:
        """Yields the shard's tokens, counted."""
        nonlocal counts, n
        for tokens in read_blocks(store, shard['path']):
            new = np.bincount(tokens, minlength=len(counts))
            if len(new) > len(counts):
                raise ValueError(f'id {len(new) - 1} is beyond the vocabulary of {len(counts)}')
            counts += new
            ends.append(n + np.flatnonzero(tokens == manifest['tokenizer']['end_of_text']))
            n += len(tokens)
            yield tokens

    digest = digest_of(blocks())
    ends = np.concatenate(ends)
    if (n, len(ends)) != (shard['tokens'], shard['documents']):
        raise ValueError(
            f'it holds {n:,} tokens and {len(ends):,} documents, the manifest says '
            f'{shard["tokens"]:,} and {shard["documents"]:,}'
        )
    if shard.get('digest', digest) != digest:
        raise ValueError('its tokens are not those that the manifest is about')
    lengths.append(np.diff(ends, prepend=-1))


def _print_statistics(split: Split, counts: np.ndarray, lengths: np.ndarray) -> None:
    """Prints totals, lengths of documents and the most frequent ids of a split."""
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    print(
        f'\n{split.name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, '
        f'{split.n_bytes:,} bytes, {split.n_bytes / split.n_tokens:.3f} bytes per token\n'
        f'  tokens per document: mean {lengths.mean():,.0f}; minimum, 10 %, median, 90 %, maximum: '
        f'{", ".join(f"{q:,}" for q in quantiles)}\n'
        f'  {np.count_nonzero(counts):,} of {len(counts):,} ids occur; the most frequent:'
    )
    enc = split.encoding()
    for i in np.argsort(-counts, kind='stable')[: min(10, np.count_nonzero(counts))]:
        print(f'  {counts[i] / counts.sum():7.2%}  {i:6}  {enc.decode_single_token_bytes(i)!r}')


def _print_samples(split: Split, lengths: np.ndarray, n: int) -> None:
    """Prints n documents at even distances, the first SAMPLE_TOKENS tokens of each."""
    enc = split.encoding()
    starts = np.cumsum(lengths) - lengths
    for i in np.unique(np.linspace(0, len(lengths) - 1, n).astype(int)) if n else ():
        kept = min(lengths[i] - 1, SAMPLE_TOKENS)
        text = enc.decode(split.read(starts[i], starts[i] + kept).tolist())
        print(f'\n--- {split.name} document {i}, {lengths[i] - 1:,} tokens ---\n{text}')
