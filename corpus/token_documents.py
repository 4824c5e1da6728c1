"""Cuts token ids as they lie in files into documents, each followed by one end-of-text token.

A file's tokens come in blocks (corpus/token_files.py). Documents end where a record does, if the
format has records, and at each end-of-text token, which a file may put before, between or behind
documents. What lies between two ends is a document; nothing between two is none. All is done on
arrays, since a gigabyte holds a million documents.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from corpus.hashes import mix
from corpus.records import Bad

COUNTED = 1 << 16  # tokens whose bytes are looked up at a time, which stay in the cache
TAIL = 4096  # tokens or characters held out of a lone document, at least, unless that is most


class Block(NamedTuple):
    """Consecutive tokens of a file: whole documents.

    `starts` are the places in `tokens` at which records start, the first one at 0; None if the
    format has no records. `first` is the number of the first record, from 1 up. `at` is the place
    of the first token among all of the file, and `byte` where it lies there; None if ids do not lie
    there as they are.
    """

    tokens: np.ndarray  # integers [n]
    starts: np.ndarray | None  # int64 [records]
    first: int = 1
    at: int = 0
    byte: int | None = None


class Cut(NamedTuple):
    """Documents of a block: tokens[starts[i] : stops[i]], none of them empty or with an end inside.

    `numbers` are those of their records, or the places of their first tokens in the file.
    """

    starts: np.ndarray  # int64 [n]
    stops: np.ndarray  # int64 [n]
    numbers: np.ndarray  # int64 [n]

    def some(self, chosen: np.ndarray | slice) -> 'Cut':
        """Returns the chosen documents."""
        return Cut(*(array[chosen] for array in self))


# ---------------------------------------------------------------------------------------------
# Borders
# ---------------------------------------------------------------------------------------------


def ends_in(tokens: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Returns the places of tokens with one of the ids `ends`, int64, ascending."""
    limits = np.iinfo(tokens.dtype)
    possible = [end for end in ends if limits.min <= end <= limits.max]
    places = [np.flatnonzero(tokens == tokens.dtype.type(end)) for end in possible]
    if len(places) == 1:
        return places[0]
    return np.sort(np.concatenate(places)) if places else np.empty(0, np.int64)


def cut(block: Block, ends: Sequence[int]) -> tuple[Cut, int]:
    """Returns the documents of a block, and the number of its records that have none."""
    tokens, record_starts = block.tokens, block.starts
    at = ends_in(tokens, ends)
    # What separates documents: an end token takes a place, a record's start takes none.
    before, behind = at, at + 1
    if record_starts is not None:
        before = np.sort(np.concatenate([before, record_starts]), kind='stable')
        behind = np.sort(np.concatenate([behind, record_starts]), kind='stable')
    starts = np.concatenate([[0], behind]).astype(np.int64)
    stops = np.concatenate([before, [len(tokens)]]).astype(np.int64)
    full = stops > starts
    starts, stops = starts[full], stops[full]
    if record_starts is None:
        return Cut(starts, stops, block.at + starts), 0
    record = np.searchsorted(record_starts, starts, 'right') - 1
    n_empty = len(record_starts) - np.count_nonzero(np.diff(record, prepend=-1))
    return Cut(starts, stops, block.first + record), int(n_empty)


def as_stream(blocks: Iterator[Block], ends: Sequence[int]) -> Iterator[Block]:
    """Yields the tokens of a whole file's records as those of a stream, whose only borders are end
    tokens: for records that are windows cut out of one, without regard to documents."""
    rest, place = None, 0
    for block in blocks:
        tokens = block.tokens if rest is None else np.concatenate([rest, block.tokens])
        at = ends_in(tokens, ends)
        n = int(at[-1]) + 1 if len(at) else 0
        if n:
            yield Block(tokens[:n], None, at=place)
        rest, place = tokens[n:], place + n
    if rest is not None and len(rest):
        yield Block(rest, None, at=place)


# ---------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------


def split_bad(
    block: Block, documents: Cut, n_vocab: int, file: str, vocabulary: str
) -> tuple[Cut, list[Bad]]:
    """Splits documents into those whose ids all lie in 0..n_vocab-1, and a Bad for each other."""
    wrong = _beyond(block.tokens, n_vocab)
    which = np.searchsorted(documents.starts, wrong, 'right') - 1
    inside = which >= 0
    inside[inside] = wrong[inside] < documents.stops[which[inside]]  # no end token of another id
    wrong, which = wrong[inside], which[inside]
    if not len(wrong):
        return documents, []
    bad, first = np.unique(which, return_index=True)
    found = []
    for i, at in zip(bad, wrong[first], strict=True):
        error = f'id {block.tokens[at]} is beyond the {n_vocab:,} of the vocabulary {vocabulary}'
        error += ', if that is the one that made the file'
        found.append(Bad(file, place(block, documents.numbers[i], at), error))
    good = np.ones(len(documents.starts), bool)
    good[bad] = False
    return documents.some(good), found


