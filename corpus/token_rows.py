"""Reads token ids from files of rows: Hugging Face datasets (Arrow), Parquet, MosaicML's MDS."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from config import ConfigError
from corpus.compression import decompressed
from corpus.files import File, find_files, open_file, with_size
from corpus.records import Piece
from corpus.rows import arrow_errors, parquet, raise_unless_content, row_group_pieces
from corpus.token_documents import Block

if TYPE_CHECKING:
    import pyarrow as pa

    from corpus.token_files import TokenOptions

ROWS = 4096  # rows of a Parquet file in memory at a time
MDS_ROWS = 4096  # samples of a block
MDS_PACKINGS = {'.mds': '', '.zstd': '.zst', '.gz': '.gz', '.bz2': '.bz2'}  # by other endings
MDS_DTYPES = {8: 'u1', 9: 'i1', 16: '<u2', 17: '<i2', 32: '<u4', 33: '<i4', 64: '<u8', 65: '<i8'}

# What looking up a value raises that is not as it should be.
OTHERWISE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def sized(found: list[File], options: 'TokenOptions') -> list[File]:
    """Returns the files with their sizes."""
    return [with_size(file) for file in found]


def whole(file: File, options: 'TokenOptions') -> list[Piece]:
    """Returns a file as one piece: it can only be read from its start."""
    file = with_size(file)
    return [Piece(file, 0, None, 1, file.size or 0)]


@contextlib.contextmanager
def parsed_json(file: File) -> Iterator[Any]:
    """Gives the value of a JSON file to a body that takes from it what it should say.

    Raises ConfigError, naming the file, if it is no JSON, or the body finds something else.
    """
    with open_file(file) as f:
        content = f.read()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ConfigError(f'{file.path} is no JSON ({error}): fetch or write it again') from error
    try:
        yield value
    except ConfigError:
        raise
    except OTHERWISE as error:
        raise ConfigError(
            f'{file.path} does not say what it should ({type(error).__name__}: {error}): fetch or '
            'write it again'
        ) from error


def beside(file: File, name: str) -> File:
    """Returns the file of this name in the folder of another one."""
    folder, path = os.path.dirname(file.name), os.path.dirname(file.path)
    return File(f'{folder}/{name}' if folder else name, f'{path}/{name}')


# ---------------------------------------------------------------------------------------------
# Arrow
# ---------------------------------------------------------------------------------------------


def dataset_files(found: list[File], options: 'TokenOptions') -> list[File]:
    """Returns the .arrow files of folders that `Dataset.save_to_disk` wrote, or of a cache.

    state.json names the files of a folder, in their order; others in it are results that `map`
    has kept. Raises ConfigError for a folder of several splits, and for rows that another file
    chooses and orders.
    """
    folders: dict[str, list[File]] = {}
    for file in found:
        folders.setdefault(os.path.dirname(file.path), []).append(file)
    files = []
    for folder, inside in folders.items():
        above = beside(dataclasses.replace(inside[0], name='', path=folder), 'dataset_dict.json')
        if len(folders) > 1 and exists(above):
            raise ConfigError(
                f'{os.path.dirname(folder)} holds several splits '
                f'({", ".join(sorted(map(os.path.basename, folders)))}): name one of their folders'
            )
        state_file = beside(inside[0], 'state.json')
        if not exists(state_file):
            files += inside
            continue
        with parsed_json(state_file) as state:
            if state.get('_indices_data_files') or state.get('_indices_files'):
                raise ConfigError(
                    f'{folder} orders its rows by an index: save the dataset after '
                    'flatten_indices()'
                )
            by_name = {os.path.basename(file.path): file for file in inside}
            for entry in state.get('_data_files') or []:
                if entry['filename'] not in by_name:
                    raise ConfigError(f'{folder} lacks {entry["filename"]}, which state.json names')
                files.append(by_name[entry['filename']])
    return sized(files, options)


def exists(file: File) -> bool:
    """Returns whether a local or remote file exists."""
    if '://' not in file.path:
        return os.path.isfile(file.path)
    try:
        return bool(find_files([file.path], kinds=(os.path.basename(file.path),)))
    except ConfigError:
        return False


def arrow_blocks(piece: Piece, options: 'TokenOptions') -> Iterator[Block]:
    """Yields the record batches of an Arrow file, in either of its two forms."""
    errors = arrow_errors()
    import pyarrow as pa

    with open_file(piece.file) as f:
        source = pa.memory_map(piece.file.path) if '://' not in piece.file.path else f
        try:
            if f.read(6) == b'ARROW1':
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                f.seek(0)
                batches = pa.ipc.open_stream(source)
            yield from _arrow(batches, piece, options)
        except errors as error:
            raise_unless_content(error)
            raise ConfigError(f'{piece.file.path} is broken ({error}): fetch it again') from error


def row_groups(file: File, options: 'TokenOptions') -> list[Piece]:
    """Cuts a Parquet file into its row groups. Raises ConfigError if it has none to read."""
    errors = arrow_errors()
    file = with_size(file)
    with open_file(file) as f:
        try:
            return row_group_pieces(file, parquet(f).metadata, options.field)
        except errors as error:
            raise_unless_content(error)
            raise ConfigError(
                f'{file.path} is no Parquet file ({error}): fetch it again'
            ) from error


def parquet_blocks(piece: Piece, options: 'TokenOptions') -> Iterator[Block]:
    """Yields the rows of a Parquet file's row groups."""
    errors = arrow_errors()
    with open_file(piece.file) as f:
        try:
            table = parquet(f)
            stop = table.num_row_groups if piece.stop is None else piece.stop
            _check_column(table.schema_arrow, piece, options)
            batches = table.iter_batches(
                ROWS, row_groups=range(piece.start, stop), columns=[options.field]
            )
            yield from _arrow(batches, piece, options)
        except errors as error:
            raise_unless_content(error)
            raise ConfigError(f'{piece.file.path} is broken ({error}): fetch it again') from error


