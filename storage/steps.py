"""The steps of a checkpoint as files, as one process sees them: each step's own, and all steps.

    10/arrays/params.head/   one zarr3 array per leaf; each chunk, a device's shard or an even part
                             of one, is a file with a crc32c
    10/metadata.json         step, config, versions, and shape, type and chunks of each leaf
    10/written/3             process 3 has written its chunks (if there are several processes)
    10/COMMIT                written last: the crc32 of metadata.json

A step without COMMIT does not count. Arrays are opened by the entries of metadata.json, which
COMMIT's checksum covers; their own zarr.json is for other readers.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore as ts

from config import ConfigError
from storage.leaves import Box, HostLeaf, boxes_of_devices, on_devices, part, zarr_metadata
from storage.stores import local_folder, open_store

VERSION = 1  # of the layout
COMMIT = 'COMMIT'
METADATA = 'metadata.json'
WINDOW_BYTES = 1 << 30  # under way at a time, writing or reading, if no single item is larger
POLL_SECONDS = 0.1  # between looks for the other processes' files
IO_THREADS = 32  # many, because a file that is synced waits for the disk, not for a core

T = TypeVar('T')


class DamagedError(Exception):
    """A file of a committed step is missing or damaged; the message names it."""


def listed(numbers: Iterable[int]) -> str:
    """Lists numbers for a message."""
    return ', '.join(map(str, numbers)) or 'none'


def windowed(items: Iterable[tuple[T, int]]) -> Iterator[T]:
    """Yields the things of (thing, its bytes) in order, but starts later ones first.

    Takes items ahead until they hold more than WINDOW_BYTES together.
    """
    ahead: deque[tuple[T, int]] = deque()
    size = 0
    for item in items:
        ahead.append(item)
        size += item[1]
        while size > WINDOW_BYTES:
            thing, nbytes = ahead.popleft()
            yield thing
            size -= nbytes
    while ahead:
        yield ahead.popleft()[0]


def encode_metadata(
    step: int, leaves: Iterable[HostLeaf], config: Mapping[str, Any] | None
) -> bytes:
    """Returns the content of metadata.json."""
    packages = {name: importlib.metadata.version(name) for name in ('jax', 'tensorstore')}
    versions = {'layout': VERSION, 'python': platform.python_version()} | packages
    entries = {leaf.name: leaf.entry for leaf in leaves}
    metadata = {'step': step, 'versions': versions, 'config': config, 'leaves': entries}
    return json.dumps(metadata, indent=1).encode() + b'\n'


def checksum(metadata: bytes) -> bytes:
    """Returns the content of COMMIT: the crc32 of metadata.json, in hexadecimal."""
    return f'{zlib.crc32(metadata):08x}'.encode()


@dataclasses.dataclass(frozen=True)
class StepFiles:
    """The files of one step: written, committed, read, verified and removed here.

    Errors of tensorstore are ValueError or OSError.
    """

    step: int
    root: str  # the checkpoints' path, for messages
    store: ts.KvStore  # of the step's own folder
    context: ts.Context
    folder: str | None  # the absolute path of the step's folder on a local file system

    @property
    def path(self) -> str:
        """Path of the step's folder, for messages."""
        return f'{self.root}/{self.step}'

    # -----------------------------------------------------------------------------------------
    # Writing
    # -----------------------------------------------------------------------------------------

    def write(self, leaves: list[HostLeaf], metadata: bytes, save_id: bytes) -> None:
        """Writes all that this process has to, except COMMIT; empties `leaves` as it goes.

        `save_id` is the same on all processes, and new for each save.
        """
        for write in windowed(self._writes(leaves, metadata)):
            write.result()
        if jax.process_count() > 1:
            self.store.write(f'written/{jax.process_index()}', save_id).result()

    def _writes(self, leaves: list[HostLeaf], metadata: bytes) -> Iterator[tuple[ts.Future, int]]:
        """Starts the writes of this process one by one, and yields (write under way, its bytes)."""
        if jax.process_index() == 0:
            for leaf in leaves:
                content = json.dumps(zarr_metadata(leaf.entry)).encode()
                yield self.store.write(f'arrays/{leaf.name}/zarr.json', content), 0
            yield self.store.write(METADATA, metadata), len(metadata)
        while leaves:
            leaf = leaves.pop()  # so that its memory is free as soon as it is written
            array = self.open_leaf(leaf.name, leaf.entry)
            while leaf.chunks:
                box, x = leaf.chunks.pop()
                target = part(array, box)
                yield target.write(x, can_reference_source_data_indefinitely=True), x.nbytes

    def wait_for_processes(self, save_id: bytes, give_up: threading.Event) -> None:
        """Returns once every process has written its chunks in this save.

        Raises RuntimeError, with the processes that did not, once `give_up` is set.
        """
        missing = list(range(jax.process_count())) if jax.process_count() > 1 else []
        while missing:
            reads = [self.store.read(f'written/{i}') for i in missing]
            # What an earlier save left there has another id.
            missing = [
                i for i, read in zip(missing, reads, strict=True) if read.result().value != save_id
            ]
            if missing and give_up.wait(POLL_SECONDS):
                raise RuntimeError(f'processes {listed(missing)} did not write their chunks')

    def commit(self, metadata: bytes) -> None:
        """Writes COMMIT, with which the step counts."""
        self.store.write(COMMIT, checksum(metadata)).result()

    def remove(self) -> None:
        """Removes all files of the step; COMMIT first, so that a rest does not count."""
        self.store.write(COMMIT, None).result()
        if self.folder:
            shutil.rmtree(self.folder)
        else:
            self.store.delete_range(ts.KvStore.KeyRange()).result()

    # -----------------------------------------------------------------------------------------
    # Reading
    # -----------------------------------------------------------------------------------------

    def is_committed(self) -> bool:
        """Returns True if the step counts; it may be damaged all the same."""
        return self.store.read(COMMIT).result().state == 'value'

    def metadata(self) -> dict[str, Any] | None:
        """Returns the content of metadata.json, or None if the step is not committed.

        Raises DamagedError if the file is missing or does not match COMMIT, ConfigError if the
        step has another layout.
        """
        commit = self.store.read(COMMIT).result()
        if commit.state != 'value':
            return None
        found = self.store.read(METADATA).result()
        if found.state != 'value' or commit.value != checksum(found.value):
            raise DamagedError(
                f'step {self.step} in {self.root} is damaged: {self.path}/{METADATA} is missing '
                f'or does not match {COMMIT}'
            )
        metadata = json.loads(found.value)
        if metadata['versions']['layout'] != VERSION:
            raise ConfigError(
                f'{self.path} has layout {metadata["versions"]["layout"]}, this code reads '
                f'{VERSION}: restore it with the code that wrote it'
            )
        return metadata

    def open_leaf(
        self, name: str, entry: Mapping[str, Any], context: ts.Context | None = None
    ) -> ts.TensorStore:
        """Opens a leaf's array for reading and writing, by its entry in metadata.json alone."""
        spec = {
            'driver': 'zarr3',
            'kvstore': (self.store / f'arrays/{name}/').spec().to_json(),
            'metadata': zarr_metadata(entry),
            # A lost chunk must not read as zeros: all are written, all must be there.
            'store_data_equal_to_fill_value': True,
            'fill_missing_data_reads': False,
            'recheck_cached_data': False,
        }
        context = context or self.context
        return ts.open(spec, context=context, open=True, assume_metadata=True).result()

    def read(self, wanted: Mapping[str, Any], entries: Mapping[str, Any]) -> list[Any]:
        """Returns the wanted leaves, in order, by their entries in metadata.json.

        A leaf that is wanted with a sharding becomes a jax array, one without a numpy array.
        Raises DamagedError if a chunk is missing or damaged.
        """
        leaves = []
        for name, shape, boxes, reads in windowed(self._reads(wanted, entries)):
            data = {box: self._result(read, name) for box, read in reads.items()}
            if None in boxes:
                leaf = data[boxes[None]]
            else:
                leaf = on_devices(data, boxes, shape, wanted[name].sharding)
            impl = entries[name].get('key')
            leaves.append(jax.random.wrap_key_data(leaf, impl=impl) if impl else leaf)
        return leaves

    def _reads(
        self, wanted: Mapping[str, Any], entries: Mapping[str, Any]
    ) -> Iterator[tuple[tuple[str, tuple[int, ...], dict, dict[Box, ts.Future]], int]]:
        """Starts the reads leaf by leaf: ((name, shape, box of each device, reads), bytes)."""
        # Devices whose boxes meet in a chunk share what was read of it.
        cache = {'cache_pool': {'total_bytes_limit': WINDOW_BYTES}}
        context = ts.Context(cache, self.context)
        for name, want in wanted.items():
            array = self.open_leaf(name, entries[name], context)
            boxes = boxes_of_devices(want, array.shape)
            reads = {box: part(array, box).read() for box in sorted(set(boxes.values()))}
            size = sum(math.prod(stop - start for start, stop in box) for box in reads)
            yield (name, array.shape, boxes, reads), size * array.dtype.numpy_dtype.itemsize

    def verify(self, entries: Mapping[str, Any]) -> None:
        """Reads all leaves that metadata.json has entries of.

        Raises DamagedError, which names the first damaged leaf and file.
        """
        for name, entry in entries.items():
            array = self.open_leaf(name, entry)
            rows = range(0, array.shape[0], entry['chunk'][0]) if array.rank else ()
            for slab in [array[i : i + rows.step] for i in rows] or [array]:
                self._result(slab.read(), name)

    def _result(self, read: ts.Future, name: str) -> np.ndarray:
        """Returns what was read of a leaf."""
        try:
            return read.result()
        except (ValueError, OSError) as error:  # which names the file
            raise DamagedError(
                f'step {self.step} in {self.root} is damaged: leaf {name}: {error}'
            ) from error


