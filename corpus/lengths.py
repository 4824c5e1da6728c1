"""The lengths of the documents of a shard: written beside its tokens, read, or found in them.

DIR/train/00000.lengths holds little-endian uint32, the tokens of each document of DIR/train/00000,
its end-of-text token included. The shard's entry in the manifest has a digest over these bytes.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore as ts

LENGTHS = '.lengths'  # after the shard's path
DTYPE = np.dtype('<u4')


def lengths_digest(content: bytes) -> str:
    """Returns 32 hex digits over the bytes of a file of lengths."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def write_lengths(store: ts.KvStore, path: str, lengths: Iterable[int]) -> str:
    """Writes the lengths of the documents of the shard at `path`, and returns their digest.

    Raises OSError if they read back otherwise; other errors are tensorstore's.
    """
    content = np.fromiter(lengths, DTYPE).tobytes()
    store.write(path + LENGTHS, content).result()
    if store.read(path + LENGTHS).result().value != content:
        raise OSError(
            f'{path}{LENGTHS} reads back otherwise than it was written: check the storage and '
            'start again'
        )
    return lengths_digest(content)


def read_lengths(store: ts.KvStore, shard: dict[str, Any]) -> np.ndarray:
    """Returns the lengths of the documents of a shard, int64, given its entry of the manifest.

    Raises OSError if they are missing, or not those that the manifest is about.
    """
    file = shard['path'] + LENGTHS
    found = store.read(file).result()
    if found.state != 'value':
        raise OSError(f'{file} is missing')
    content = bytes(found.value)
    if lengths_digest(content) != shard['lengths']:
        raise OSError(f'{file} is not the file that the manifest is about')
    lengths = np.frombuffer(content, DTYPE).astype(np.int64)
    if (len(lengths), lengths.sum()) != (shard['documents'], shard['tokens']):
        raise OSError(
            f'{file} has {len(lengths):,} documents of {lengths.sum():,} tokens, the manifest says '
            f'{shard["documents"]:,} of {shard["tokens"]:,}'
        )
    return lengths


def found_lengths(blocks: Iterable[np.ndarray], end_of_text: int) -> np.ndarray:
    """Returns the lengths of the documents in the tokens of a stream, given block by block: int64.

    Each ends with the token `end_of_text`, and the last one with the stream if that comes first.
    """
    ends, n = [np.zeros(0, np.int64)], 0
    for tokens in blocks:
        ends.append(n + np.flatnonzero(tokens == end_of_text))
        n += len(tokens)
    ends = np.concatenate(ends)
    if n and not (len(ends) and ends[-1] == n - 1):
        ends = np.append(ends, n - 1)
    return np.diff(ends, prepend=-1)
