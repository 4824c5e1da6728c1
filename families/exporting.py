"""From a checkpoint to a folder in the layout of a released model, a few tensors at a time."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from config import ConfigError
from families.importing import AHEAD_BYTES, THREADS
from families.rules import Leaf, fill_tensor, tensor_shape
from storage.leaves import Box
from storage.reading import Reader, windowed
from storage.safetensors import INDEX, Entry, file_name, index, split, write_file

TYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(jnp.bfloat16)}


class Saved(NamedTuple):
    """The parameters of a step: what reads them, where they are in the state, and metadata.json's
    entries."""

    reader: Reader
    at: str  # before a leaf's name
    entries: Mapping[str, Any]

    def read(self, leaf: Leaf, place: tuple[int, ...]) -> np.ndarray:
        """Returns a part of a leaf, by the index of its first dimensions.

        Blocks are [chunks, blocks / chunks, ...] in the checkpoints of pipelines with several
        chunks.
        """
        name = self.at + leaf.name
        entry = self.entries[name]
        shape = entry['shape']
        if len(shape) > len(leaf.param.shape):
            place = (*divmod(place[0], shape[1]), *place[1:])
        box: Box = (*((i, i + 1) for i in place), *((0, n) for n in shape[len(place) :]))
        return self.reader.read_box(name, entry, box).reshape(shape[len(place) :])

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


def assemble(entry: Entry, parts: list[Part], saved: Saved) -> np.ndarray:
    """Returns a tensor of its parts."""
    _, dtype, shape = entry
    out = np.empty(shape, dtype)
    for leaf, place in parts:
        x = saved.read(leaf, place).astype(dtype, copy=False)
        fill_tensor(leaf.rule, out, x)
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
    """Writes all tensors and their index; returns their bytes."""
    tensors = tensors_of(leaves)
    entries = {name: entry_of(name, parts, saved, dtype) for name, parts in tensors.items()}
    groups = split(entries.values(), most_bytes)
    files = {file_name(i, len(groups)): group for i, group in enumerate(groups)}
    arrays = made_ahead(list(entries.values()), tensors, saved)
    for file, group in files.items():
        write_file(os.path.join(folder, file), group, itertools.islice(arrays, len(group)))
    if len(files) > 1:
        with open(os.path.join(folder, INDEX), 'w', encoding='utf-8') as f:
            f.write(index(files))
    return sum(nbytes(entry) for entry in entries.values())


def nbytes(entry: Entry) -> int:
    """Returns the bytes of a tensor."""
    return int(np.prod(entry[2], dtype=np.int64)) * entry[1].itemsize


def made_ahead(
    entries: list[Entry], tensors: Mapping[str, list[Part]], saved: Saved
) -> Iterator[np.ndarray]:
    """Yields the tensors in order, made ahead of what is written."""
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = (
            (pool.submit(assemble, entry, tensors[entry[0]], saved), nbytes(entry))
            for entry in entries
        )
        for task in windowed(tasks, AHEAD_BYTES):
            yield task.result()
