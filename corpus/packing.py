"""Packs whole documents into windows, so that none is cut that fits: best-fit decreasing.

Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3: documents longer than a
window are cut into pieces of a window each, and what remains of them is packed like the documents
that fit, the longest first, each into the fullest window that still has room for it (best-fit
decreasing, Johnson 1974). The order within a window is that of the stream.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from config import ConfigError
from corpus.shards import Split, UnreadableError

GROUP = 1 << 20  # consecutive documents that are packed together: bounds time and memory of a start
SAMPLED = 64  # windows that are read at the start, to see that documents end as they should
SMALLEST = 2  # tokens of the shortest piece: of one there is nothing to predict


class PackedWindows:
    """The windows of a split into which its documents are packed.

    A window is seq_len + 1 tokens: documents one after the other, then -1. A document of n tokens
    with its end has n - 1 targets, those after its first token, and a piece of a longer one begins
    with the last token of the piece before: each is a target in one window exactly. That token is
    written as -2 - id where a piece may follow another document: an input, and no target. The first
    token of a document that follows another one in a window is a target too, of the end of the
    other, as in the plain stream: so the model learns how documents begin. Documents of one token
    have nothing to predict and are left out. The windows follow from the lengths alone.

    Attributes: n_windows; targets int64 [n_windows], of each window; padding, the share of
    positions without a target. Memory: 13 bytes a piece, and 16 bytes a window.
    """

    def __init__(self, split: Split, seq_len: int, max_documents: int = 0):
        """Packs at most `max_documents` into a window; 0: as many as fit.

        Raises ConfigError if there is nothing to predict, or documents do not end with the token
        by which attention tells them apart.
        """
        self.split, self.seq_len = split, seq_len
        pieces = pack(split.document_lengths(), seq_len, max_documents)
        self._starts, self._sizes, self._continues, self._first = pieces
        self.n_windows = len(self._first) - 1
        if not self.n_windows:
            raise ConfigError(
                'no document of the split has two tokens, so there is nothing to predict: prepare '
                'more text'
            )
        held, again = (np.add.reduceat(x, self._first[:-1], dtype=np.int64) for x in pieces[1:3])
        self.targets = held - 1 - again + self._continues[self._first[:-1]]
        self.padding = 1 - float(self.targets.sum()) / (self.n_windows * seq_len)
        try:
            self.read(np.unique(np.linspace(0, self.n_windows - 1, SAMPLED).astype(np.int64)))
        except UnreadableError as error:  # alike on all processes
            raise ConfigError(str(error)) from error

    def record(self) -> dict[str, Any]:
        """Returns what the record of a run's data says of the packing."""
        return {'windows': self.n_windows, 'padding': round(self.padding, 6)}

    def read(self, windows: np.ndarray) -> np.ndarray:
        """Returns these windows, int32 [len(windows), seq_len + 1], as the class says.

        Each piece is read by itself. Raises UnreadableError if the split cannot be read, or a
        document does not end with the end-of-text token.
        """
        length = self.seq_len + 1
        n = self._first[windows + 1] - self._first[windows]
        row = np.repeat(np.arange(len(windows)), n)
        before = np.cumsum(n) - n  # pieces of earlier rows
        piece = np.arange(len(row)) + np.repeat(self._first[windows] - before, n)
        starts, sizes = self._starts[piece], self._sizes[piece].astype(np.int64)
        column = np.cumsum(sizes) - sizes
        column -= np.repeat(column[before], n)
        out = np.full((len(windows), length), -1, np.int32)
        # The pieces of one power of two are read at once, by rows of that many tokens.
        width = np.minimum(1 << np.ceil(np.log2(sizes)).astype(np.int64), length)
        for w in np.unique(width):
            of = np.flatnonzero(width == w)
            tokens = self.split.read_windows(starts[of], int(w))
            tokens[:, 0] = np.where(self._continues[piece[of]], -2 - tokens[:, 0], tokens[:, 0])
            kept = np.arange(w) < sizes[of, None]
            place = (row[of] * length + column[of])[:, None] + np.arange(w)
            out.reshape(-1)[place[kept]] = tokens[kept]
        self._check_ends(out, row, starts + sizes, column + sizes)
        return out

    def _check_ends(self, out: np.ndarray, row: np.ndarray, stop: np.ndarray, after: np.ndarray):
        """Raises UnreadableError if a piece, up to `stop` in the stream and to the column `after`
        of its row, has something behind it and does not end its document."""
        wrong = (after < out.shape[1]) & (out[row, after - 1] != self.split.end_of_text)
        wrong &= stop < self.split.n_tokens  # the stream may end without one: nothing follows
        if wrong.any():
            i = int(np.argmax(wrong))
            raise UnreadableError(
                f'the document that ends with token {stop[i] - 1:,} of the split ends with the id '
                f'{out[row[i], after[i] - 1]}, not with the end-of-text token '
                f'{self.split.end_of_text}, by which attention keeps packed documents apart: use '
                f"data.packing='stream', or prepare the data with it"
            )


class Pieces(NamedTuple):
    """Pieces of documents in order of the windows."""

    starts: np.ndarray  # in the stream, int64
    sizes: np.ndarray  # in tokens, int32
    continues: np.ndarray  # whether it is the rest of a longer document, bool
    first: np.ndarray  # the first piece of each window, and all pieces: int64 [windows + 1]


