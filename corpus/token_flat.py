"""Reads token ids that lie one after the other: Megatron-LM, llm.c, nanoGPT, Levanter.

The tokens of all documents are one array that can be read from any place (`Flat`). Layouts follow
the projects' own code, which is named where it is read.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tensorstore as ts

from config import ConfigError
from corpus.files import READ_BYTES, File, open_file, with_size
from corpus.records import Piece
from corpus.token_documents import Block, ends_in
from corpus.token_rows import exists, parsed_json
from storage.stores import open_store

if TYPE_CHECKING:
    from corpus.token_files import TokenOptions

BLOCK_TOKENS = 1 << 18  # tokens of a block, which stay in the cache, unless a document has more
SCANNED = 1 << 16  # tokens that are searched for the next end at a time
INDEX_ROWS = 1 << 20  # entries of an index that are checked at a time
INDEX_BYTES = 256 << 10  # of a remote index that are requested where a few entries are looked up
CHUNKS = 4  # of a remote file in memory

HEADER_BYTES = 256 * 4  # of an llm.c file
LLMC_DTYPES = {(20240520, 1): '<u2', (20240801, 7): '<u4'}  # by magic number and version

MEGATRON_MAGIC = b'MMIDIDX\0\0'
MEGATRON_HEADER = 34  # magic 9, version 8, code of the type 1, numbers of sequences, borders 8 each
MEGATRON_DTYPES = {1: 'u1', 2: 'i1', 3: '<i2', 4: '<i4', 5: '<i8', 8: '<u2'}


class Bytes:
    """The bytes of a file: mapped into memory if it is local, a few chunks if it is remote."""

    def __init__(self, file: File, chunk: int = READ_BYTES):
        """Opens the file, of which a remote one is asked for `chunk` bytes at a time, or for more.

        Raises ConfigError or RemoteError if it cannot be opened.
        """
        self.file = with_size(file)
        self.size = self.file.size or 0
        self._mapped, self._remote = None, None
        self._chunk_bytes, self._chunks = chunk, {}
        if '://' in file.path:
            self._remote = open_file(self.file, buffered=False)
        elif self.size:
            with open_file(self.file) as f:
                self._mapped = np.memmap(f, np.uint8, 'r')

    def array(self, start: int, count: int, dtype: str | np.dtype) -> np.ndarray:
        """Returns `count` numbers from byte `start` on. Raises ConfigError if it is shorter."""
        dtype = np.dtype(dtype)
        stop = start + count * dtype.itemsize
        if not 0 <= start <= stop <= self.size:
            raise ConfigError(
                f'{self.file.path} ends at byte {self.size:,}, before {stop:,}: fetch it again'
            )
        if self._mapped is not None:
            return self._mapped[start:stop].view(dtype)
        n = self._chunk_bytes
        if stop - start > n:
            return np.frombuffer(self._read(start, stop), dtype)
        content = bytearray()
        for i in range(start // n, -(-stop // n)):
            content += self._chunk(i)[max(0, start - i * n) : stop - i * n]
        return np.frombuffer(content, dtype)

    def _chunk(self, i: int) -> bytes:
        """Returns chunk i. The last CHUNKS are kept: whoever looks for the end of a document goes
        back to its start, and an index is read in several places."""
        if i not in self._chunks:
            start = i * self._chunk_bytes
            content = self._read(start, min(start + self._chunk_bytes, self.size))
            self._chunks = dict(list(self._chunks.items())[1 - CHUNKS :]) | {i: content}
        return self._chunks[i]

    def _read(self, start: int, stop: int) -> bytes:
        """Returns bytes start..stop-1 of a remote file. Raises ConfigError if it is shorter."""
        self._remote.seek(start)
        content = self._remote.read(stop - start)
        if len(content) != stop - start:
            raise ConfigError(f'{self.file.path} ends before byte {stop:,}: fetch it again')
        return content


@dataclasses.dataclass(frozen=True)
class Flat:
    """Tokens of all documents, one after the other."""

    file: File
    n_tokens: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]  # tokens start..stop-1
    byte: int | None  # at which the first token lies in the file, if they lie there as they are
    n_records: int | None = None  # None: none
    # Places of the first tokens of records start..stop-1; n_records has n_tokens.
    starts: Callable[[int, int], np.ndarray] | None = None

    def byte_of(self, token: int) -> int | None:
        """Returns the byte in the file at which a token lies."""
        return None if self.byte is None else self.byte + token * self.dtype.itemsize


def flat_pieces(flat: Flat, options: 'TokenOptions', part_bytes: int) -> list[Piece]:
    """Cuts a flat file into ranges of about `part_bytes`: of records, or of tokens."""
    room = max(1, part_bytes // flat.dtype.itemsize)
    pieces = []
    if options.borders == 'end_of_text':
        for start in range(0, flat.n_tokens, room):
            stop = min(start + room, flat.n_tokens)
            pieces.append(
                Piece(flat.file, start, stop, start, (stop - start) * flat.dtype.itemsize)
            )
        return pieces
    start = at = 0
    while start < flat.n_records:
        stop = max(start + 1, _last_record(flat, start, at + room))
        after = int(flat.starts(stop, stop + 1)[0])
        size = (after - at) * flat.dtype.itemsize
        pieces.append(Piece(flat.file, start, stop, start + 1, size))
        start, at = stop, after
    return pieces


def _last_record(flat: Flat, start: int, token: int) -> int:
    """Returns the last record, from `start` on or n_records, that starts at `token` or before."""
    # Steps that double, since the record is near: far entries of an index are other requests.
    low, step = start, 1
    while low + step <= flat.n_records and int(flat.starts(low + step, low + step + 1)[0]) <= token:
        low, step = low + step, 2 * step
    high = min(flat.n_records, low + step - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if int(flat.starts(middle, middle + 1)[0]) <= token:
            low = middle
        else:
            high = middle - 1
    return low


def flat_blocks(
    flat: Flat, start: int, stop: int, options: 'TokenOptions', ends: Sequence[int]
) -> Iterator[Block]:
    """Yields blocks of about BLOCK_TOKENS of records start..stop-1, or of the documents that start
    at tokens start..stop-1."""
    if options.borders == 'end_of_text':
        at, stop = next_start(flat, start, ends), next_start(flat, stop, ends)
        while at < stop:
            after = min(stop, next_start(flat, at + BLOCK_TOKENS, ends))
            yield Block(flat.read(at, after), None, at=at, byte=flat.byte_of(at))
            at = after
        return
    while start < stop:
        at = int(flat.starts(start, start + 1)[0])
        after = min(stop, max(start + 1, _last_record(flat, start, at + BLOCK_TOKENS)))
        starts = flat.starts(start, after + 1).astype(np.int64)
        tokens = flat.read(at, int(starts[-1]))
        yield Block(tokens, starts[:-1] - at, start + 1, at, flat.byte_of(at))
        start = after


def next_start(flat: Flat, token: int, ends: Sequence[int]) -> int:
    """Returns the first place from `token` on at which a document starts: 0, or behind an end."""
    if token <= 0:
        return 0
    for start in range(token - 1, flat.n_tokens, SCANNED):
        found = ends_in(flat.read(start, min(start + SCANNED, flat.n_tokens)), ends)
        if len(found):
            return start + int(found[0]) + 1
    return flat.n_tokens


# ---------------------------------------------------------------------------------------------
# nanoGPT, llm.c
# ---------------------------------------------------------------------------------------------


def open_nanogpt(file: File, options: 'TokenOptions') -> Flat:
    """Opens a .bin of nanoGPT's data/*/prepare.py: ids and nothing else.

    Raises ConfigError for a size that is no whole number of ids.
    """
    content, dtype = Bytes(file), np.dtype(options.dtype).newbyteorder('<')
    return _flat(content, 0, dtype, content.size // dtype.itemsize)


def open_llmc(file: File, options: 'TokenOptions') -> Flat:
    """Opens a .bin of llm.c (dev/data/data_common.py, write_datafile) or modded-nanogpt.

    256 int32: a magic number, a version, the number of tokens; then the ids. An end-of-text token
    stands before each document. Raises ConfigError for another file, version or number.
    """
    content = Bytes(file)
    if content.size < HEADER_BYTES:
        raise ConfigError(
            f'{file.path} has {content.size:,} bytes, and the header of an llm.c file has '
            f'{HEADER_BYTES:,}: fetch it again'
        )
    magic, version, n_tokens = content.array(0, 3, '<i4').tolist()
    if (magic, version) not in LLMC_DTYPES:
        known = ' or '.join(f'{m} and {v}' for m, v in LLMC_DTYPES)
        raise ConfigError(
            f'{file.path} starts with the magic number {magic} (byte 0) and version {version} '
            f'(byte 4), and llm.c files of tokens with {known}: check --format and the file'
        )
    return _flat(content, HEADER_BYTES, np.dtype(LLMC_DTYPES[magic, version]), n_tokens)


def _flat(content: Bytes, byte: int, dtype: np.dtype, n_tokens: int) -> Flat:
    """Returns the tokens from `byte` on. Raises ConfigError if they do not end where the file
    does."""
    stop, size = byte + n_tokens * dtype.itemsize, content.size
    if stop != size:
        said = f'{n_tokens:,} ids of {dtype.name} end at byte {stop:,}'
        raise ConfigError(
            f'{content.file.path}: {said}, and the file has {size:,}: fetch or write it again'
        )

    def read(start: int, stop: int) -> np.ndarray:
        return content.array(byte + start * dtype.itemsize, stop - start, dtype)

    return Flat(content.file, n_tokens, dtype, read, byte)


# ---------------------------------------------------------------------------------------------
# Megatron-LM
# ---------------------------------------------------------------------------------------------


class MegatronIndex:
    """The .idx beside a .bin (megatron/core/datasets/indexed_dataset.py, _IndexWriter).

    Magic, version 1, the code of the type; the numbers of sequences and of document borders; an
    int32 length and an int64 byte of each sequence, int64 borders of documents among the sequences
    with 0 as the first, and in a multimodal file an int8 mode of each sequence.
    """

    def __init__(self, file: File):
        """Reads the header. Raises ConfigError if it or the file's size cannot be right."""
        where = dataclasses.replace(
            file, name=f'{file.name[:-4]}.idx', path=f'{file.path[:-4]}.idx', size=None, version=''
        )
        self.path = where.path
        if not exists(where):
            raise ConfigError(
                f'{file.path} has no {os.path.basename(self.path)} beside it, which says where its '
                'documents are: copy it there; nanoGPT files (--format=nanogpt) have none'
            )
        self._content = content = Bytes(where, INDEX_BYTES)
        self.file = content.file
        magic = content.array(0, 9, 'u1').tobytes() if content.size >= 9 else b''
        if magic != MEGATRON_MAGIC:
            raise ConfigError(
                f'{self.path} starts with {magic!r}, and an index of Megatron with '
                f'{MEGATRON_MAGIC!r}: it is none, or of the older kind that starts with TNTIDX'
            )
        version = int(content.array(9, 1, '<u8')[0])
        if version != 1:
            raise ConfigError(f'{self.path} has version {version} at byte 9; version 1 is read')
        code = int(content.array(17, 1, 'u1')[0])
        if code not in MEGATRON_DTYPES:
            raise ConfigError(
                f'{self.path} names a type by code {code} at byte 17; those of integers are '
                f'{", ".join(map(str, MEGATRON_DTYPES))}'
            )
        self.dtype = np.dtype(MEGATRON_DTYPES[code])
        self.n_sequences, borders = map(int, content.array(18, 2, '<u8'))
        self.n_documents = borders - 1
        self._bytes = MEGATRON_HEADER + 4 * self.n_sequences
        self._borders = self._bytes + 8 * self.n_sequences
        self._modes = self._borders + 8 * borders
        self.multimodal = content.size == self._modes + self.n_sequences > self._modes
        if borders < 1 or not (content.size == self._modes or self.multimodal):
            raise ConfigError(
                f'{self.path} has {content.size:,} bytes, and the {self.n_sequences:,} sequences '
                f'and {borders:,} document borders of its header take {self._modes:,}: write or '
                'fetch it again'
            )
        self.n_tokens = self._n_tokens()

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Returns the first tokens of documents start..stop-1; n_documents has the end's."""
        borders = self._content.array(self._borders + 8 * start, stop - start, '<i8')
        out = np.empty(len(borders), np.int64)
        if not len(out):
            return out
        low, high = int(borders[0]), min(int(borders[-1]) + 1, self.n_sequences)
        places = self._content.array(self._bytes + 8 * low, high - low, '<i8')
        inside = borders < self.n_sequences
        out[inside] = places[borders[inside] - low] // self.dtype.itemsize
        out[~inside] = self.n_tokens
        return out

    def _n_tokens(self) -> int:
        """Returns the number of tokens of all sequences."""
        last = self.n_sequences - 1
        if last < 0:
            return 0
        at = int(self._content.array(self._bytes + 8 * last, 1, '<i8')[0])
        length = int(self._content.array(MEGATRON_HEADER + 4 * last, 1, '<i4')[0])
        return at // self.dtype.itemsize + length

    def check(self, size: int) -> None:
        """Checks each entry against the .bin, which has `size` bytes. Raises ConfigError."""
        at, item = 0, self.dtype.itemsize
        for i in range(0, self.n_sequences, INDEX_ROWS):
            n = min(INDEX_ROWS, self.n_sequences - i)
            lengths = self._content.array(MEGATRON_HEADER + 4 * i, n, '<i4').astype(np.int64)
            places = self._content.array(self._bytes + 8 * i, n, '<i8')
            expected = at + np.cumsum(lengths) * item - lengths * item
            self._refuse(lengths < 0, i, MEGATRON_HEADER, 4, 'has a negative length', lengths)
            beyond = places + lengths * item > size
            said = f'ends beyond the .bin, which has {size:,} bytes; it starts at'
            self._refuse(beyond, i, self._bytes, 8, said, places)
            said = 'starts elsewhere than where the one before ends: at'
            self._refuse(places != expected, i, self._bytes, 8, said, places)
            at = int(expected[-1] + lengths[-1] * item)
        if at != size:
            raise ConfigError(
                f'the sequences of {self.path} take {at:,} bytes, and the .bin has {size:,}: they '
                'do not belong together, or one was cut short; write or fetch both again'
            )
        last = 0
        for i in range(0, self.n_documents + 1, INDEX_ROWS):
            n = min(INDEX_ROWS, self.n_documents + 1 - i)
            borders = self._content.array(self._borders + 8 * i, n, '<i8')
            falls = np.diff(borders, prepend=last) < 0
            wrong = (
                falls | (borders > self.n_sequences) | ((borders != 0) & (np.arange(n) + i == 0))
            )
            said = f'is no border among {self.n_sequences:,} sequences, in order:'
            self._refuse(wrong, i, self._borders, 8, said, borders, 'document border')
            last = int(borders[-1])
        if last != self.n_sequences:
            raise ConfigError(
                f'the documents of {self.path} end at sequence {last:,} of {self.n_sequences:,}: '
                'its writer did not end the last document; write it again'
            )
        if self.multimodal:
            modes = self._content.array(self._modes, self.n_sequences, 'i1')
            said = 'is no text (images, audio), but of mode'
            self._refuse(modes != 0, 0, self._modes, 1, said, modes)

    def _refuse(
        self, wrong: np.ndarray, first: int, byte: int, size: int, said: str, values: np.ndarray,
        what: str = 'sequence',
    ) -> None:  # fmt: skip
        """Raises ConfigError for the first entry that is wrong."""
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ConfigError(
                f'{self.path}, byte {byte + size * (first + i):,}: {what} {first + i:,} {said} '
                f'{values[i]:,}: write or fetch the .bin and the .idx again'
            )