def _check_column(schema: 'pa.Schema', piece: Piece, options: 'TokenOptions') -> None:
    """Raises ConfigError if the column holds no lists of integers."""
    import pyarrow as pa

    t, path, names = pa.types, piece.file.path, schema.names
    if names.count(options.field) != 1:
        raise ConfigError(
            f'{path} has no column {options.field!r}, or several; --token_field names one of '
            f'{", ".join(names[:20])}'
        )
    kind = schema.field(options.field).type
    lists = (t.is_list, t.is_large_list, t.is_fixed_size_list)
    if not (any(is_list(kind) for is_list in lists) and t.is_integer(kind.value_type)):
        raise ConfigError(
            f'the column {options.field!r} (--token_field) of {path} holds {kind}, no lists of '
            f'integers; its columns are {", ".join(names[:20])}'
        )


def _arrow(
    batches: 'Iterator[pa.RecordBatch]', piece: Piece, options: 'TokenOptions'
) -> Iterator[Block]:
    """Yields the lists of a column, a block for each record batch. A null is an empty one.

    Raises ConfigError for a null inside a list, naming its row.
    """
    first, checked = piece.first, False
    for batch in batches:
        if not checked:
            _check_column(batch.schema, piece, options)
            checked = True
        column = batch.column(batch.schema.names.index(options.field))
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        lengths = lengths.astype(np.int64)
        ids = column.flatten()
        if ids.null_count:
            place = int(np.argmax(ids.is_null().to_numpy(zero_copy_only=False)))
            row = int(np.searchsorted(np.cumsum(lengths), place, 'right'))
            raise ConfigError(
                f'{piece.file.path}, row {first + row:,}: a null among the ids of '
                f'{options.field!r}: repair or remove it'
            )
        yield Block(ids.to_numpy(), np.cumsum(lengths) - lengths, first)
        first += len(lengths)


# ---------------------------------------------------------------------------------------------
# MDS
# ---------------------------------------------------------------------------------------------


def mds_files(found: list[File], options: 'TokenOptions') -> list[File]:
    """Returns the shards that index.json files list, in their order.

    Raises ConfigError for another format, version or column, and for a missing or cut shard.
    """
    files = []
    for index_file in found:
        with parsed_json(index_file) as index:
            if index['version'] != 2:
                raise ConfigError(
                    f'{index_file.path} has version {index["version"]}; version 2 is read'
                )
            for i, shard in enumerate(index['shards']):
                if (shard.get('format'), shard.get('version')) != ('mds', 2):
                    raise ConfigError(
                        f'{index_file.path}, shard {i}: format {shard.get("format")} of version '
                        f'{shard.get("version")}; mds of version 2 is read'
                    )
                _column(shard, options, index_file.path)
                files.append(_shard_file(index_file, shard))
    if len({file.path for file in files}) < len(files):
        raise ConfigError(f'{found[0].path} lists a shard twice')
    return files


def _shard_file(index_file: File, shard: dict[str, Any]) -> File:
    """Returns the file of a shard: the compressed one if it is there, else the other.

    Raises ConfigError if neither is there, or its size is not what the index says.
    """
    for which in ('zip_data', 'raw_data'):
        info = shard.get(which)
        if info and exists(file := beside(index_file, info['basename'])):
            file = with_size(file)
            if file.size not in (None, info['bytes']):
                raise ConfigError(
                    f'{file.path} has {file.size:,} bytes, and {index_file.path} says '
                    f'{info["bytes"]:,}: fetch it again'
                )
            return file
    raise ConfigError(
        f'{index_file.path} lists {shard["raw_data"]["basename"]}, which is not there'
    )


