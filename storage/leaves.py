"""Leaves of a tree as a checkpoint holds them: names, chunks, zarr3 metadata, and their way to host
memory and back to devices."""

import dataclasses
import itertools
import math
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.sharding import Sharding, SingleDeviceSharding

from config import ConfigError

CHUNK_BYTES = 16 << 20  # about the largest file: chunks are copied, checked and sent one by one
CRC_BYTES = 4  # of the crc32c behind a chunk's elements
WIDENED = {'float32': ('bfloat16', 'float16')}  # types that restore as another one, exactly

Tree = Any
Box = tuple[tuple[int, int], ...]  # start and stop in each dimension


# ---------------------------------------------------------------------------------------------
# Names, boxes, metadata
# ---------------------------------------------------------------------------------------------


def leaf_names(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by name: the keys on their path joined by dots, 'params.blocks.0.norm'.

    A tree that is one leaf is named 'tree'. Raises ValueError if two leaves would have the same
    name, or a key is empty.
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
    """Cuts a shard's shape evenly, leading dimensions first, to chunks of about CHUNK_BYTES."""
    chunk = [max(1, size) for size in shape]
    for dim, size in enumerate(chunk):
        parts = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
        if size <= parts:
            chunk[dim] = 1
        else:  # a size without a fitting divisor is left whole
            chunk[dim] //= next((k for k in range(parts, 4 * parts) if size % k == 0), 1)
    return chunk


def zarr_metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a leaf's zarr.json, made from its entry in metadata.json."""
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
    """Returns the bounds of a shard's index, which may leave start and stop open."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def part(array: ts.TensorStore, box: Box) -> ts.TensorStore:
    """Returns a view of the array's elements in the box; nothing is read."""
    return array[tuple(slice(*bounds) for bounds in box)]


def chunks_of(box: Box, chunk: list[int]) -> Iterator[Box]:
    """Yields the chunks in a box whose bounds lie on bounds of chunks."""
    starts = [range(*bounds, size) for bounds, size in zip(box, chunk, strict=True)]
    for corner in itertools.product(*starts):
        yield tuple((i, i + size) for i, size in zip(corner, chunk, strict=True))


def chunks_across(boxes: Iterable[Box], chunk: list[int]) -> Iterator[tuple[int, ...]]:
    """Yields the chunks that hold elements of the boxes, each once, by their place in the grid."""
    ranges = [
        [range(i // size, -(-j // size)) for (i, j), size in zip(box, chunk, strict=True)]
        for box in boxes
    ]
    yield from dict.fromkeys(itertools.chain(*(itertools.product(*r) for r in ranges)))


def chunk_number(place: tuple[int, ...], entry: Mapping[str, Any]) -> int:
    """Returns a chunk's number in the grid, rows first."""
    number = 0
    for i, size, chunk in zip(place, entry['shape'], entry['chunk'], strict=True):
        number = number * -(-size // chunk) + i
    return number


def count_chunks(entry: Mapping[str, Any]) -> int:
    """Returns the number of chunks of a leaf."""
    sizes = zip(entry['shape'], entry['chunk'], strict=True)
    return math.prod(-(-size // chunk) for size, chunk in sizes)


def chunk_bytes(entry: Mapping[str, Any]) -> int:
    """Returns the bytes of a chunk's elements, behind which its crc32c stands."""
    return math.prod(entry['chunk']) * jnp.dtype(entry['dtype']).itemsize


def chunk_file(name: str, place: tuple[int, ...]) -> str:
    """Returns the file of a leaf's chunk, as seen from its step's folder."""
    return '/'.join(['arrays', name, 'c', *map(str, place)])


# ---------------------------------------------------------------------------------------------
# To host memory
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class HostLeaf:
    """A leaf of the tree, with host copies of the chunks that this process writes."""

    name: str
    entry: dict[str, Any]  # in metadata.json
    chunks: list[tuple[Box, np.ndarray]] | Iterator[tuple[Box, np.ndarray]]  # made as they go
    finite: bool = False  # numbers that are not finite are refused: see `check_finite`

    def taken(self) -> Iterator[tuple[Box, np.ndarray]]:
        """Yields the chunks and drops them, so that the memory of each is free once it is
        written."""
        if not isinstance(self.chunks, list):
            yield from self.chunks
            return
        while self.chunks:
            yield self.chunks.pop()


class NotFiniteError(Exception):
    """A leaf holds NaN or infinity, and is to be finite."""


def check_finite(name: str, box: Box, x: np.ndarray) -> None:
    """Raises NotFiniteError, with the place in the leaf of this name, if a chunk of it, in this
    box, holds NaN or infinity. Takes one pass and no memory where it does not."""
    if not (jnp.issubdtype(x.dtype, jnp.floating) and x.size):
        return
    with np.errstate(invalid='ignore'):  # ml_dtypes says when it meets NaN
        if math.isfinite(x.min()) and math.isfinite(x.max()):  # NaN is the least and the largest
            return
    at = np.argwhere(~np.isfinite(x))[0]
    place = [int(i) + start for i, (start, _) in zip(at, box, strict=True)]
    raise NotFiniteError(f'the leaf {name} holds {x[tuple(at)]} at {place}')


def copy_to_host(tree: Tree, finite: bool = False) -> list[HostLeaf]:
    """Copies this process's part of the tree to host memory; the transfers run side by side.
    `finite` as in HostLeaf.

    Takes only the first of each shard's replicas, so that all processes together copy each element
    once. Leaves that are not jax arrays have to be alike on all processes; process 0 writes them.
    """
    found = {name: entry_and_shards(x) for name, x in leaf_names(tree).items()}
    return [
        HostLeaf(
            name,
            entry,
            [c for box, x in shards for c in host_chunks(x, box, entry['chunk'])],
            finite,
        )
        for name, (entry, shards) in found.items()
    ]


def entry_and_shards(
    x: Any,
) -> tuple[dict[str, Any], list[tuple[Box, jax.Array | np.ndarray]]]:
    """Returns a leaf's entry in metadata.json, and the shards that this process writes.

    The shards' transfers to the host are started.
    """
    key = {}
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        key, x = {'key': str(jax.random.key_impl(x))}, jax.random.key_data(x)
    if isinstance(x, jax.Array):
        shards = [(s.index, s.data) for s in x.addressable_shards if s.replica_id == 0]
        chunk = chunk_shape(x.sharding.shard_shape(x.shape), x.dtype.itemsize)
        for _, shard in shards:
            shard.copy_to_host_async()
    else:
        x = np.asarray(x)
        shards = [((slice(None),) * x.ndim, x)] if jax.process_index() == 0 else []
        chunk = chunk_shape(x.shape, x.dtype.itemsize)
    entry = {'shape': list(x.shape), 'dtype': x.dtype.name, 'chunk': chunk} | key
    return entry, [(box_of(index, x.shape), shard) for index, shard in shards]


def host_chunks(
    shard: jax.Array | np.ndarray, box: Box, chunk: list[int]
) -> Iterator[tuple[Box, np.ndarray]]:
    """Yields the shard's chunks in host memory that no later step writes to.

    A shard on a CPU is its own host memory and is not copied: while something refers to a buffer
    from outside, XLA:CPU does not let a step that takes the buffer as its own (donation) write
    there, but gives the step new memory. That costs as much memory as a copy, and no time here.
    """
    host = np.asarray(shard) if isinstance(shard, jax.Array) else np.array(shard)
    for inner in chunks_of(box, chunk):
        bounds = zip(inner, box, strict=True)
        yield inner, host[tuple(slice(i - start, j - start) for (i, j), (start, _) in bounds)]


# ---------------------------------------------------------------------------------------------
# From host memory
# ---------------------------------------------------------------------------------------------


def check_leaves(wanted: Mapping[str, Any], entries: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError, which lists all wanted leaves that are missing or of another shape or
    type in metadata.json's `entries`."""
    errors = []
    for name, want in wanted.items():
        if name not in entries:
            errors.append(f'{name} is not there')
            continue
        shape, dtype = entries[name]['shape'], entries[name]['dtype']
        if 'key' in entries[name]:
            key = jax.random.key(0, impl=entries[name]['key'])
            shape, dtype = shape[: len(shape) - jax.random.key_data(key).ndim], key.dtype
        same = str(want.dtype) == str(dtype) or str(dtype) in WIDENED.get(str(want.dtype), ())
        if list(want.shape) != shape or not same:
            errors.append(f'{name} is {dtype} {shape}, asked for {want.dtype} {list(want.shape)}')
    if errors:
        raise ConfigError(
            f'{where} holds other leaves than are asked for:\n'
            + '\n'.join(f'  - {e}' for e in errors)
            + '\nUse the config that it was saved with, or ask only for leaves that are alike.'
        )


def boxes_of_devices(want: Any, shape: tuple[int, ...]) -> dict[jax.Device | None, Box]:
    """Returns the box that each device of this process wants of a leaf.

    A leaf that is wanted without a sharding has one box, the whole, at None.
    """
    sharding = getattr(want, 'sharding', None)
    if sharding is None:
        return {None: tuple((0, size) for size in shape)}
    indices = sharding.addressable_devices_indices_map(shape)
    return {device: box_of(index, shape) for device, index in indices.items()}


def on_devices(
    data: Mapping[Box, np.ndarray],
    boxes: Mapping[jax.Device, Box],
    shape: tuple[int, ...],
    sharding: Sharding,
) -> jax.Array:
    """Assembles a global array of `shape`, of which each device holds the data of its box."""
    shards = [
        jax.device_put(data[box], SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
        for device, box in boxes.items()
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)