def check_megatron(file: File, options: 'TokenOptions') -> File:
    """Checks a .bin and its .idx; returns the .bin with a version of both."""
    file = with_size(file)
    index = MegatronIndex(file)
    index.check(file.size or 0)
    return dataclasses.replace(file, version=f'{file.version} {index.file.version}')


def open_megatron(file: File, options: 'TokenOptions') -> Flat:
    """Opens a .bin by its .idx, which `check_megatron` has checked."""
    index = MegatronIndex(file)
    flat = _flat(Bytes(file), 0, index.dtype, index.n_tokens)
    return dataclasses.replace(flat, file=file, n_records=index.n_documents, starts=index.starts)


# ---------------------------------------------------------------------------------------------
# Levanter
# ---------------------------------------------------------------------------------------------


def check_levanter(file: File, options: 'TokenOptions') -> File:
    """Checks the shard_ledger.json of a cache (levanter/store/cache.py, CacheLedger)."""
    file = with_size(file)
    with parsed_json(file) as ledger:
        finished, n_rows = ledger.get('is_finished'), ledger.get('total_num_rows')
    if not finished:
        raise ConfigError(
            f'{file.path} says that the cache is not finished: let Levanter finish it'
        )
    flat = open_levanter(file, options)
    if flat.n_records != n_rows:
        raise ConfigError(
            f'{file.path} counts {n_rows} rows, and the offsets of {options.field} '
            f'{flat.n_records}: build the cache again'
        )
    return file


