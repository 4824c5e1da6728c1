"""Folders of safetensors files: checked before a number is read, read by slices, written in shards.

A file is eight bytes, the length of a JSON header as little endian; the header, {name: {'dtype',
'shape', 'data_offsets'}}; and the tensors, rows first, without gaps. Several files make a model:
model.safetensors.index.json says which one holds a tensor. The reader is this project's own: it
takes plain reads, so that host memory holds what was asked for, and no mapped pages beside it; and
it reads bfloat16 and float8, which the library's NumPy interface cannot load.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from config import ConfigError

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
LENGTH_BYTES = 8
MOST_HEADER = 100 << 20  # bytes; the library's own bound
DTYPES = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(jnp.bfloat16),
    'F8_E4M3': np.dtype(jnp.float8_e4m3fn),
    'F8_E5M2': np.dtype(jnp.float8_e5m2),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16),
    'I8': np.dtype(np.int8),
    'U64': np.dtype(np.uint64),
    'U32': np.dtype(np.uint32),
    'U16': np.dtype(np.uint16),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INSTALL_AGAIN = 'fetch the file again'


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, by its header."""

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        """Returns the bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Reads the tensor, or these rows of its first dimension, into memory of its own.

        Raises ConfigError if the file ends before them, which its header did not say.
        """
        start, shape = self.start, self.shape
        if rows != slice(None):
            first, stop, _ = rows.indices(shape[0])
            shape = (stop - first, *shape[1:])
            start += first * math.prod(shape[1:]) * self.dtype.itemsize
        out = np.empty(math.prod(shape) * self.dtype.itemsize, np.uint8)
        rest = memoryview(out)
        with open(self.file, 'rb', buffering=0) as f:
            f.seek(start)
            while rest:
                n = f.readinto(rest)
                if not n:
                    raise ConfigError(
                        f'{self.file} ends within the tensor {self.name}: {INSTALL_AGAIN}'
                    )
                rest = rest[n:]
        return out.view(self.dtype).reshape(shape)


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def read_folder(folder: str) -> dict[str, Tensor]:
    """Returns the tensors of a folder by name, from the headers of its files alone.

    Raises ConfigError, with the file and the tensor, if there is no such file, one is missing, cut
    short or has a header that cannot be true, or if index and files do not hold the same tensors.
    """
    index = os.path.join(folder, INDEX)
    if not os.path.exists(index):
        single = os.path.join(folder, SINGLE)
        if not os.path.isfile(single):
            raise ConfigError(
                f'{folder} holds neither {INDEX} nor {SINGLE}: name the folder of a model that has '
                f'its weights in safetensors files'
            )
        return read_header(single)
    where = read_index(index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(where.values())):
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            lost = [tensor for tensor, there in where.items() if there == name]
            raise ConfigError(
                f'{file} is missing; by {INDEX} it holds {len(lost)} tensors, the first of them '
                f'{lost[0]}: fetch the file'
            )
        for tensor in read_header(file).values():
            if where.get(tensor.name) != name:
                raise ConfigError(
                    f'{file} holds the tensor {tensor.name}, which {INDEX} '
                    + (f'says is in {where[tensor.name]}' if tensor.name in where else 'lacks')
                    + ': fetch both files again'
                )
            tensors[tensor.name] = tensor
    for name, file in where.items():
        if name not in tensors:
            raise ConfigError(
                f'{os.path.join(folder, file)} lacks the tensor {name}, which {INDEX} says is '
                f'there: fetch both files again'
            )
    return tensors


def read_index(path: str) -> dict[str, str]:
    """Returns the file of each tensor, by the index. Raises ConfigError if it is damaged."""
    try:
        with open(path, encoding='utf-8') as f:
            where = json.load(f)['weight_map']
        names = [*where, *where.values()]
        if not where or not all(isinstance(name, str) and name for name in names):
            raise TypeError('weight_map names a file for each tensor')
        if any(os.path.basename(name) != name for name in where.values()):
            raise TypeError('its files lie beside it')
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{path} is damaged ({error!r}): {INSTALL_AGAIN}') from error
    return where


