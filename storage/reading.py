"""Reading of a step's arrays, each chunk only if it has the checksum that metadata.json says."""

import dataclasses
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tensorstore as ts

from storage.leaves import (
    Box,
    boxes_of_devices,
    chunk_bytes,
    chunk_file,
    chunk_number,
    chunks_across,
    on_devices,
    part,
    zarr_metadata,
)

WINDOW_BYTES = 1 << 30  # under way at a time, writing or reading, if no single item is larger

T = TypeVar('T')


class DamagedError(Exception):
    """A file of a committed step is missing or damaged; the message names it."""


def windowed(items: Iterable[tuple[T, int]], window: int = 0) -> Iterator[T]:
    """Yields the things of (thing, its bytes) in order, but starts later ones first.

    Takes items ahead until they hold more than `window` bytes together; 0 stands for WINDOW_BYTES.
    """
    ahead: deque[tuple[T, int]] = deque()
    size = 0
    for item in items:
        ahead.append(item)
        size += item[1]
        while size > (window or WINDOW_BYTES):
            thing, nbytes = ahead.popleft()
            yield thing
            size -= nbytes
    while ahead:
        yield ahead.popleft()[0]


def open_leaf(
    store: ts.KvStore, context: ts.Context, name: str, entry: Mapping[str, Any]
) -> ts.TensorStore:
    """Opens a leaf's array for reading and writing, by its entry in metadata.json alone.

    `store` is that of the step's folder.
    """
    spec = {
        'driver': 'zarr3',
        'kvstore': (store / f'arrays/{name}/').spec().to_json(),
        'metadata': zarr_metadata(entry),
        # A lost chunk must not read as zeros: all are written, all must be there.
        'store_data_equal_to_fill_value': True,
        'fill_missing_data_reads': False,
        'recheck_cached_data': False,
    }
    return ts.open(spec, context=context, open=True, assume_metadata=True).result()


def read_end(
    store: ts.KvStore, name: str, place: tuple[int, ...], entry: Mapping[str, Any]
) -> ts.Future[ts.KvStore.ReadResult]:
    """Starts to read what stands behind a chunk's elements: its crc32c."""
    behind = slice(chunk_bytes(entry), None)
    return store.read(chunk_file(name, place), byte_range=behind)


class Reads(NamedTuple):
    """Parts of a leaf that are being read, and the checksums of the chunks that hold them."""

    name: str
    shape: tuple[int, ...]
    boxes: dict[jax.Device | None, Box]
    data: dict[Box, ts.Future]
    checksums: dict[str, tuple[ts.Future, str]]  # by file: as it is found there, as it was written


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the arrays of a step by their entries in metadata.json."""

    store: ts.KvStore  # of the step's own folder
    context: ts.Context
    name: str  # of the step, for messages
    path: str  # of its folder, for messages

    def read(self, wanted: Mapping[str, Any], entries: Mapping[str, Any]) -> list[Any]:
        """Returns the wanted leaves, in order, by their entries in metadata.json.

        A leaf that is wanted with a sharding becomes a jax array, one without a numpy array, of the
        type that is wanted.
        Raises DamagedError if a chunk is missing, damaged or another one's.
        """
        leaves = []
        for reads in windowed(self._reads(wanted, entries)):
            data = self._result(reads)
            if 'key' not in entries[reads.name]:
                dtype = wanted[reads.name].dtype
                data = {box: x.astype(dtype, copy=False) for box, x in data.items()}
            if None in reads.boxes:
                leaf = data[reads.boxes[None]]
            else:
                sharding = wanted[reads.name].sharding
                leaf = on_devices(data, reads.boxes, reads.shape, sharding)
            impl = entries[reads.name].get('key')
            leaves.append(jax.random.wrap_key_data(leaf, impl=impl) if impl else leaf)
        return leaves

    def _reads(
        self, wanted: Mapping[str, Any], entries: Mapping[str, Any]
    ) -> Iterator[tuple[Reads, int]]:
        """Starts the reads leaf by leaf, and yields them with their bytes."""
        cache = {'cache_pool': {'total_bytes_limit': WINDOW_BYTES}}
        cached = ts.Context(cache, self.context)
        for name, want in wanted.items():
            entry = entries[name]
            boxes = boxes_of_devices(want, tuple(entry['shape']))
            # Devices whose boxes meet in a chunk share what was read of it. Elsewhere a cache would
            # only hold another copy.
            met = Counter(
                place for box in {*boxes.values()} for place in chunks_across([box], entry['chunk'])
            )
            context = cached if max(met.values(), default=0) > 1 else self.context
            yield self._start(open_leaf(self.store, context, name, entry), name, entry, boxes)

    def _start(
        self,
        array: ts.TensorStore,
        name: str,
        entry: Mapping[str, Any],
        boxes: dict[jax.Device | None, Box],
    ) -> tuple[Reads, int]:
        """Starts the reads of some parts of a leaf, and returns them with their bytes."""
        distinct = sorted(set(boxes.values()))
        checksums = {}
        if written := entry.get('crc32c'):  # which layout 1 has not, and an empty leaf neither
            for place in chunks_across(distinct, entry['chunk']):
                at = 8 * chunk_number(place, entry)
                end = read_end(self.store, name, place, entry)
                checksums[chunk_file(name, place)] = end, written[at : at + 8]
        data = {box: part(array, box).read() for box in distinct}
        size = sum(math.prod(stop - start for start, stop in box) for box in data)
        nbytes = size * array.dtype.numpy_dtype.itemsize
        return Reads(name, array.shape, boxes, data, checksums), nbytes

    def read_box(self, name: str, entry: Mapping[str, Any], box: Box) -> np.ndarray:
        """Returns the elements of a leaf in the box. Raises DamagedError as `read`."""
        array = open_leaf(self.store, self.context, name, entry)
        return self._result(self._start(array, name, entry, {None: box})[0])[box]

    def verify(self, entries: Mapping[str, Any]) -> None:
        """Reads all leaves that metadata.json has entries of.

        Raises DamagedError, which names the first damaged leaf and file.
        """
        for reads in windowed(self._slabs(entries)):
            self._result(reads)

    def _slabs(self, entries: Mapping[str, Any]) -> Iterator[tuple[Reads, int]]:
        """Starts to read all leaves, one row of chunks after the other."""
        for name, entry in entries.items():
            array = open_leaf(self.store, self.context, name, entry)
            whole = tuple((0, size) for size in array.shape)
            rows = range(0, array.shape[0], entry['chunk'][0]) if array.rank else ()
            for i in rows:
                box = ((i, min(i + rows.step, array.shape[0])), *whole[1:])
                yield self._start(array, name, entry, {None: box})
            if not rows:
                yield self._start(array, name, entry, {None: whole})

    def _result(self, reads: Reads) -> dict[Box, np.ndarray]:
        """Returns what was read, once the chunks' checksums are those that were written."""
        damaged = f'{self.name} is damaged: leaf {reads.name}: '
        try:
            data = {box: read.result() for box, read in reads.data.items()}
            ends = {file: read.result() for file, (read, _) in reads.checksums.items()}
        except (ValueError, OSError) as error:  # which names the file
            raise DamagedError(f'{damaged}{error}') from error
        for file, (_, written) in reads.checksums.items():
            if ends[file].value.hex() != written:
                raise DamagedError(
                    f'{damaged}{self.path}/{file} is not the file that was written there: '
                    f'it is that of another step, leaf or chunk, or was changed'
                )
        return data
