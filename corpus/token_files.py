"""Files of token ids as other codebases write them: the options of a job, the table of formats.

Those whose tokens lie one after the other are read by corpus/token_flat.py, those with a row for
each record by corpus/token_rows.py.

A file is cut into pieces, as text is (corpus/documents.py): ranges of records or of tokens, row
groups of a Parquet file, or the file as a whole.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from config import ConfigError
from corpus.documents import grouped
from corpus.files import File, find_files, retry, with_size
from corpus.records import Piece
from corpus.token_documents import Block, as_stream
from corpus.token_flat import (
    Flat,
    check_levanter,
    check_megatron,
    flat_blocks,
    flat_pieces,
    open_levanter,
    open_llmc,
    open_megatron,
    open_nanogpt,
)
from corpus.token_rows import (
    arrow_blocks,
    dataset_files,
    mds_blocks,
    mds_files,
    parquet_blocks,
    row_groups,
    sized,
    whole,
)

BORDERS = ('records', 'end_of_text')


@dataclasses.dataclass(frozen=True)
class TokenOptions:
    """The facts about token files that they do not say themselves."""

    format: str  # one of FORMATS
    field: str = ''  # column of rows; '': the format's usual one
    dtype: str = ''  # of ids in files that do not say it: nanogpt, and bytes in mds
    end_of_text: int = -1  # id that ends or starts documents in the files; -1: the vocabulary's
    borders: str = ''  # one of BORDERS; '': records, if the format has them

    def ends(self, end: int) -> list[int]:
        """Returns the ids that no document holds; `end` is the vocabulary's end-of-text token."""
        return sorted({end, self.end_of_text} - {-1})


class Format(NamedTuple):
    """A format: its files, and the functions that read them."""

    endings: tuple[str, ...]  # of the files to look for
    field: str  # its usual column of tokens; '': it has none
    records: bool  # False: end-of-text tokens alone separate documents
    needs_dtype: bool
    files: Callable[[list[File], TokenOptions], list[File]]  # those with tokens, of those found
    pieces: Callable[[File, TokenOptions, int], list[Piece]]  # (file, options, bytes of a part)
    blocks: Callable[[Piece, TokenOptions, Sequence[int]], Iterator[Block]]  # (..., end tokens)
    flat: Callable[[File, TokenOptions], Flat] | None = None  # of one that can be read anywhere


def checked_options(options: TokenOptions) -> TokenOptions:
    """Returns the options with the format's own values filled in.

    Raises ConfigError for what does not fit together.
    """
    if options.format not in FORMATS:
        raise ConfigError(f'format={options.format!r} is none of {", ".join(FORMATS)}')
    kind = FORMATS[options.format]
    if options.field and not kind.field:
        raise ConfigError(
            f'{options.format} files have no columns: leave out token_field={options.field}'
        )
    if options.borders not in ('', *BORDERS):
        raise ConfigError(f'borders={options.borders!r} is none of {", ".join(BORDERS)}')
    if options.borders == 'records' and not kind.records:
        raise ConfigError(
            f'{options.format} files have no records, only end-of-text tokens between documents: '
            'use borders=end_of_text'
        )
    if options.dtype:
        if not (kind.needs_dtype or options.format == 'mds'):
            raise ConfigError(
                f'{options.format} files say the type of their ids: leave out '
                f'token_dtype={options.dtype}'
            )
        try:
            integer = np.dtype(options.dtype).kind in 'ui'
        except TypeError:
            integer = False
        if not integer:
            raise ConfigError(f'token_dtype={options.dtype} is no type of integers: use uint16')
    if kind.needs_dtype and not options.dtype:
        raise ConfigError(
            f'{options.format} files do not say the type of their ids: name it by '
            '--token_dtype=uint16, or in a path for training by dtype=uint16'
        )
    if options.end_of_text < -1:
        raise ConfigError(f'end_of_text={options.end_of_text} is no id')
    return dataclasses.replace(
        options,
        field=options.field or kind.field,
        borders=options.borders or ('records' if kind.records else 'end_of_text'),
    )


def is_flat(options: TokenOptions) -> bool:
    """Returns whether ids are read as arrays, outside the interpreter, and not row by row."""
    return FORMATS[options.format].flat is not None