def _column(shard: dict[str, Any], options: 'TokenOptions', path: str) -> tuple[int, str]:
    """Returns the number of the column and its encoding. Raises ConfigError if it has no ids."""
    names, encodings = shard['column_names'], shard['column_encodings']
    if options.field not in names:
        raise ConfigError(
            f'{path} has no column {options.field!r}; --token_field names one of {", ".join(names)}'
        )
    i = names.index(options.field)
    kind, *details = encodings[i].split(':')
    if kind == 'bytes' and not options.dtype:
        raise ConfigError(
            f'{path} keeps {options.field!r} as bytes: name the type of the ids, as in '
            '--token_dtype=int64'
        )
    integers = not details or np.dtype(details[0]).kind in 'ui'
    if kind not in ('bytes', 'ndarray') or not integers:
        raise ConfigError(
            f'{path} keeps {options.field!r} as {encodings[i]}: ids are read from bytes and from '
            'ndarray of integers'
        )
    return i, encodings[i]


def mds_blocks(piece: Piece, options: 'TokenOptions') -> Iterator[Block]:
    """Yields the samples of a shard (streaming/base/format/mds/writer.py, encode_joint_shard).

    uint32: the number n of samples, and n + 1 places from the file's start on; a JSON object up to
    the first of them; the samples: uint32 sizes of the columns without a fixed one, then the values
    of all columns.
    """
    path, content = piece.file.path, _unpacked(piece.file)

    def refuse(what: str, byte: int) -> ConfigError:
        return ConfigError(f'{path}, byte {byte:,} of the shard: {what}: fetch it again')

    n = int(np.frombuffer(content, '<u4', 1)[0]) if len(content) >= 8 else 0
    if len(content) < 4 * (n + 2):
        raise refuse(f'its {len(content):,} bytes hold no {n:,} places', 0)
    places = np.frombuffer(content, '<u4', n + 1, 4).astype(np.int64)
    if places[-1] != len(content) or places[0] < 4 * (n + 2) or (np.diff(places) < 0).any():
        wrong = np.flatnonzero(np.diff(places, append=len(content)) < 0)
        at = int(wrong[0]) + 1 if len(wrong) else n
        raise refuse(f'sample {min(at, n)} of {n:,} does not end within {len(content):,}', 4 * at)
    try:
        shard = json.loads(content[4 * (n + 2) : places[0]])
        column, encoding = _column(shard, options, path)
        fixed = shard['column_sizes']
    except ConfigError:
        raise
    except OTHERWISE as error:
        raise refuse(f'its columns are not readable ({error})', 4 * (n + 2)) from error
    for start in range(0, n, MDS_ROWS):
        rows = []
        for i in range(start, min(start + MDS_ROWS, n)):
            try:
                sample = content[places[i] : places[i + 1]]
                rows.append(_decoded(_value(sample, fixed, column), encoding, options))
            except OTHERWISE as error:
                raise refuse(f'sample {i + 1} is broken ({error})', int(places[i])) from error
        lengths = np.array([len(ids) for ids in rows], np.int64)
        tokens = np.concatenate(rows)
        yield Block(tokens, np.cumsum(lengths) - lengths, start + 1)


def _value(sample: bytes, fixed: list[int | None], column: int) -> bytes:
    """Returns the value of a column. Raises ValueError if the sizes are not those of the sample."""
    n_sizes = sum(size is None for size in fixed)
    own = iter(np.frombuffer(sample, '<u4', n_sizes).tolist())
    sizes = [next(own) if size is None else size for size in fixed]
    start = 4 * n_sizes + sum(sizes[:column])
    if 4 * n_sizes + sum(sizes) != len(sample):
        raise ValueError(f'its columns take {4 * n_sizes + sum(sizes)} of {len(sample)} bytes')
    return sample[start : start + sizes[column]]


def _decoded(value: bytes, encoding: str, options: 'TokenOptions') -> np.ndarray:
    """Returns the ids of a value (streaming/base/format/mds/encodings.py, Bytes and NDArray).

    ndarray: a byte for the type, unless the encoding names it; unless it names the shape, a byte
    (dimensions * 4 + the logarithm of the size of the numbers that follow) and the shape.
    """
    kind, *details = encoding.split(':')
    if kind == 'bytes':
        return np.frombuffer(value, np.dtype(options.dtype).newbyteorder('<'))
    at = 0
    if details:
        dtype = np.dtype(details[0]).newbyteorder('<')
    else:
        dtype, at = np.dtype(MDS_DTYPES[value[0]]), 1
    if len(details) < 2:
        at += 1 + (value[at] >> 2) * (1 << value[at] % 4)
    return np.frombuffer(value, dtype, offset=at)


def _unpacked(file: File) -> bytes:
    """Returns the content of a shard. Raises ConfigError if its compression is not readable."""
    ending = os.path.splitext(file.path)[1]
    if ending not in MDS_PACKINGS:
        raise ConfigError(
            f'{file.path} is compressed as {ending}: zstd, gz and bz2 are read; decompress it'
        )
    with open_file(file) as raw:
        content, errors = decompressed(raw, file.name.removesuffix(ending) + MDS_PACKINGS[ending])
        try:
            return content.read()
        except errors as error:
            raise ConfigError(f'{file.path} is broken ({error}): fetch it again') from error
