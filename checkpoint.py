"""Saves and restores any pytree of arrays, on any mesh, with any number of processes.

    with Checkpointer('runs/a/checkpoints', keep=3) as checkpoints:
        checkpoints.save(10, state)  # returns when the copy in host memory is made
        state = checkpoints.restore(10, shapes)  # ShapeDtypeStructs that carry shardings

A checkpoint is a folder a step, below a local folder or a URL that tensorstore knows (gs://, s3://):

    10/arrays/params.head/   a zarr3 array a leaf; each chunk, a device's shard or an even part of
                             one, is a file with a crc32c
    10/metadata.json         step, config, versions, and shape, type and chunks of each leaf
    10/written/3             process 3 has written its chunks (where there are several processes)
    10/COMMIT                written last: the crc32 of metadata.json

Without COMMIT a folder does not count. Arrays are read by what metadata.json says of them, whose
checksum COMMIT holds; their own zarr.json is for other readers. While they write, processes meet
in the store alone: a collective in the background would run into those of the training step.
"""

import importlib.metadata
import json
import math
import os
import platform
import secrets
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import SingleDeviceSharding

from machine.processes import all_processes, from_process_0
from storage.leaves import (
    HostLeaf,
    Tree,
    box_of,
    check_leaves,
    copy_to_host,
    leaf_names,
    part,
    zarr_metadata,
)
from storage.stores import local_folder, open_store

VERSION = 1  # of the layout


COMMIT = 'COMMIT'


METADATA = 'metadata.json'

WINDOW_BYTES = 1 << 30  # being written, or being read, at a time, if no leaf is larger


IO_THREADS = 32


GRACE_SECONDS = 60  # for the other processes' chunks when this one ends by an exception