def open_levanter(file: File, options: 'TokenOptions') -> Flat:
    """Opens a column of a cache (levanter/store/jagged_array.py, JaggedArrayStore).

    Two zarr3 arrays that are longer than what they hold: `data`, the tokens of all rows, and
    `offsets`: first the number of rows, then where each row ends.
    """
    folder = f'{os.path.dirname(file.path)}/{options.field}'
    try:
        store = open_store(folder)
        arrays = {}
        for name in ('offsets', 'data'):
            # Without this a lost part of an array would read as zeros.
            spec = {'driver': 'zarr3', 'kvstore': (store / f'{name}/').spec().to_json()}
            spec['fill_missing_data_reads'] = False
            arrays[name] = ts.open(spec, read=True).result()
        offsets, data = arrays['offsets'], arrays['data']
        n_rows = int(offsets[0].read().result())
        rows = offsets[1 : n_rows + 1].read().result() if n_rows else np.zeros(0, np.int64)
    except ValueError as error:  # tensorstore's
        raise ConfigError(
            f'{folder} is no column of a cache (--token_field={options.field}): {error}'
        ) from error
    if (np.diff(rows, prepend=0) < 0).any():
        i = int(np.argmax(np.diff(rows, prepend=0) < 0))
        raise ConfigError(f'{folder}/offsets falls at row {i + 1:,}: build the cache again')
    if data.rank != 1 or data.dtype.numpy_dtype.kind not in 'ui':
        raise ConfigError(f'{folder}/data holds {data.dtype.name} of rank {data.rank}, no ids')
    starts = np.concatenate([[0], rows]).astype(np.int64)

    def read(start: int, stop: int) -> np.ndarray:
        try:
            return np.asarray(data[start:stop].read().result())
        except ValueError as error:
            raise ConfigError(f'{folder}/data cannot be read: {error}') from error

    return Flat(
        file, int(starts[-1]), data.dtype.numpy_dtype, read, None, n_rows,
        lambda start, stop: starts[start:stop],
    )  # fmt: skip
