"""Reads the documents of text files, cut into parts that processes can read on their own.

A file is cut into pieces: row groups of a Parquet file, byte ranges of a large .jsonl file, the
whole of any other file. A part is a list of consecutive pieces. The cut depends on the files alone,
and a part holds the same documents wherever and however often it is read, so parts can be spread
over processes and machines, and read again after a failure.

A record that cannot be read is a `Bad` among the documents, not an exception.
"""

import codecs
import dataclasses
import functools
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from config import ConfigError
from corpus.files import (
    INSTALL,
    LINE_KINDS,
    READ_BYTES,
    ROW_KINDS,
    File,
    has_kind,
    open_file,
    retry,
    with_size,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 256  # rows of a Parquet file in memory at a time
BOM = '\ufeff'.encode()  # the byte-order mark, which some programs write before UTF-8 text
ZSTD_WINDOW = 1 << 31  # bytes that a zstd frame may refer back to; --long=31 makes so many


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive records of one file, which belong to one part."""

    file: File
    start: int  # the first row group or byte
    stop: int | None  # the first row group or byte after the piece; None: the end of the file
    first: int  # number of the first record in its file, from 1 up
    size: int  # bytes to read


class Document(NamedTuple):
    """The text of one document, and the id that decides its split."""

    id: str  # the file's name and, in files of many documents, the number of the line or row
    text: str
    n_bytes: int  # length of the text in UTF-8


class Bad(NamedTuple):
    """A record that cannot be read, or several consecutive ones."""

    file: str  # its name
    place: str  # 'line 3' or 'row 3'; '': the file as a whole
    error: str
    count: int = 1  # lost records, as far as they can be counted
    broken: bool = False  # True: nothing after `place` can be read
    lost_bytes: int = 0  # bytes of input whose records cannot be counted

    def message(self, path: str) -> str:
        """Returns a line for the user: the file at `path`, the place, the error, the remedy."""
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
    """Cuts the files into parts of consecutive pieces, of about `part_bytes` each.

    Reads the footers of Parquet files and counts the lines of .jsonl files above `part_bytes`.
    Raises RemoteError if a remote file system fails.
    """
    pieces_of = functools.partial(_pieces, part_bytes=part_bytes, text_field=text_field)
    with ThreadPoolExecutor(16, 'cut') as threads:
        cut = list(threads.map(functools.partial(retry, pieces_of), files))
    return grouped([piece for pieces in cut for piece in pieces], part_bytes)


def grouped(pieces: Sequence[Piece], part_bytes: int) -> list[list[Piece]]:
    """Returns consecutive pieces in parts of about `part_bytes`."""
    parts: list[list[Piece]] = []
    room = 0
    for piece in pieces:
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
    """Cuts one file into the smallest pieces that parts can be made of."""
    file = with_size(file)
    if has_kind(file.name, ROW_KINDS):
        return _row_groups(file, text_field)
    if has_kind(file.name, ('.jsonl',)) and (file.size or 0) > part_bytes:
        return _byte_ranges(file, part_bytes)
    return [Piece(file, 0, None, 1, file.size or 0)]


def _byte_ranges(file: File, part_bytes: int) -> list[Piece]:
    """Cuts a .jsonl file into ranges of `part_bytes`.

    A line belongs to the range in which it starts.
    """
    pieces, breaks, last = [], 0, b''  # `breaks` line breaks and the byte `last` precede the range
    with open_file(file) as f:
        for start in range(0, file.size, part_bytes):
            stop = min(start + part_bytes, file.size)
            # The line at `start` is number 1 + breaks. It is the range's first line if it starts
            # there, after a break; else the next one is.
            first = 2 + breaks - (last == b'\n') if start else 1
            pieces.append(Piece(file, start, stop, first, stop - start))
            remaining = stop - start
            while remaining and (block := f.read(min(remaining, READ_BYTES))):
                breaks += block.count(b'\n')
                remaining -= len(block)
                last = block[-1:]
    return pieces


def _row_groups(file: File, text_field: str) -> list[Piece]:
    """Cuts a Parquet file into its row groups.

    If its footer cannot be read, returns the whole file, which `documents` then finds Bad.
    """
    with open_file(file) as f:
        try:
            metadata = parquet(f).metadata
        except arrow_errors() as error:
            raise_unless_content(error)
            return [Piece(file, 0, None, 1, file.size or 0)]
    return row_group_pieces(file, metadata, text_field)


def row_group_pieces(file: File, metadata: 'pq.FileMetaData', field: str) -> list[Piece]:
    """Returns the row groups of a Parquet file, with the sizes of one column."""
    pieces, first = [], 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        inside = f'{field}.list.'  # the integers of a column of lists
        named = [c for c in columns if f'{c.path_in_schema}.list.'.startswith(inside)]
        size = named[0].total_uncompressed_size if named else group.total_byte_size
        pieces.append(Piece(file, i, i + 1, first, size))
        first += group.num_rows
    return pieces


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------


def documents(piece: Piece, text_field: str = 'text') -> Iterator[Document | Bad]:
    """Yields the documents of a piece in order, empty ones too; blank lines are skipped.

    A null in place of a text is an empty text. A byte-order mark at the start of a file is no part
    of its text. Raises RemoteError if a remote file system fails, ConfigError if a package is
    missing or a local file cannot be opened.
    """
    if has_kind(piece.file.name, ROW_KINDS):
        yield from _rows(piece, text_field)
    elif has_kind(piece.file.name, LINE_KINDS):
        yield from _lines(piece, text_field)
    else:
        yield _whole_file(piece.file)


def _whole_file(file: File) -> Document | Bad:
    """Returns the content of a text file as one document."""
    with open_file(file) as f:
        content = f.read().removeprefix(BOM)
    try:
        return Document(file.name, content.decode(), len(content))
    except UnicodeDecodeError as error:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = ' (it starts as UTF-16 does, and what is read is UTF-8)' if utf16 else ''
        return Bad(file.name, '', f'{error}{hint}')


def _lines(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    """Yields the documents of the lines of a .jsonl file that start within the piece."""
    name = piece.file.name
    # Compression does not change the ids.
    prefix = os.path.splitext(name)[0] if has_kind(name, ('.gz', '.zst')) else name
    number, position = piece.first - 1, piece.start
    if damage := _damage(piece.file):
        # Its text may have been altered anywhere before.
        yield Bad(name, '', damage, 1, True, max(1, piece.file.size or 0))
        return
    with open_file(piece.file) as raw:
        if piece.start:
            raw.seek(piece.start - 1)
            position += len(raw.readline()) - 1  # skip a line that started in the piece before
        lines, errors = _decompressed(raw, name)
        while piece.stop is None or position < piece.stop:
            try:
                line = lines.readline()
            except errors as error:
                lost = max(1, (piece.file.size or 0) - raw.tell())
                yield Bad(name, f'line {number}', str(error), 1, True, lost)
                return
            if not line and errors and not raw.tell():  # compressed text has bytes, even of nothing
                yield Bad(
                    name, 'line 0', 'the file has no bytes, so no compressed text', 1, True, 1
                )
            if not line:
                return
            position += len(line)
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                try:
                    yield _record(f'{prefix}:{number}', line, text_field)
                except (ValueError, RecursionError) as error:  # bad UTF-8, JSON or record
                    yield Bad(name, f'line {number}', str(error))


def _record(document: str, line: bytes, text_field: str) -> Document:
    """Parses a line of a .jsonl file. Raises ValueError or RecursionError if it is bad."""
    record = json.loads(line.decode())
    path = (text_field,)
    if isinstance(record, dict) and text_field not in record:
        path = text_field.split('.')  # of a text inside an object, 'doc.text'
    text = record
    for i, name in enumerate(path):
        if text is None and i:
            break  # a null in place of the object that holds the text
        if not isinstance(text, dict) or name not in text:
            raise ValueError(f'no text in a field {text_field!r} (--text_field) of {line[:60]!r}')
        text = text[name]
    text = '' if text is None else text
    if not isinstance(text, str):
        raise ValueError(f'no text in a field {text_field!r} (--text_field) of {line[:60]!r}')
    # encode() raises for half a surrogate pair, which JSON can express and UTF-8 cannot.
    return Document(document, text, len(text.encode()))


def _damage(file: File) -> str:
    """Returns the error of a compressed file with corrupt data, '' for a good or a plain file.

    Reads a compressed file to its end, since the checksum, which shows that the text was altered,
    comes after the text. A file that is cut short has no checksum left, and counts as good so far.
    """
    if not has_kind(file.name, ('.gz', '.zst')):
        return ''
    with open_file(file) as raw:
        content, errors = _decompressed(raw, file.name)
        try:
            while content.read(READ_BYTES):
                pass
        except EOFError:
            return ''
        except errors as error:
            return str(error) or type(error).__name__
    return ''


def _decompressed(raw: BinaryIO, name: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """Returns the content of a .jsonl file, and the exceptions that broken compression raises."""
    if has_kind(name, ('.gz',)):
        return gzip.open(raw), (EOFError, gzip.BadGzipFile, zlib.error)
    if has_kind(name, ('.zst',)):
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f'reading {name} needs zstandard: {INSTALL}') from error
        return io.BufferedReader(_Zstandard(raw), READ_BYTES), (EOFError, zstandard.ZstdError)
    return raw, ()


class _Zstandard(io.RawIOBase):
    """The content of consecutive zstd frames.

    Unlike zstandard's own reader, raises EOFError for a frame that is cut short.
    """

    def __init__(self, raw: BinaryIO):
        super().__init__()
        self._raw = raw
        self._frame = None  # decompressor of the current frame; None between frames
        self._ready = memoryview(b'')  # decompressed, not yet returned
        self._rest = b''  # compressed, read beyond the end of the last frame

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
            if not self._frame:
                self._frame = zstandard.ZstdDecompressor(
                    max_window_size=ZSTD_WINDOW
                ).decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._rest = b''
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n


def _rows(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    """Yields the documents of the rows of a Parquet file's row groups."""
    with open_file(piece.file) as f:
        try:
            table = parquet(f)
        except arrow_errors() as error:
            raise_unless_content(error)
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
    """Yields the documents of one row group, whose first row is row `first` of the file."""
    name, number = piece.file.name, first - 1
    if (problem := _column_problem(table.schema_arrow, text_field)) is not None:
        if n_rows:
            yield Bad(name, f'row {first}', problem, count=n_rows)
        return
    try:
        for batch in table.iter_batches(ROWS, row_groups=[group], columns=[text_field]):
            for content in _contents(batch, text_field):
                number += 1
                try:
                    text = content.decode()
                except ValueError as error:
                    yield Bad(name, f'row {number}', str(error))
                else:
                    yield Document(f'{name}:{number}', text, len(content))
    except arrow_errors() as error:
        raise_unless_content(error)
        yield Bad(name, f'row {number}', str(error), first + n_rows - 1 - number, True)


def _contents(batch: 'pa.RecordBatch', text_field: str) -> list[bytes]:
    """Returns the UTF-8 of the rows' texts; that of a null is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column_name, *inner = _path(batch.schema, text_field)
    column = batch.column(column_name)
    if inner:
        column = pc.struct_field(column, inner)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    # Cast to bytes, because a cast to text fails for the whole batch if one row is invalid.
    return [content or b'' for content in column.cast(pa.large_binary()).to_pylist()]


def _path(schema: 'pa.Schema', text_field: str) -> list[str]:
    """Returns the column's name, and the names of the fields that lead to the text inside it."""
    return [text_field] if text_field in schema.names else text_field.split('.')


def _column_problem(schema: 'pa.Schema', text_field: str) -> str | None:
    """Returns why the column holds no text, or None if it does."""
    import pyarrow as pa

    t, names = pa.types, schema.names
    fields = [schema.field(i) for i in range(len(names))]
    for name in _path(schema, text_field):
        found = [field for field in fields if field.name == name]
        if not found:
            return f'no column {text_field!r} (--text_field) in {", ".join(names[:20])}'
        if len(found) > 1:
            return f'the column {name!r} (--text_field) occurs {len(found)} times'
        kind = found[0].type
        fields = list(kind.fields) if t.is_struct(kind) else []
    kind = kind.value_type if t.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    text_kinds = (
        t.is_string, t.is_large_string, t.is_string_view,
        t.is_binary, t.is_large_binary, t.is_binary_view, t.is_null,
    )  # fmt: skip
    if not any(is_text(kind) for is_text in text_kinds):
        inside = f'; a field of it is named as {text_field}.NAME' if t.is_struct(kind) else ''
        return f'no text in the column {text_field!r} (--text_field), but {kind}{inside}'
    return None


def parquet(f: BinaryIO) -> 'pq.ParquetFile':
    """Opens a Parquet file, whose checksums will be verified."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(f, pre_buffer=True, page_checksum_verification=True)


def arrow_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions of pyarrow. Raises ConfigError if it is not installed."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ConfigError(f'reading Parquet needs pyarrow: {INSTALL}') from error
    return (pa.ArrowException, OSError)


def raise_unless_content(error: Exception) -> None:
    """Raises the error again if the file system caused it, and not the file's content.

    For broken content pyarrow raises a plain OSError without an error number.
    """
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