def place(block: Block, number: int, at: int) -> str:
    """Describes where token `at` of a block lies, in the document with this number."""
    name = 'the document at token' if block.starts is None else 'record'
    byte = '' if block.byte is None else f', byte {block.byte + at * block.tokens.itemsize:,}'
    return f'{name} {number:,}{byte}'


def _beyond(tokens: np.ndarray, n_vocab: int) -> np.ndarray:
    """Returns the places of ids that are not in 0..n_vocab-1."""
    # Negative ids are large ones without their sign.
    unsigned = tokens.view(f'{tokens.dtype.byteorder}u{tokens.itemsize}')
    if not len(tokens) or n_vocab > np.iinfo(unsigned.dtype).max or unsigned.max() < n_vocab:
        return np.empty(0, np.int64)
    return np.flatnonzero(unsigned >= n_vocab)


# ---------------------------------------------------------------------------------------------
# Splits and sizes
# ---------------------------------------------------------------------------------------------


def hashes(file: str, numbers: np.ndarray) -> np.ndarray:
    """Returns a hash of each document's id, file and number, uint64: the split follows from it."""
    name = hashlib.blake2b(file.encode('utf-8', 'surrogateescape'), digest_size=8).digest()
    seed = mix(np.frombuffer(name, '<u8'))
    return mix(mix(numbers.astype(np.uint64)) ^ seed)


def held_out(hashes: np.ndarray, share: float) -> np.ndarray:
    """Returns which documents go to validation, bool [n]: those with hashes in the first `share`.

    The share is exact to 1 part in 2**53, as `split_of` is.
    """
    return hashes.astype(np.float64) < share * 2.0**64


def count_bytes(tokens: np.ndarray, lengths: np.ndarray) -> int:
    """Returns the bytes of text that tokens stand for; `lengths` [n_vocab] has those of each id."""
    n = 0
    for i in range(0, len(tokens), COUNTED):
        n += int(lengths.take(tokens[i : i + COUNTED], mode='clip').sum())
    return n


def byte_lengths(token_bytes: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Returns `token_bytes` in the smallest type, with 0 for the ids that no document holds."""
    lengths = token_bytes.copy()
    lengths[[end for end in ends if end < len(lengths)]] = 0
    return lengths.astype(np.min_scalar_type(lengths.max()))


def tail_size(n: int, share: float) -> float:
    """Returns how much of a lone document of n tokens or characters is held out: `share` of it, but
    at least TAIL, or a tenth of a short one."""
    return max(share * n, min(TAIL, n / 10))


def tail_start(n: int, share: float) -> int:
    """Returns where the part of a lone document of n tokens or characters starts that is held out:
    its end. Of one token none is."""
    return min(max(1, n - round(tail_size(n, share))), n - 1) if n > 1 else n


# ---------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------


def in_place(tokens: np.ndarray, documents: Cut, end: int) -> np.ndarray:
    """Returns which documents have the end-of-text token `end` behind them in the file, bool."""
    there = documents.stops < len(tokens)
    there[there] = tokens[documents.stops[there]] == end
    return there


def joined(tokens: np.ndarray, documents: Cut, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the documents one after the other, each followed by `end`, and their places in that.

    Places are those behind each document's end, int64 [n]. No token is copied where they lie so.
    """
    starts, stops = documents.starts, documents.stops
    lengths = stops - starts
    behind = np.cumsum(lengths + 1)
    if not len(starts):
        return tokens[:0], behind
    if (starts[1:] == stops[:-1] + 1).all() and in_place(tokens, documents, end).all():
        return tokens[starts[0] : stops[-1] + 1], behind
    out = np.empty(behind[-1], tokens.dtype if end <= np.iinfo(tokens.dtype).max else np.int64)
    is_text = np.ones(len(out), bool)
    is_text[behind - 1] = False
    change = np.zeros(len(tokens) + 1, np.int8)
    change[starts] += 1
    change[stops] -= 1
    out[is_text] = tokens[np.cumsum(change[:-1], dtype=np.int8).view(bool)]
    out[behind - 1] = end
    return out, behind


def runs(flags: np.ndarray) -> Iterator[tuple[int, int, Any]]:
    """Yields (start, stop, value) of each stretch of equal values."""
    if not len(flags):
        return
    borders = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    for start, stop in itertools.pairwise(borders):
        yield start, stop, flags[start]