def find_token_files(
    patterns: Sequence[str], options: TokenOptions, said: str = '--input='
) -> list[File]:
    """Returns the files with tokens of paths, folders, globs and URLs, with sizes.

    A Megatron prefix may be given without .bin. Raises ConfigError if there are none, where `said`
    stands before a pattern.
    """
    kind = FORMATS[options.format]
    named = []
    for pattern in patterns:
        prefix = options.format == 'megatron' and not os.path.exists(pattern)
        named.append(f'{pattern}.bin' if prefix and os.path.exists(f'{pattern}.bin') else pattern)
    found = find_files(named, kinds=kind.endings, said=said)
    return kind.files(found, options)


def cut_tokens(files: Sequence[File], options: TokenOptions, part_bytes: int) -> list[list[Piece]]:
    """Cuts files into parts of about `part_bytes`, as `cut_into_parts` does those of text.

    Checks headers, indices and sizes: raises ConfigError for a file that is not what its format
    says, before anything is written; RemoteError if a remote file system fails.
    """
    pieces_of = functools.partial(
        FORMATS[options.format].pieces, options=options, part_bytes=part_bytes
    )
    with ThreadPoolExecutor(16, 'cut') as threads:
        cut = list(threads.map(functools.partial(retry, pieces_of), files))
    return grouped([piece for pieces in cut for piece in pieces], part_bytes)


def blocks(piece: Piece, options: TokenOptions, ends: Sequence[int]) -> Iterator[Block]:
    """Yields the tokens of a piece as blocks of whole documents, in order."""
    yield from FORMATS[options.format].blocks(piece, options, ends)


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def _flat_format(
    endings: tuple[str, ...],
    records: bool,
    opened: Callable[[File, TokenOptions], Flat],
    check: Callable[[File, TokenOptions], File] = lambda file, options: with_size(file),
    **more: Any,
) -> Format:
    """Returns the format of flat files. `check` checks a file once, and returns it with a version
    that changes with all that it consists of."""

    def files(found: list[File], options: TokenOptions) -> list[File]:
        return [retry(check, file, options) for file in found]

    def pieces(file: File, options: TokenOptions, part_bytes: int) -> list[Piece]:
        return flat_pieces(opened(file, options), options, part_bytes)

    def blocks(piece: Piece, options: TokenOptions, ends: Sequence[int]) -> Iterator[Block]:
        flat = opened(piece.file, options)
        yield from flat_blocks(flat, piece.start, piece.stop, options, ends)

    values = {'field': '', 'needs_dtype': False, 'flat': opened} | more
    return Format(endings, records=records, files=files, pieces=pieces, blocks=blocks, **values)


def _row_format(
    ending: str,
    field: str,
    files: Callable[[list[File], TokenOptions], list[File]],
    pieces: Callable[[File, TokenOptions], list[Piece]],
    blocks: Callable[[Piece, TokenOptions], Iterator[Block]],
) -> Format:
    """Returns a format whose files hold a row for each record."""

    def cut(file: File, options: TokenOptions, part_bytes: int) -> list[Piece]:
        found = pieces(file, options)
        if options.borders == 'records' or len(found) < 2:
            return found
        return [Piece(file, 0, None, 1, sum(piece.size for piece in found))]

    def read(piece: Piece, options: TokenOptions, ends: Sequence[int]) -> Iterator[Block]:
        found = blocks(piece, options)
        return found if options.borders == 'records' else as_stream(found, ends)

    return Format((ending,), field, True, False, files, cut, read)


FORMATS = {
    'megatron': _flat_format(('.bin',), True, open_megatron, check_megatron),
    'llmc': _flat_format(('.bin',), False, open_llmc),
    'nanogpt': _flat_format(('.bin',), False, open_nanogpt, needs_dtype=True),
    'levanter': _flat_format(
        ('shard_ledger.json',),
        True,
        open_levanter,
        check_levanter,
        field='input_ids',
    ),
    'datasets': _row_format('.arrow', 'input_ids', dataset_files, whole, arrow_blocks),
    'parquet': _row_format('.parquet', 'input_ids', sized, row_groups, parquet_blocks),
    'mds': _row_format('index.json', 'tokens', mds_files, whole, mds_blocks),
}