def read_header(file: str) -> dict[str, Tensor]:
    """Returns the tensors of one file by name.

    Raises ConfigError, with file and tensor, unless the header accounts for each byte of the file
    once.
    """

    def damaged(why: str) -> ConfigError:
        return ConfigError(f'{file} is damaged: {why}: {INSTALL_AGAIN}')

    size = os.path.getsize(file)
    with open(file, 'rb') as f:
        prefix = f.read(LENGTH_BYTES)
        length = struct.unpack('<Q', prefix)[0] if len(prefix) == LENGTH_BYTES else -1
        if not 2 <= length <= min(size - LENGTH_BYTES, MOST_HEADER):
            raise damaged(f'its {size:,} bytes do not begin with the length of a header')
        content = f.read(length)
    try:
        header = json.loads(content.decode(), object_pairs_hook=_distinct)
        if not isinstance(header, dict):
            raise ValueError('it is no object')
    except ValueError as error:
        raise damaged(f'its header is no JSON ({error})') from error
    header.pop('__metadata__', None)
    begin, end, tensors = LENGTH_BYTES + length, 0, {}
    for name, entry in sorted(header.items(), key=_offset):
        tensor, (start, stop) = _tensor(name, entry, file, begin, damaged)
        if start != end:
            what = 'overlaps the one before' if start < end else 'leaves a gap before it'
            raise damaged(f'the tensor {name} begins at byte {start:,} and {what}, to {end:,}')
        if stop - start != tensor.nbytes:
            raise damaged(
                f'the tensor {name} has the type and shape of {tensor.nbytes:,} bytes, and its '
                f'offsets hold {stop - start:,}'
            )
        if begin + stop > size:
            raise damaged(
                f'the tensor {name} ends at byte {begin + stop:,}, and the file at {size:,}'
            )
        tensors[name], end = tensor, stop
    if begin + end != size:
        raise damaged(f'{size - begin - end:,} bytes behind its tensors belong to none')
    return tensors


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises ValueError if it names something twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'it names {next(n for n in names if names.count(n) > 1)} twice')
    return found


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    """Returns the offsets of a header's entry, to sort by; those of a wrong entry come first."""
    try:
        start, stop = item[1]['data_offsets']
        return int(start), int(stop)
    except (TypeError, KeyError, ValueError):
        return -1, -1


def _tensor(
    name: str, entry: Any, file: str, begin: int, damaged: Any
) -> tuple[Tensor, tuple[int, int]]:
    """Returns the tensor of a header's entry, and its offsets."""
    try:
        shape, offsets, dtype = entry['shape'], entry['data_offsets'], entry['dtype']
        start, stop = offsets
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        if not whole:
            raise ValueError('sizes and offsets are whole numbers')
    except (TypeError, KeyError, ValueError) as error:
        raise damaged(f'its header says of the tensor {name}: {entry!r}') from error
    if dtype not in DTYPES:
        raise damaged(f'the tensor {name} has the unknown type {dtype!r}')
    return Tensor(name, file, DTYPES[dtype], tuple(shape), begin + start), (start, stop)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------

Entry = tuple[str, np.dtype, tuple[int, ...]]  # name, type and shape of a tensor to be written


def split(entries: Iterable[Entry], most_bytes: int) -> list[list[Entry]]:
    """Splits tensors into files of at most this size, in their order; a larger one is alone."""
    files: list[list[Entry]] = []
    size = math.inf
    for entry in entries:
        if size + nbytes(entry) > most_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += nbytes(entry)
    return files


def file_name(i: int, n: int) -> str:
    """Returns the name of file i of n, as released models have it."""
    return SINGLE if n == 1 else f'model-{i + 1:05}-of-{n:05}.safetensors'


def header(entries: Iterable[Entry]) -> bytes:
    """Returns what stands before the tensors of a file: they begin at a multiple of 8 bytes."""
    content: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    end = 0
    for entry in entries:
        name, dtype, shape = entry
        start, end = end, end + nbytes(entry)
        content[name] = {
            'dtype': NAMES[dtype],
            'shape': list(shape),
            'data_offsets': [start, end],
        }
    text = json.dumps(content, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % LENGTH_BYTES)
    return struct.pack('<Q', len(text)) + text


def nbytes(entry: Entry) -> int:
    """Returns the bytes of a tensor."""
    return math.prod(entry[2]) * entry[1].itemsize


def write_file(path: str, entries: list[Entry], pieces: Iterator[np.ndarray]) -> None:
    """Writes a file; returns once the disk has it.

    `pieces` are the entries' arrays in their order, each whole or in parts by its rows. Those of
    later files are left.
    """
    with open(path, 'wb') as f:
        f.write(header(entries))
        for entry in entries:
            name, dtype, shape = entry
            rest = nbytes(entry)
            while rest:
                x = next(pieces)
                assert (x.dtype, x.shape[1:]) == (dtype, shape[1:]), name
                assert x.nbytes <= rest, name
                # A transposed view would be written as the memory that is behind it.
                f.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
                rest -= x.nbytes
        f.flush()
        os.fsync(f.fileno())


def index(files: Mapping[str, list[Entry]]) -> str:
    """Returns the content of the index of these files."""
    total = sum(nbytes(entry) for entries in files.values() for entry in entries)
    where = {name: file for file, entries in files.items() for name, _, _ in entries}
    content = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(where.items()))}
    return json.dumps(content, indent=2) + '\n'
