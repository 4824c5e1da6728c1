"""Reads the documents of .csv and .tsv files, a row each.

The first row names the columns. Fields are quoted as RFC 4180 says, with " and "" in it, between
commas or, in a .tsv file, tabs; line breaks in quotes belong to the text. What breaks these rules
is a bad row: read leniently, one open quote would swallow the rows after it.
"""

import csv
from collections.abc import Iterator
from typing import BinaryIO

from corpus.compression import decompressed
from corpus.files import has_kind, open_file, unpacked
from corpus.records import Bad, Document, Piece
from corpus.text_files import BOM, NO_BYTES, cut_short

FIELD_CHARACTERS = (1 << 31) - 1  # the csv module's own limit is 131,072


def rows(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    """Yields the documents of a table's rows, in the column `text_field`; ids count the rows."""
    name = piece.file.name
    with open_file(piece.file) as raw:
        content, errors = decompressed(raw, name)
        table = _Table(content, '\t' if has_kind(unpacked(name), ('.tsv',)) else ',')
        try:
            header = table.row() or []
            if not header and errors and not raw.tell():
                yield Bad(name, '', NO_BYTES, 1, True, 1)
            elif header and header.count(text_field) != 1:
                size = piece.file.size or 0
                yield Bad(name, '', _column_problem(header, text_field), 1, True, max(1, size))
            elif header:
                yield from _documents(piece, table, header, text_field)
        except errors as error:
            yield cut_short(piece.file, raw, f'line {table.line}', error)
        except csv.Error as error:
            yield Bad(name, '', f'the row of names: {error}', 1, True, piece.file.size or 1)


def _documents(
    piece: Piece, table: '_Table', header: list[str], text_field: str
) -> Iterator[Document | Bad]:
    """Yields the documents of the rows below the header."""
    name, column, number = piece.file.name, header.index(text_field), 0
    while True:
        line, start = table.line + 1, table.bytes
        try:
            row = table.row()
        except csv.Error as error:
            if table.ended:
                problem = f'a quote that opens in line {line} has no end'
                yield Bad(name, f'line {line - 1}', problem, 1, True, table.bytes - start)
                return
            number += 1
            yield Bad(name, f'line {line}', str(error))
            continue
        if row is None:
            return
        if not row:  # a blank line
            continue
        number += 1
        if len(row) != len(header):
            problem = f'{len(row)} fields in place of {len(header)}'
            yield Bad(name, f'line {line}', problem)
            continue
        try:
            n_bytes = len(row[column].encode())
        except UnicodeEncodeError:
            yield Bad(name, f'line {line}', 'the text is not UTF-8')
        else:
            yield Document(f'{unpacked(name)}:{number}', row[column], n_bytes)


def _column_problem(header: list[str], text_field: str) -> str:
    """Returns why the header names no column of text."""
    if text_field in header:
        return f'the column {text_field!r} (--text_field) occurs {header.count(text_field)} times'
    return f'no column {text_field!r} (--text_field) in {", ".join(header[:20])[:200]}'


class _Table:
    """The rows of a table; `line` and `bytes` count what they took, `ended` is True at the end."""

    def __init__(self, content: BinaryIO, delimiter: str):
        csv.field_size_limit(FIELD_CHARACTERS)
        self.line, self.bytes, self.ended = 0, 0, False
        self._rows = csv.reader(self._lines(content), delimiter=delimiter, strict=True)

    def row(self) -> list[str] | None:
        """Returns the fields of the next row, None at the end. Raises csv.Error for a bad one."""
        return next(self._rows, None)

    def _lines(self, content: BinaryIO) -> Iterator[str]:
        """Yields the lines; bytes that are no UTF-8 become surrogates: their row is bad."""
        while line := content.readline():
            self.line += 1
            self.bytes += len(line)
            text = line.removeprefix(BOM) if self.line == 1 else line
            yield text.decode('utf-8', 'surrogateescape')
        self.ended = True
