"""From a checkpoint to a folder in the layout of a released model, a few tensors at a time."""

import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from config import ConfigError
from families.importing import AHEAD_BYTES, THREADS
from families.rules import Leaf, fill_tensor, row_wise, tensor_shape
from machine.progress import Progress
from storage.leaves import Box
from storage.reading import Reader, windowed
from storage.safetensors import INDEX, Entry, file_name, index, nbytes, split, write_file

PIECE_BYTES = 64 << 20
TYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(jnp.bfloat16)}


class Saved(NamedTuple):
    """The parameters of a step: what reads them, where they are in the state, and metadata.json's
    entries."""

    reader: Reader
    at: str  # before a leaf's name
    entries: Mapping[str, Any]

    def read(self, leaf: Leaf, place: tuple[int, ...], rows: slice = slice(None)) -> np.ndarray:
        """Returns a part of a leaf, by the index of its first dimensions, or some of its rows.

        Blocks are [chunks, blocks / chunks, ...] in the checkpoints of pipelines with several
        chunks.
        """
        name = self.at + leaf.name
        entry = self.entries[name]
        shape = entry['shape']
        if len(shape) > len(leaf.param.shape):
            place = (*divmod(place[0], shape[1]), *place[1:])
        bounds = [(0, n) for n in shape[len(place) :]]
        bounds[0] = rows.indices(bounds[0][1])[:2]
        box: Box = (*((i, i + 1) for i in place), *bounds)
        return self.reader.read_box(name, entry, box).reshape([j - i for i, j in bounds])

    def chunk_rows(self, part: 'Part') -> int:
        """Returns how many rows of the part a chunk has."""
        entry = self.entries[self.at + part.leaf.name]
        return entry['chunk'][len(entry['shape']) - len(part.leaf.part)]

    def dtype(self, leaf: Leaf) -> np.dtype:
        """Returns the type of a leaf in the checkpoint."""
        return jnp.dtype(self.entries[self.at + leaf.name]['dtype'])


class Part(NamedTuple):
    """The part of a leaf that is in a tensor."""

    leaf: Leaf
    place: tuple[int, ...]


def tensors_of(leaves: list[Leaf]) -> dict[str, list[Part]]:
    """Returns the parts of each tensor, in the order of the model's layers."""
    found: dict[str, list[Part]] = {}
    for leaf in leaves:
        for place, name in leaf.names.items():
            found.setdefault(name, []).append(Part(leaf, place))
    return dict(sorted(found.items(), key=lambda item: in_order(item[0])))


def in_order(name: str) -> tuple:
    """Returns what tensors are sorted by: embedding, layers by number, norm, head."""
    words = re.split(r'(\d+)', name)
    first = ['embed' not in name, 'layers' not in name, 'lm_head' in name]
    return (*first, [(int(w), '') if w.isdigit() else (-1, w) for w in words])


def entry_of(name: str, parts: list[Part], saved: Saved, dtype: str) -> Entry:
    """Returns name, type and shape of a tensor; dtype '' leaves types as they are in the
    checkpoint.

    What releases keep in float32 stays so whatever the type of the others.
    """
    rule = parts[0].leaf.rule
    if not dtype:
        kind = np.result_type(*(saved.dtype(part.leaf) for part in parts))
    else:
        kind = TYPES['float32' if rule.float32 else dtype]
    return name, kind, tensor_shape(rule, parts[0].leaf.part)


def pieces(entry: Entry, parts: list[Part], saved: Saved) -> Iterator[tuple[int, slice]]:
    """Yields the bytes and the rows of pieces in which a tensor is made: it is one, unless rows of
    the tensor are rows of its leaves. Then a piece is of whole chunks."""
    rows = entry[2][0]
    step = rows
    if all(row_wise(part.leaf.rule) for part in parts):
        chunk = saved.chunk_rows(parts[0])
        step = max(1, rows * PIECE_BYTES // max(nbytes(entry), 1) // chunk) * chunk
    for i in range(0, rows, step):
        n = min(step, rows - i)
        yield nbytes(entry) // rows * n, slice(i, i + n)


def assemble(entry: Entry, parts: list[Part], rows: slice, saved: Saved) -> np.ndarray:
    """Returns rows of a tensor, of its parts."""
    _, dtype, shape = entry
    whole = rows == slice(0, shape[0])
    out = np.empty((rows.stop - rows.start, *shape[1:]), dtype)
    for leaf, place in parts:
        x = saved.read(leaf, place, slice(None) if whole else rows)
        fill_tensor(leaf.rule, out, x.astype(dtype, copy=False))
    return out


def check_zeros(leaves: list[Leaf], saved: Saved) -> None:
    """Raises ConfigError if a leaf that no tensor holds is not all zeros."""
    for leaf in leaves:
        if not leaf.names and np.any(saved.read(leaf, ())):
            raise ConfigError(
                f'{leaf.name} is not all zeros, and models of the family have no tensor for it: '
                f'train with model.bias_rate=0, or export as a family that has one (--family)'
            )


def write_weights(
    folder: str, leaves: list[Leaf], saved: Saved, dtype: str, most_bytes: int
) -> int:
    """Writes all tensors and their index, and says how far it is; returns their bytes."""
    tensors = tensors_of(leaves)
    entries = {name: entry_of(name, parts, saved, dtype) for name, parts in tensors.items()}
    groups = split(entries.values(), most_bytes)
    files = {file_name(i, len(groups)): group for i, group in enumerate(groups)}
    total = sum(nbytes(entry) for entry in entries.values())
    with Progress('writing weights', total) as progress:
        made = counted(made_ahead(list(entries.values()), tensors, saved), progress)
        for file, group in files.items():
            write_file(os.path.join(folder, file), group, made)
    if len(files) > 1:
        with open(os.path.join(folder, INDEX), 'w', encoding='utf-8') as f:
            f.write(index(files))
            f.flush()
            os.fsync(f.fileno())
    return total


def counted(pieces: Iterator[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    """Yields the pieces, and tells the progress of each once it is written."""
    for piece in pieces:
        yield piece
        progress.add(piece.nbytes)


def made_ahead(
    entries: list[Entry], tensors: Mapping[str, list[Part]], saved: Saved
) -> Iterator[np.ndarray]:
    """Yields the tensors' pieces in order, made ahead of what is written."""
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = (
            (pool.submit(assemble, entry, tensors[entry[0]], rows, saved), size)
            for entry in entries
            for size, rows in pieces(entry, tensors[entry[0]], saved)
        )
        for task in windowed(tasks, AHEAD_BYTES):
            yield task.result()