class Steps:
    """All steps below one path: finds, checks and removes them.

    Errors of tensorstore are ValueError or OSError.
    """

    def __init__(self, path: str, context: ts.Context | None = None):
        """`context` brings what a URL needs: credentials, or the memory behind memory://."""
        self.path, self._folder = path.rstrip('/'), local_folder(path)
        self._context = ts.Context({'file_io_concurrency': {'limit': IO_THREADS}}, context)
        self._store = open_store(self.path, self._context)

    def files(self, step: int) -> StepFiles:
        """Returns the files of a step, which need not be there."""
        folder = os.path.join(self._folder, str(step)) if self._folder else None
        return StepFiles(step, self.path, self._store / f'{step}/', self._context, folder)

    def committed(self) -> list[int]:
        """Lists the committed steps, in order."""
        keys = [key.decode().partition('/') for key in self._store.list().result()]
        return sorted(int(step) for step, _, file in keys if step.isdecimal() and file == COMMIT)

    def begun(self) -> set[int]:
        """Returns all steps, committed or not, even those without a whole file."""
        names = [key.decode().partition('/')[0] for key in self._store.list().result()]
        if self._folder and os.path.isdir(self._folder):
            names += os.listdir(self._folder)
        return {int(name) for name in names if name.isdecimal()}

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the content of a committed step's metadata.json.

        Raises ConfigError if there is no such step or it has another layout, DamagedError if the
        file is damaged.
        """
        metadata = self.files(step).metadata()
        if metadata is None:
            raise ConfigError(
                f'{self.path} holds no committed step {step}; use one of: '
                f'{listed(self.committed())}'
            )
        return metadata

    def verify(self, step: int) -> None:
        """Reads all of a step. Raises as `metadata`, and DamagedError for a damaged leaf."""
        self.files(step).verify(self.metadata(step)['leaves'])

    def remove_old(self, newest: int, keep: int, keep_every: int) -> None:
        """Removes all steps but `newest`, the newest `keep` (0: all) and each multiple of
        `keep_every` (0: none).

        Steps whose metadata is damaged or of another layout neither count nor go.
        """
        whole = [step for step in self.committed() if keep and self._is_whole(step)]
        for step in whole[:-keep]:
            if step != newest and not (keep_every and step % keep_every == 0):
                self.files(step).remove()

    def _is_whole(self, step: int) -> bool:
        """Returns True if a step is committed, with undamaged metadata of this layout."""
        try:
            return self.files(step).metadata() is not None
        except (DamagedError, ConfigError):
            return False

    def remedy(self, damaged: int) -> str:
        """Says what to remove to go on from before a damaged step.

        Reads the older steps, from the newest on, until one is intact.
        """
        older, unusable = [step for step in self.committed() if step < damaged], [damaged]
        while older:
            candidate = older.pop()
            try:
                self.verify(candidate)
            except (DamagedError, ConfigError):
                unusable.append(candidate)
                continue
            also = f' (not read: {listed(older)})' if older else ''
            return (
                f'The older step {candidate} is intact{also}: remove {listed(unusable)} from '
                f'{self.path} to go on from there.'
            )
        return 'No older step there is intact.'
