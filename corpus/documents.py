"""Documents of text files anywhere, cut into parts that can be addressed.

A file lies in a local folder or in a file system of fsspec's (gs://, s3://, hf://, https://). It
is cut into pieces: row groups of a Parquet file, a byte range of a large .jsonl file, or the whole
of any other. A part is a list of consecutive pieces. The cut depends on the files alone, and a
part gives the same documents wherever and how often it is read, so parts can be shared out among
processes and machines, and read again after a failure.

A record that cannot be read is a `Bad` among the documents, not an exception.
"""

import dataclasses
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from corpus.files import _PIP, FILE_KINDS, READ_BYTES, ROW_KINDS, File, _with_size, open_file, retry

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 256  # of a row group in memory at a time


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a part holds of one file."""

    file: File
    start: int  # row group, or byte
    stop: int | None  # where the next piece starts; None: to the end of the file
    first: int  # number of the first record in its file, from 1 up
    size: int  # bytes to read, the measure of the work


class Document(NamedTuple):
    id: str  # the file's name and, in files of many documents, the number of the line or row
    text: str
    n_bytes: int  # of the text as UTF-8


class Bad(NamedTuple):
    """A record that cannot be read, or several."""

    file: str  # its name
    place: str  # 'line 3' or 'row 3'; '' is the file as a whole
    error: str
    count: int = 1  # of the records that are lost, as far as they can be counted
    broken: bool = False  # not one record, but all that follows
    lost_bytes: int = 0  # of the input, where the records that are lost cannot be counted

    def message(self, path: str) -> str:
        """What is wrong with the file at this path."""
        if self.broken:
            after = f' after {self.place}' if self.place else ''
            return f'{path} is broken{after} ({self.error}): fetch it again'
        return f'{path}{f", {self.place}" if self.place else ""}: {self.error}: repair or remove it'


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def cut_into_parts(
    files: Sequence[File], part_bytes: int, text_field: str = 'text'
) -> list[list[Piece]]:
    """Parts of consecutive pieces, of about `part_bytes` each; the cut depends on the files alone.

    Reads the footers of Parquet files and counts the lines of .jsonl files above `part_bytes`.
    """
    with ThreadPoolExecutor(16, 'cut') as threads:
        cut = list(threads.map(lambda file: retry(_pieces, file, part_bytes, text_field), files))
    parts: list[list[Piece]] = []
    room = 0
    for piece in (piece for pieces in cut for piece in pieces):
        if not parts or piece.size > room:
            parts.append([])
            room = part_bytes
        last = parts[-1][-1] if parts[-1] else None
        if last and last.file == piece.file:
            merged = dataclasses.replace(last, stop=piece.stop, size=last.size + piece.size)
            parts[-1][-1] = merged
        else:
            parts[-1].append(piece)
        room -= piece.size
    return parts


def _pieces(file: File, part_bytes: int, text_field: str) -> list[Piece]:
    file = _with_size(file)
    if file.name.endswith(ROW_KINDS):
        return _row_groups(file, text_field)
    if file.name.endswith('.jsonl') and (file.size or 0) > part_bytes:
        return _byte_ranges(file, part_bytes)
    return [Piece(file, 0, None, 1, file.size or 0)]


def _byte_ranges(file: File, part_bytes: int) -> list[Piece]:
    """Ranges of `part_bytes`; a line belongs to the range in which it starts."""
    pieces, breaks, last = [], 0, b''  # line breaks before the range, and the byte before it
    with open_file(file) as f:
        for start in range(0, file.size, part_bytes):
            stop = min(start + part_bytes, file.size)
            # Lines start at byte 0 and after each break, so the one after a break at start - 1
            # is the first of this range.
            first = 2 + breaks - (last == b'\n') if start else 1
            pieces.append(Piece(file, start, stop, first, stop - start))
            remaining = stop - start
            while remaining and (block := f.read(min(remaining, READ_BYTES))):
                breaks += block.count(b'\n')
                remaining -= len(block)
                last = block[-1:]
    return pieces


def _row_groups(file: File, text_field: str) -> list[Piece]:
    """A piece a row group; if the footer cannot be read, the whole file, which is then Bad."""
    with open_file(file) as f:
        try:
            metadata = _parquet(f).metadata
        except _arrow_errors() as error:
            _raise_unless_content(error)
            return [Piece(file, 0, None, 1, file.size or 0)]
    pieces, first = [], 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        sizes = [c.total_uncompressed_size for c in columns if c.path_in_schema == text_field]
        size = sizes[0] if sizes else group.total_byte_size
        pieces.append(Piece(file, i, i + 1, first, size))
        first += group.num_rows
    return pieces


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------


def documents(piece: Piece, text_field: str = 'text') -> Iterator[Document | Bad]:
    """The documents of a piece in order, also empty ones; blank lines are no documents.

    Raises RemoteError if a remote file system fails.
    """
    if piece.file.name.endswith(FILE_KINDS):
        yield _whole_file(piece.file)
    elif piece.file.name.endswith(ROW_KINDS):
        yield from _rows(piece, text_field)
    else:
        yield from _lines(piece, text_field)


def _whole_file(file: File) -> Document | Bad:
    with open_file(file) as f:
        content = f.read()
    try:
        return Document(file.name, content.decode(), len(content))
    except UnicodeDecodeError as error:
        return Bad(file.name, '', str(error))


def _lines(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    name = piece.file.name
    prefix = name.removesuffix('.gz').removesuffix('.zst')  # packing a file moves no document
    number, position = piece.first - 1, piece.start
    with open_file(piece.file) as raw:
        if piece.start:
            raw.seek(piece.start - 1)
            position += len(raw.readline()) - 1  # the rest of a line of the piece before
        lines, errors = _decompressed(raw, name)
        while piece.stop is None or position < piece.stop:
            try:
                line = lines.readline()
            except errors as error:
                lost = max(1, (piece.file.size or 0) - raw.tell())
                yield Bad(name, f'line {number}', str(error), 1, True, lost)
                return
            if not line:
                return
            position += len(line)
            number += 1
            if line.strip():
                try:
                    yield _record(f'{prefix}:{number}', line, text_field)
                except (ValueError, RecursionError) as error:  # UTF-8, JSON, the record
                    yield Bad(name, f'line {number}', str(error))


def _record(document: str, line: bytes, text_field: str) -> Document:
    record = json.loads(line.decode())
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        raise ValueError(f'no text in a field {text_field!r} (--text_field) of {line[:60]!r}')
    text = record[text_field]
    # encode() refuses half a surrogate pair, which JSON can write and UTF-8 cannot.
    return Document(document, text, len(text.encode()))


def _decompressed(raw: BinaryIO, name: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """The content of a .jsonl file, and what is raised where it is broken."""
    if name.endswith('.gz'):
        return gzip.open(raw), (EOFError, gzip.BadGzipFile, zlib.error)
    if name.endswith('.zst'):
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(f'reading {name} needs zstandard: {_PIP}') from error
        return io.BufferedReader(_Zstandard(raw), READ_BYTES), (EOFError, zstandard.ZstdError)
    return raw, ()


class _Zstandard(io.RawIOBase):
    """The content of zstd frames. Unlike zstandard's own reader, it raises EOFError for a frame
    that is cut short."""

    def __init__(self, raw: BinaryIO):
        super().__init__()
        self._raw = raw
        self._frame = None  # the decompressor of the frame that has begun
        self._ready = memoryview(b'')
        self._rest = b''  # read, not decompressed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        import zstandard

        while not self._ready:
            block = self._rest or self._raw.read(READ_BYTES // 8)
            if not block:
                if self._frame:
                    raise EOFError('the last zstd frame is cut short')
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._rest = b''
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def _rows(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    with open_file(piece.file) as f:
        try:
            table = _parquet(f)
        except _arrow_errors() as error:
            _raise_unless_content(error)
            yield Bad(piece.file.name, '', str(error), 1, True, piece.file.size or 0)
            return
        stop = table.num_row_groups if piece.stop is None else piece.stop
        first = piece.first
        for group in range(piece.start, stop):
            n_rows = table.metadata.row_group(group).num_rows
            yield from _row_group(table, piece, group, first, n_rows, text_field)
            first += n_rows


def _row_group(
    table: 'pq.ParquetFile', piece: Piece, group: int, first: int, n_rows: int, text_field: str
) -> Iterator[Document | Bad]:
    """The documents of one row group, whose first row has the number `first` in the file."""
    import pyarrow as pa

    name, number = piece.file.name, first - 1
    if (problem := _column_problem(table.schema_arrow, text_field)) is not None:
        if n_rows:
            yield Bad(name, f'row {first}', problem, count=n_rows)
        return
    try:
        for batch in table.iter_batches(ROWS, row_groups=[group], columns=[text_field]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes, since as text one invalid row would fail the batch.
            for content in column.cast(pa.large_binary()).to_pylist():
                number += 1
                try:
                    if content is None:
                        raise ValueError(f'no text in the column {text_field!r} (--text_field)')
                    text = content.decode()
                except ValueError as error:
                    yield Bad(name, f'row {number}', str(error))
                else:
                    yield Document(f'{name}:{number}', text, len(content))
    except _arrow_errors() as error:
        _raise_unless_content(error)
        yield Bad(name, f'row {number}', str(error), first + n_rows - 1 - number, True)


def _column_problem(schema: 'pa.Schema', text_field: str) -> str | None:
    import pyarrow as pa

    if text_field not in schema.names:
        return f'no column {text_field!r} (--text_field) in {", ".join(schema.names[:20])}'
    kind = schema.field(text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    t = pa.types
    text_kinds = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary)
    if not any(is_text(kind) for is_text in text_kinds):
        return f'no text in the column {text_field!r} (--text_field), but {kind}'
    return None


def _parquet(f: BinaryIO) -> 'pq.ParquetFile':
    import pyarrow.parquet as pq

    return pq.ParquetFile(f, pre_buffer=True, page_checksum_verification=True)


def _arrow_errors() -> tuple[type[Exception], ...]:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError(f'reading Parquet needs pyarrow: {_PIP}') from error
    return (pa.ArrowException, OSError)


def _raise_unless_content(error: Exception) -> None:
    """Raises what the file system says. Arrow's plain OSError without a number is the content's."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