def pack(lengths: np.ndarray, seq_len: int, max_documents: int) -> Pieces:
    """Packs documents of these lengths into windows of seq_len + 1 tokens, group by group."""
    groups, start, n = [], 0, 0
    for i in range(0, max(len(lengths), 1), GROUP):
        group = lengths[i : i + GROUP]
        found = pack_group(group, seq_len, max_documents)
        groups.append(found._replace(starts=found.starts + start, first=found.first[i > 0 :] + n))
        start, n = start + int(group.sum()), n + len(found.sizes)
    return Pieces(*map(np.concatenate, zip(*groups, strict=True)))


def pack_group(lengths: np.ndarray, seq_len: int, max_documents: int) -> Pieces:
    """Packs the documents of one group: windows that several share first, then whole pieces."""
    begin = np.cumsum(lengths) - lengths
    whole, rest = np.divmod(np.maximum(lengths - 1, 0), seq_len)  # in targets
    to_pack = np.flatnonzero(rest)
    window, n_windows = best_fit(rest[to_pack] + 1, seq_len + 1, max_documents)
    packed = to_pack[np.argsort(window, kind='stable')]
    cut = np.repeat(np.arange(len(lengths)), whole)
    nth = np.arange(len(cut)) - np.repeat(np.cumsum(whole) - whole, whole)
    counts = (np.bincount(window, minlength=n_windows), np.ones(len(cut), np.int64))
    return Pieces(
        np.concatenate(((begin + whole * seq_len)[packed], begin[cut] + nth * seq_len)),
        np.concatenate((rest[packed] + 1, np.full(len(cut), seq_len + 1))).astype(np.int32),
        np.concatenate((whole[packed] > 0, np.zeros(len(cut), bool))),
        np.cumsum(np.concatenate((np.zeros(1, np.int64), *counts))),
    )


class _Open:
    """The windows that are not full, by their room in tokens and the documents in them."""

    def __init__(self, most: int):
        self._most = most  # documents of a window; 0: no limit
        self._windows: dict[int, dict[int, list[np.ndarray]]] = {}
        self._rooms = 0  # bit r: there are windows with room for r tokens

    def add(self, windows: np.ndarray, room: int, documents: int) -> None:
        """Adds windows, but for those into which nothing more goes."""
        if not self._most:
            documents = 0
        if len(windows) and room >= SMALLEST and (not self._most or documents < self._most):
            self._windows.setdefault(room, {}).setdefault(documents, []).append(windows)
            self._rooms |= 1 << room

    def fit(self, size: int) -> tuple[int, int, int]:
        """Returns the least room that takes `size`, 0 if none does; the documents in windows that
        have it; and how many pieces of that size go into one of them."""
        rooms = self._rooms >> size
        if not rooms:
            return 0, 0, 0
        room = size + (rooms & -rooms).bit_length() - 1
        documents = next(iter(self._windows[room]))
        return room, documents, self.pieces(room, documents, size)

    def pieces(self, room: int, documents: int, size: int) -> int:
        """Returns how many pieces of a size go into a window."""
        return min(room // size, self._most - documents) if self._most else room // size

    def take(self, room: int, documents: int, n: int) -> np.ndarray:
        """Removes up to n windows with that room and number of documents, and returns them."""
        chunks = self._windows[room][documents]
        taken, chunks[-1] = chunks[-1][:n], chunks[-1][n:]
        if not len(chunks[-1]):
            chunks.pop()
        if not chunks:
            del self._windows[room][documents]
        if not self._windows[room]:
            del self._windows[room]
            self._rooms ^= 1 << room
        return taken


def best_fit(sizes: np.ndarray, room: int, most: int) -> tuple[np.ndarray, int]:
    """Packs pieces of these sizes, at least SMALLEST, into windows of `room` tokens.

    Returns the window of each piece, and the number of windows. The longest come first, each into
    the fullest window with room for it, or into a new one; `most` pieces at most to a window, 0: no
    limit. Pieces of one size are placed together: the fullest window that takes one is, after it,
    the fullest for the next as well, as long as it has room. So the work is that of sorting, and
    some for each pair of a size and a room, however many pieces have them.
    """
    order = np.argsort(-sizes, kind='stable')
    values, counts = np.unique(sizes, return_counts=True)
    window, n_windows, i, open_ = np.empty(len(sizes), np.int64), 0, 0, _Open(most)
    for size, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            space, documents, each = open_.fit(size)
            if space:
                windows = open_.take(space, documents, -(-left // each))
            else:
                space, documents, each = room, 0, open_.pieces(room, 0, size)
                windows = np.arange(n_windows, n_windows - (-left // each))
                n_windows += len(windows)
            n = min(left, len(windows) * each)
            window[order[i : i + n]] = np.repeat(windows, each)[:n]
            i, left = i + n, left - n
            full, last = divmod(n, each)
            open_.add(windows[:full], space - each * size, documents + each)
            open_.add(windows[full : full + bool(last)], space - last * size, documents + last)
    return window, n_windows


def packing_note(packed: Sequence[PackedWindows]) -> str:
    """Returns a line on what the packing of one or several sources wastes."""
    n, targets = (sum(f(p) for p in packed) for f in (lambda p: p.n_windows, total_targets))
    seq_len = packed[0].seq_len
    return (
        f'packed: {n:,} windows of whole documents; {1 - targets / (n * seq_len):.2%} of their '
        f'{n * seq_len:,} positions have no target'
    )


def total_targets(packed: PackedWindows) -> int:
    """Returns the targets of all windows."""
    return int(packed.targets.sum())