T = TypeVar('T')


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which steps are safe."""


def windowed(items: Iterable[tuple[T, int]]) -> Iterator[T]:
    """The things of (thing, its bytes), taken from `items` ahead by at most WINDOW_BYTES."""
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


def listed(steps: Iterable[int]) -> str:
    return ', '.join(map(str, steps)) or 'none'


def checksum(metadata: bytes) -> bytes:
    return f'{zlib.crc32(metadata):08x}'.encode()


class Checkpointer:
    """The checkpoints below one path, which one run at a time writes.

    With several processes all call `save`, `wait`, `close`, `clean`, `restore` and `latest_step`,
    in the same order.
    """

    def __init__(
        self, path: str, keep: int = 0, keep_every: int = 0, context: ts.Context | None = None
    ):
        """Keeps the newest `keep` steps (0: all), and each multiple of `keep_every` for ever (0:
        none). `context` brings what a URL needs: credentials, or the memory behind memory://."""
        if keep < 0 or keep_every < 0:
            raise ValueError(
                f'keep and keep_every count steps, but are {keep} and {keep_every}: use 0 or more'
            )
        self.path, self.keep, self.keep_every = path.rstrip('/'), keep, keep_every
        self._folder = local_folder(path)
        # Many at once, because a file that is synced waits for the disk, not for a core.
        self._context = ts.Context({'file_io_concurrency': {'limit': IO_THREADS}}, context)
        self._store = open_store(self.path, self._context)
        self._pool = ThreadPoolExecutor(1, 'checkpoint')
        self._saving: tuple[int, Future, Future] | None = None
        self._give_up = threading.Event()
        self._run, self._saves = 0, 0

    def __enter__(self) -> 'Checkpointer':
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return self.close()
        # The other processes may never come to an agreement: finish alone what is under way.
        if self._saving:
            step, written, committed = self._saving
            wait([written])
            wait([committed], GRACE_SECONDS)
            self._give_up.set()
            if failure := written.exception() or committed.exception():
                error.add_note(self._not_saved(step, failure))
        self._pool.shutdown()

    def close(self) -> None:
        """Waits for the save under way; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def steps(self) -> list[int]:
        """The committed steps, in order."""
        return sorted(self._holding(COMMIT))

    def latest_step(self) -> int | None:
        """The newest committed step as process 0 sees it, or None."""
        step = from_process_0(max(self.steps(), default=-1))
        return None if step < 0 else step

    def _holding(self, file: str = '') -> set[int]:
        """The steps whose folder holds this file, or any."""
        keys = [key.decode().partition('/') for key in self._store.list().result()]
        if not file and self._folder and os.path.isdir(self._folder):
            keys += [(name, '', '') for name in os.listdir(self._folder)]  # with no whole file yet
        return {int(s) for s, _, rest in keys if s.isdecimal() and (not file or rest == file)}

    def metadata(self, step: int) -> dict[str, Any]:
        """What metadata.json says of a committed step.

        ValueError if there is no such step; CheckpointError if it is damaged.
        """
        try:
            return self._metadata(step)
        except CheckpointError as error:
            raise CheckpointError(f'{error}\n{self._older(step)}') from error

    def _metadata(self, step: int) -> dict[str, Any]:
        commit = self._store.read(f'{step}/{COMMIT}').result()
        if commit.state != 'value':
            raise ValueError(
                f'{self.path} holds no committed step {step}; use one of: {listed(self.steps())}'
            )
        found = self._store.read(f'{step}/{METADATA}').result()
        if found.state != 'value' or commit.value != checksum(found.value):
            raise CheckpointError(
                f'step {step} in {self.path} is damaged: {self.path}/{step}/{METADATA} is missing '
                f'or does not match {COMMIT}'
            )
        metadata = json.loads(found.value)
        if metadata['versions']['layout'] != VERSION:
            raise ValueError(
                f'{self.path}/{step} has layout {metadata["versions"]["layout"]}, this code reads '
                f'{VERSION}: restore it with the code that wrote it'
            )
        return metadata

    def clean(self) -> list[int]:
        """Removes what was never committed; process 0 returns the steps that it removed."""
        leftover, error = [], None
        try:
            if jax.process_index() == 0:
                leftover = sorted(self._holding() - self._holding(COMMIT))
            for step in leftover:
                self._delete(step)
        except (OSError, ValueError) as e:
            error = e
        if not all_processes(error is None):
            raise CheckpointError(
                f'the unfinished steps {listed(leftover)} in {self.path} could not be removed: '
                f'{error or "see process 0"}'
            ) from error
        return leftover

    def _delete(self, step: int) -> None:
        """The marker first: what an interruption leaves does not count."""
        self._store.write(f'{step}/{COMMIT}', None).result()
        if self._folder:
            shutil.rmtree(os.path.join(self._folder, str(step)))
        else:
            after = f'{step}0'  # '0' follows '/'
            self._store.delete_range(ts.KvStore.KeyRange(f'{step}/', after)).result()

    def save(self, step: int, tree: Tree, config: Mapping[str, Any] | None = None) -> None:
        """Copies the tree to host memory, and writes it in the background.

        First waits for the save before, so that host memory holds one copy, and raises
        CheckpointError if that one failed. `config` is any JSON; `metadata` gives it back.
        """
        self.wait()
        if self._store.read(f'{step}/{COMMIT}').result().state == 'value':
            raise ValueError(f'{self.path} holds step {step} already: remove it to save it again')
        leaves = copy_to_host(tree)
        packages = {name: importlib.metadata.version(name) for name in ('jax', 'tensorstore')}
        versions = {'layout': VERSION, 'python': platform.python_version()} | packages
        entries = {leaf.name: leaf.entry for leaf in leaves}
        metadata = {'step': step, 'versions': versions, 'config': config, 'leaves': entries}
        encoded = json.dumps(metadata, indent=1).encode() + b'\n'
        # The name of this save: what an earlier one left in written/ must not pass for its own.
        self._run = self._run or from_process_0(secrets.randbits(31))
        self._saves += 1
        name = f'{self._run}-{self._saves}'.encode()
        self._give_up.clear()
        written = self._pool.submit(self._write, step, leaves, encoded, name)
        committed = self._pool.submit(self._commit, step, written, encoded, name)
        self._saving = step, written, committed

    def wait(self) -> None:
        """Until the save under way is committed; CheckpointError if it failed on any process."""
        if self._saving is None:
            return
        (step, written, committed), self._saving = self._saving, None
        if not all_processes(written.exception() is None):
            self._give_up.set()
        error = written.exception() or committed.exception()
        if not all_processes(error is None):
            raise CheckpointError(self._not_saved(step, error)) from error

    def _not_saved(self, step: int, error: BaseException | None) -> str:
        if isinstance(error, CheckpointError):
            return str(error)
        cause = error or 'another process failed, see its message'
        return (
            f'step {step} could not be saved in {self.path}: {cause}\nSteps that are safe there: '
            f'{listed(self.steps())}. Make room or mend the access; the same command then goes on '
            f'from the newest.'
        )

    def _open(
        self, step: int, name: str, entry: Mapping[str, Any], context: ts.Context | None = None
    ) -> ts.TensorStore:
        spec = {
            'driver': 'zarr3',
            'kvstore': (self._store / f'{step}/arrays/{name}/').spec().to_json(),
            'metadata': zarr_metadata(entry),
            # A lost chunk must not read as zeros: all are written, all must be there.
            'store_data_equal_to_fill_value': True,
            'fill_missing_data_reads': False,
            'recheck_cached_data': False,
        }
        context = context or self._context
        return ts.open(spec, context=context, open=True, assume_metadata=True).result()

    def _writes(
        self, step: int, leaves: list[HostLeaf], metadata: bytes
    ) -> Iterator[tuple[Any, int]]:
        """(write under way, its bytes) for all that this process writes."""
        if jax.process_index() == 0:
            files = {f'arrays/{leaf.name}/zarr.json': zarr_metadata(leaf.entry) for leaf in leaves}
            for file, content in files.items():
                yield self._store.write(f'{step}/{file}', json.dumps(content).encode()), 0
            yield self._store.write(f'{step}/{METADATA}', metadata), len(metadata)
        while leaves:
            leaf = leaves.pop()  # so that its memory is free as soon as it is written
            array = self._open(step, leaf.name, leaf.entry)
            while leaf.chunks:
                box, x = leaf.chunks.pop()
                target = part(array, box)
                yield target.write(x, can_reference_source_data_indefinitely=True), x.nbytes

    def _write(self, step: int, leaves: list[HostLeaf], metadata: bytes, name: bytes) -> None:
        """In the background: all that this process writes, but the marker."""
        for write in windowed(self._writes(step, leaves, metadata)):
            write.result()
        if jax.process_count() > 1:
            self._store.write(f'{step}/written/{jax.process_index()}', name).result()

    def _commit(self, step: int, written: Future, metadata: bytes, name: bytes) -> None:
        """In the background of process 0: the marker once all have written; then old steps."""
        if jax.process_index() != 0 or written.exception() is not None:
            return
        missing = list(range(jax.process_count())) if jax.process_count() > 1 else []
        while missing:
            reads = [self._store.read(f'{step}/written/{i}') for i in missing]
            missing = [i for i, r in zip(missing, reads, strict=True) if r.result().value != name]
            if missing and self._give_up.wait(0.1):
                raise RuntimeError(f'processes {listed(missing)} did not write their chunks')
        self._store.write(f'{step}/{COMMIT}', checksum(metadata)).result()
        try:
            self._remove_old(step)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f'step {step} is saved in {self.path}, but older ones could not be removed: {error}'
                f'\nMend the access; the same command then goes on from step {step}.'
            ) from error

    def _remove_old(self, newest: int) -> None:
        """All but `newest`, the newest `keep` whose metadata is whole, and each `keep_every`."""
        whole = [step for step in self.steps() if self.keep and self._is_whole(step)]
        for step in whole[: -self.keep]:
            if step != newest and not (self.keep_every and step % self.keep_every == 0):
                self._delete(step)

    def _is_whole(self, step: int) -> bool:
        try:
            return bool(self._metadata(step))
        except (CheckpointError, ValueError):  # damaged, or of another layout
            return False

    def restore(self, step: int, tree: Tree) -> Tree:
        """The leaves that `tree` asks for, by its ShapeDtypeStructs or arrays.

        A leaf that has a sharding becomes a jax array with it, others become numpy arrays. Leaves
        of the checkpoint that the tree leaves out are not read. ValueError if there is no such
        step, or a leaf is missing or has another shape or type; CheckpointError, with leaf, file
        and older steps, if on any process a file is missing or damaged.
        """
        leaves, error, wanted = [], None, leaf_names(tree)
        try:
            entries = self._metadata(step)['leaves']
            check_leaves(wanted, entries, f'{self.path}/{step}')
            leaves = self._read(step, wanted, entries)
        except (CheckpointError, ValueError) as e:
            error = e
        if all_processes(error is None):
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)
        if isinstance(error, ValueError):
            raise error
        cause = error or 'another process could not read it, see its message'
        raise CheckpointError(f'{cause}\nNothing was loaded. {self._older(step)}') from error

    def verify(self, step: int) -> None:
        """Reads all of a step; CheckpointError names the first damaged leaf and file."""
        for name, entry in self._metadata(step)['leaves'].items():
            array = self._open(step, name, entry)
            rows = range(0, array.shape[0], entry['chunk'][0]) if array.rank else ()
            for slab in [array[i : i + rows.step] for i in rows] or [array]:
                self._result(slab.read(), step, name)

    def _result(self, read: ts.Future, step: int, name: str) -> np.ndarray:
        try:
            return read.result()
        except (ValueError, OSError) as error:  # which names the file
            raise CheckpointError(
                f'step {step} in {self.path} is damaged: leaf {name}: {error}'
            ) from error

    def _older(self, step: int) -> str:
        """What to do about a damaged step: older ones are read until one is intact."""
        older, damaged = [s for s in self.steps() if s < step], [step]
        while older:
            candidate = older.pop()
            try:
                self.verify(candidate)
            except CheckpointError:
                damaged.append(candidate)
                continue
            also = f' (not read: {listed(older)})' if older else ''
            return (
                f'The older step {candidate} is intact{also}: remove {listed(damaged)} from '
                f'{self.path} to go on from there.'
            )
        return 'No older step there is intact.'

    def _read(self, step: int, wanted: dict[str, Any], entries: dict[str, Any]) -> list[Any]:
        """The wanted leaves, in order."""
        # Devices whose boxes meet in a chunk share what was read of it.
        cache = {'cache_pool': {'total_bytes_limit': WINDOW_BYTES}}
        context = ts.Context(cache, self._context)

        def reads() -> Iterator[tuple[Any, int]]:
            for name, want in wanted.items():
                array = self._open(step, name, entries[name], context)
                devices = {None: (slice(None),) * array.rank}
                if getattr(want, 'sharding', None) is not None:
                    devices = want.sharding.addressable_devices_indices_map(array.shape)
                boxes = {device: box_of(index, array.shape) for device, index in devices.items()}
                data = {box: part(array, box).read() for box in sorted(set(boxes.values()))}
                size = sum(math.prod(b - a for a, b in box) for box in data)
                yield (name, array.shape, boxes, data), size * array.dtype.numpy_dtype.itemsize

        leaves = []
        for name, shape, boxes, data in windowed(reads()):
            data = {box: self._result(read, step, name) for box, read in data.items()}
            if None in boxes:
                leaf = data[boxes[None]]
            else:
                sharding = wanted[name].sharding
                kind = sharding.memory_kind
                placed = [
                    jax.device_put(data[box], SingleDeviceSharding(device, memory_kind=kind))
                    for device, box in boxes.items()
                ]
                leaf = jax.make_array_from_single_device_arrays(shape, sharding, placed)
            impl = entries[name].get('key')
            leaves.append(jax.random.wrap_key_data(leaf, impl=impl) if impl else leaf)
        return leaves
