"""Reads the documents of Parquet files, a row each."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from config import ConfigError
from corpus.files import INSTALL, File, open_file
from corpus.records import Bad, Document, Piece

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 256  # rows of a Parquet file in memory at a time


def row_groups(file: File, text_field: str) -> list[Piece]:
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


def rows(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
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
    return (pa.ArrowException, OSError, UnicodeDecodeError)  # the last: a name in a schema


def raise_unless_content(error: Exception) -> None:
    """Raises the error again if the file system caused it, and not the file's content.

    For broken content pyarrow raises a plain OSError without an error number.
    """
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error
