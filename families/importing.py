"""From a folder of a released model to the leaves of a checkpoint, a few tensors at a time."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from config import ConfigError
from families.family import Family
from families.fields import Released
from families.rules import Leaf, fill_leaf, row_wise, tensor_shape
from storage.leaves import Box, HostLeaf, chunk_shape, chunks_of
from storage.reading import windowed
from storage.safetensors import Tensor

THREADS = 4  # that read and transpose tensors; more than cores, since they wait for the disk
AHEAD_BYTES = 256 << 20  # of leaves' parts that wait to be written
PARAMS = 'params'  # the part of a state that is imported
KEPT = tuple(np.dtype(t) for t in (jnp.bfloat16, np.float16, np.float32))  # float32 holds them
BUFFERS = ('rotary_emb.inv_freq',)  # ends of names of what older releases hold, and models compute


def check_tensors(
    leaves: Iterable[Leaf], tensors: Mapping[str, Tensor], family: Family, released: Released
) -> list[str]:
    """Returns lines about tensors that are left out.

    Raises ConfigError, with all tensors that are missing, unknown, of another shape or of a type
    that float32 does not hold.
    """
    errors, used, folder = [], set(), os.path.dirname(released.where)
    for leaf in leaves:
        shape = tensor_shape(leaf.rule, leaf.part) if leaf.names else ()
        for name in leaf.names.values():
            used.add(name)
            tensor = tensors.get(name)
            if tensor is None:
                errors.append(f'{name} is in no file of {folder}')
            elif tensor.shape != shape:
                errors.append(
                    f'{name} has the shape {list(tensor.shape)} in {tensor.file}, and by '
                    f'config.json {list(shape)}'
                )
            elif tensor.dtype not in KEPT:
                errors.append(
                    f'{name} has the type {tensor.dtype} in {tensor.file}; take a release in '
                    f'bfloat16'
                )
    left_out: dict[str, list[str]] = {}
    for name in tensors.keys() - used:
        why = left_out_as(name, family, released)
        if why:
            left_out.setdefault(why, []).append(name)
        else:
            errors.append(f'{name} in {tensors[name].file} belongs to no part of the model')
    if errors:
        more = f'\n  - and {len(errors) - 10} more' if len(errors) > 10 else ''
        raise ConfigError(
            f'{folder} does not hold the {family.name} model that its config.json describes:\n'
            + '\n'.join(f'  - {error}' for error in sorted(set(errors))[:10])
            + more
        )
    return [
        f'left out: {len(names)} tensors, {why}, as {min(names)}'
        for why, names in sorted(left_out.items())
    ]


def left_out_as(name: str, family: Family, released: Released) -> str:
    """Returns what a tensor is that the model does without; '' if it is unknown."""
    for start, why in family.left_out(released).items():
        if name.startswith(start):
            return why
    if name.endswith(BUFFERS):
        return 'frequencies that the model computes'
    if name == 'lm_head.weight':  # of a model that has none
        return 'the head, which is tied to the embedding'
    return ''


def host_leaves(
    leaves: Iterable[Leaf],
    tensors: Mapping[str, Tensor],
    done: Callable[[int], None] = lambda nbytes: None,
) -> list[HostLeaf]:
    """Returns the leaves as a checkpoint saves them, in the types that the tensors have.

    Chunks are read while they are written. Of several processes, each reads what it writes, and
    calls `done` with the bytes of each chunk.
    """
    found = []
    for leaf in leaves:
        dtype = leaf_dtype(leaf, tensors)
        shape = leaf.param.shape
        chunk = chunk_shape(shape, dtype.itemsize)
        entry = {'shape': list(shape), 'dtype': dtype.name, 'chunk': chunk}
        name = f'{PARAMS}.{leaf.name}'
        found.append(HostLeaf(name, entry, chunks(leaf, tensors, chunk, dtype, done)))
    return found


def saved_bytes(leaves: Iterable[Leaf], tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes of what `host_leaves` saves, of all processes together."""
    return sum(math.prod(leaf.param.shape) * leaf_dtype(leaf, tensors).itemsize for leaf in leaves)


def leaf_dtype(leaf: Leaf, tensors: Mapping[str, Tensor]) -> np.dtype:
    """Returns the type of a leaf: that of all of its tensors, or float32, which holds them all."""
    types = {tensors[name].dtype for name in leaf.names.values()}
    return types.pop() if len(types) == 1 else np.dtype(np.float32)


def chunks(
    leaf: Leaf,
    tensors: Mapping[str, Tensor],
    chunk: list[int],
    dtype: np.dtype,
    done: Callable[[int], None],
) -> Iterator[tuple[Box, np.ndarray]]:
    """Yields this process's chunks of a leaf, read ahead of what is written."""
    boxes = list(slabs(leaf, chunk))[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(THREADS) as pool:
        tasks = (
            ((box, pool.submit(read_slab, leaf, tensors, box, dtype)), slab_bytes(box, dtype))
            for box in boxes
        )
        for box, task in windowed(tasks, AHEAD_BYTES):
            x = task.result()
            for inner in chunks_of(box, chunk):
                bounds = zip(inner, box, strict=True)
                part = x[tuple(slice(i - at, j - at) for (i, j), (at, _) in bounds)]
                yield inner, part
                done(part.nbytes)


def slab_bytes(box: Box, dtype: np.dtype) -> int:
    """Returns the bytes of the elements in a box."""
    return math.prod(j - i for i, j in box) * dtype.itemsize


def slabs(leaf: Leaf, chunk: list[int]) -> Iterator[Box]:
    """Yields boxes of whole chunks that cover a leaf, each of as few tensors as chunks allow.

    A tensor whose rows are the leaf's is read in parts, any other at once.
    """
    n, shape = leaf.counted, leaf.param.shape
    cut = n + (not leaf.names or row_wise(leaf.rule))
    steps = [*chunk[:cut], *shape[cut:]]
    starts = [range(0, size, step) for size, step in zip(shape, steps, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple((i, i + step) for i, step in zip(corner, steps, strict=True))


def read_slab(leaf: Leaf, tensors: Mapping[str, Tensor], box: Box, dtype: np.dtype) -> np.ndarray:
    """Returns the elements of a leaf in a box of `slabs`."""
    shape = tuple(j - i for i, j in box)
    if not leaf.names:
        return np.zeros(shape, dtype)
    n, rows = leaf.counted, slice(None)
    if row_wise(leaf.rule):
        rows = slice(*box[n])
    out = np.empty(shape, dtype)
    for index in itertools.product(*(range(*bounds) for bounds in box[:n])):
        x = tensors[leaf.names[index]].read(rows)
        at = tuple(i - start for i, (start, _) in zip(index, box[:n], strict=True))
        fill_leaf(leaf.rule, out[at], x)
    return out
