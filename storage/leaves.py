"""The leaves of a tree as a checkpoint holds them: names, chunks, zarr3 metadata, and their copies
in host memory."""

import dataclasses
import itertools
import math
import urllib.parse
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

CHUNK_BYTES = 16 << 20  # about the most in one file: what is copied, checked and sent at a time


COPY_THREADS = 8

Tree = Any


Box = tuple[tuple[int, int], ...]  # start and stop in each dimension


def leaf_names(tree: Tree) -> dict[str, Any]:
    """The leaves by name, the keys on their path joined by dots: 'params.blocks.0.norm'.

    Raises ValueError if two leaves would have the same name, or a key is empty.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        name = '.'.join(urllib.parse.quote(key, safe='').replace('.', '%2E') for key in keys)
        if name in named or not all(keys):
            raise ValueError(
                f'leaves of a checkpoint need distinct names without empty keys, but the path '
                f'{keys} gives {name!r}: rename its keys'
            )
        named[name or 'tree'] = leaf
    return named


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """A shard's shape cut evenly, leading dimensions first, to about CHUNK_BYTES."""
    chunk = [max(1, size) for size in shape]
    for dim, size in enumerate(chunk):
        parts = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
        if size <= parts:
            chunk[dim] = 1
        else:  # a size without a fitting divisor is left whole
            chunk[dim] //= next((k for k in range(parts, 4 * parts) if size % k == 0), 1)
    return chunk


def zarr_metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    """zarr.json of a leaf, from its entry in metadata.json."""
    fill = {'bool': False, 'complex64': [0.0, 0.0], 'complex128': [0.0, 0.0]}
    little_endian = {'name': 'bytes', 'configuration': {'endian': 'little'}}
    return {
        'zarr_format': 3,
        'node_type': 'array',
        'shape': entry['shape'],
        'data_type': entry['dtype'],
        'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': entry['chunk']}},
        'chunk_key_encoding': {'name': 'default', 'configuration': {'separator': '/'}},
        'fill_value': fill.get(entry['dtype'], 0),
        'codecs': [little_endian, {'name': 'crc32c'}],
    }


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def part(array: ts.TensorStore, box: Box) -> ts.TensorStore:
    return array[tuple(slice(*bounds) for bounds in box)]


def chunks_of(box: Box, chunk: list[int]) -> Iterator[Box]:
    """The chunks that lie in a box which begins and ends with one."""
    starts = [range(*bounds, size) for bounds, size in zip(box, chunk, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple((i, i + size) for i, size in zip(corner, chunk, strict=True))


@dataclasses.dataclass
class HostLeaf:
    """A leaf, and copies of those of its chunks that this process writes."""

    name: str
    entry: dict[str, Any]  # in metadata.json
    chunks: list[tuple[Box, np.ndarray]]


def copy_to_host(tree: Tree) -> list[HostLeaf]:
    """Copies this process's part of the tree; the transfers run side by side.

    Of replicas only the first is taken, so that each element is copied once in all. Leaves that
    are no jax arrays have to be alike on all processes; process 0 writes them.
    """
    shards, leaves = [], []
    for name, x in leaf_names(tree).items():
        key = {}
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            key, x = {'key': str(jax.random.key_impl(x))}, jax.random.key_data(x)
        if isinstance(x, jax.Array):
            found = [(s.index, s.data) for s in x.addressable_shards if s.replica_id == 0]
            chunk = chunk_shape(x.sharding.shard_shape(x.shape), x.dtype.itemsize)
            for _, shard in found:
                shard.copy_to_host_async()
        else:
            x = np.asarray(x)
            found = [((slice(None),) * x.ndim, x)] if jax.process_index() == 0 else []
            chunk = chunk_shape(x.shape, x.dtype.itemsize)
        shards.append([(box_of(index, x.shape), shard) for index, shard in found])
        entry = {'shape': list(x.shape), 'dtype': x.dtype.name, 'chunk': chunk} | key
        leaves.append(HostLeaf(name, entry, []))
    # In threads and by chunks: one core copies at less than memory's speed, more so where fresh
    # memory is faulted in, and a large leaf keeps all of them busy.
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        copies = [
            [copy for box, x in found for copy in host_copies(x, box, leaf.entry['chunk'], pool)]
            for leaf, found in zip(leaves, shards, strict=True)
        ]
    for leaf, found in zip(leaves, copies, strict=True):
        leaf.chunks = [(box, copy.result()) for box, copy in found]
    return leaves


def host_copies(
    shard: jax.Array | np.ndarray, box: Box, chunk: list[int], pool: ThreadPoolExecutor
) -> Iterator[tuple[Box, Future[np.ndarray]]]:
    """The shard's chunks, each to be copied to memory that no later step writes to."""
    host = np.asarray(shard)
    is_copy = isinstance(shard, jax.Array) and next(iter(shard.devices())).platform != 'cpu'
    copy = np.asarray if is_copy else np.array
    for inner in chunks_of(box, chunk):
        within = zip(inner, box, strict=True)
        part = tuple(slice(i - start, j - start) for (i, j), (start, _) in within)
        yield inner, pool.submit(copy, host[part], order='C')


def check_leaves(wanted: Mapping[str, Any], entries: Mapping[str, Any], where: str) -> None:
    """ValueError that lists all wanted leaves that are missing or of another shape or type."""
    errors = []
    for name, want in wanted.items():
        if name not in entries:
            errors.append(f'{name} is not there')
            continue
        shape, dtype = entries[name]['shape'], entries[name]['dtype']
        if 'key' in entries[name]:
            key = jax.random.key(0, impl=entries[name]['key'])
            shape, dtype = shape[: len(shape) - jax.random.key_data(key).ndim], key.dtype
        if (list(want.shape), str(want.dtype)) != (shape, str(dtype)):
            errors.append(f'{name} is {dtype} {shape}, asked for {want.dtype} {list(want.shape)}')
    if errors:
        raise ValueError(
            f'{where} holds other leaves than are asked for:\n'
            + '\n'.join(f'  - {e}' for e in errors)
            + '\nUse the config that it was saved with, or ask only for leaves that are alike.'
        )
