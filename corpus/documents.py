"""Reads the documents of files, cut into parts that processes can read on their own.

A file is cut into pieces: row groups of a Parquet file, byte ranges of a large .jsonl file, the
whole of any other file. A part is a list of consecutive pieces. The cut depends on the files alone,
and a part holds the same documents wherever and however often it is read, so parts can be spread
over processes and machines, and read again after a failure.

A record that cannot be read is a `Bad` among the documents, not an exception.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from corpus import csv_files, rows, tar_files, text_files
from corpus.compression import damage
from corpus.files import (
    JSON_KINDS,
    LINE_KINDS,
    READ_BYTES,
    ROW_KINDS,
    TABLE_KINDS,
    TAR_KINDS,
    File,
    open_file,
    packing,
    retry,
    with_size,
)
from corpus.records import Bad, Binary, Document, Piece

# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def cut_into_parts(
    files: Sequence[File],
    part_bytes: int,
    text_field: str = 'text',
    done: Callable[[int], None] = lambda n: None,
) -> list[list[Piece]]:
    """Cuts the files into parts of consecutive pieces, of about `part_bytes` each.

    Reads the footers of Parquet files and counts the lines of .jsonl files above `part_bytes`.
    Calls `done` with the number of files that are cut. Raises RemoteError if a remote file system
    fails.
    """
    pieces_of = functools.partial(_pieces, part_bytes=part_bytes, text_field=text_field)
    cut = []
    with ThreadPoolExecutor(16, 'cut') as threads:
        for pieces in threads.map(functools.partial(retry, pieces_of), files):
            cut.append(pieces)
            done(len(cut))
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
    if file.kind in ROW_KINDS:
        return rows.row_groups(file, text_field)
    if file.kind in LINE_KINDS and not packing(file.name) and (file.size or 0) > part_bytes:
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


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------

Item = Document | Bad | Binary
# Readers of the kinds of files that hold many documents.
_READERS: dict[str, Callable[[Piece, str], Iterator[Item]]] = {
    **dict.fromkeys(LINE_KINDS, text_files.lines),
    **dict.fromkeys(JSON_KINDS, text_files.json_values),
    **dict.fromkeys(TABLE_KINDS, csv_files.rows),
    **dict.fromkeys(TAR_KINDS, tar_files.members),
    **dict.fromkeys(ROW_KINDS, rows.rows),
}


def documents(piece: Piece, text_field: str = 'text') -> Iterator[Item]:
    """Yields the documents of a piece in order, empty ones too; blank lines are skipped.

    A null in place of a text is an empty text. A byte-order mark at the start of a file is no part
    of its text. A file that is read as text whatever its ending gives a `Binary` if it is none.
    Raises RemoteError if a remote file system fails, ConfigError if a package is missing or a local
    file cannot be opened.
    """
    file = piece.file
    if file.kind not in _READERS:
        yield text_files.whole_file(file)
    elif error := damage(file):
        # Its text may have been altered anywhere before.
        yield Bad(file.name, '', error, 1, True, max(1, file.size or 0))
    else:
        yield from _READERS[file.kind](piece, text_field)
