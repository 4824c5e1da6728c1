"""The steps of a checkpoint as files, as one process sees them: each step's own, and all steps.

    10/arrays/params.head/   one zarr3 array per leaf; each chunk, a device's shard or an even part
                             of one, is a file that ends with its crc32c
    10/written/3             the checksums of the chunks that process 3 has written (0 has none)
    10/metadata.json         step, config, data, versions, and of each leaf shape, type, chunks and
                             the checksums of all chunks, eight hexadecimal digits each, in order
    10/COMMIT                written last: the crc32 of metadata.json

A step without COMMIT does not count. Arrays are opened by the entries of metadata.json, which
COMMIT's checksum covers; their own zarr.json is for other readers. A chunk counts if it has the
checksum that metadata.json says, so that one of another leaf or step does not pass.
"""

import contextlib
import dataclasses
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import tensorstore as ts

from config import ConfigError
from storage import folders
from storage.leaves import (
    CRC_BYTES,
    HostLeaf,
    NotFiniteError,
    check_finite,
    chunk_number,
    chunks_across,
    part,
    zarr_metadata,
)
from storage.metadata import METADATA, READABLE, Checksums, checksum
from storage.reading import (
    DamagedError,
    Reader,
    open_leaf,
    read_end,
    windowed,
)
from storage.stores import expanded, local_folder, open_store, store_errors

COMMIT = 'COMMIT'
OWN = (COMMIT, METADATA, 'written', 'arrays')  # all that a step's folder holds, COMMIT first
POLL_SECONDS = 0.1  # between looks for the other processes' files
IO_THREADS = 32  # many, because a file that is synced waits for the disk, not for a core


_NUMBER = re.compile(rb'0|[1-9][0-9]*')


class NotOwnerError(Exception):
    """Another run writes these checkpoints now; nothing was changed."""


@contextlib.contextmanager
def access_errors(path: str) -> Iterator[None]:
    """Raises errors of the operating system and of tensorstore as ConfigError, with the path."""
    try:
        with store_errors(f'the checkpoints in {path} cannot be read'):
            yield
    except OSError as error:
        raise ConfigError(f'the checkpoints in {path} cannot be read: {error}') from error


def listed(numbers: Iterable[int]) -> str:
    """Lists numbers for a message."""
    return ', '.join(map(str, numbers)) or 'none'


@dataclasses.dataclass(frozen=True)
class StepFiles:
    """The files of one step: written, committed and removed here.

    Errors of tensorstore are ValueError or OSError.
    """

    step: int
    root: str  # the checkpoints' path, for messages
    store: ts.KvStore  # of the step's own folder
    context: ts.Context
    folder: str | None  # the absolute path of the step's folder on a local file system
    check_owner: Callable[[], None]  # raises NotOwnerError

    @property
    def path(self) -> str:
        """Path of the step's folder, for messages."""
        return f'{self.root}/{self.step}'

    # -----------------------------------------------------------------------------------------
    # Writing
    # -----------------------------------------------------------------------------------------

    def write(self, leaves: list[HostLeaf], save_id: bytes, window: int = 0) -> Checksums:
        """Writes the chunks of this process, reads the end of each and returns the checksums there.

        Empties `leaves` as it goes, with up to `window` bytes under way as in `windowed`.
        `save_id` is the same on all processes, and new for each save.
        """
        self.check_owner()
        ends: dict[tuple[str, int], ts.Future] = {}
        for write, chunk in windowed(self._writes(leaves), window):
            write.result()
            if chunk:
                name, place, entry = chunk
                ends[name, chunk_number(place, entry)] = read_end(self.store, name, place, entry)
        checksums: Checksums = {}
        for (name, number), end in ends.items():
            found = end.result().value
            if len(found) != CRC_BYTES:
                raise OSError(
                    f'a chunk of {self.path}, leaf {name}, does not end as it was written'
                )
            checksums.setdefault(name, {})[number] = found.hex()
        if jax.process_index() > 0:
            content = save_id + b'\n' + json.dumps(checksums).encode()
            self.store.write(f'written/{jax.process_index()}', content).result()
        return checksums

    def _writes(
        self, leaves: list[HostLeaf]
    ) -> Iterator[tuple[tuple[ts.Future, tuple | None], int]]:
        """Starts the writes of this process one by one.

        Yields ((write under way, leaf, place and entry of the chunk), bytes).
        """
        if jax.process_index() == 0:
            for leaf in leaves:
                content = json.dumps(zarr_metadata(leaf.entry)).encode()
                yield (self.store.write(f'arrays/{leaf.name}/zarr.json', content), None), 0
        while leaves:
            leaf = leaves.pop()  # so that its memory is free as soon as it is written
            array = self.open_leaf(leaf.name, leaf.entry)
            for box, x in leaf.taken():
                if leaf.finite:
                    check_finite(leaf.name, box, x)
                (place,) = chunks_across([box], leaf.entry['chunk'])
                write = part(array, box).write(x, can_reference_source_data_indefinitely=True)
                yield (write, (leaf.name, place, leaf.entry)), x.nbytes

    def gather(self, save_id: bytes, own: Checksums, give_up: threading.Event) -> list[Checksums]:
        """Returns the checksums of all processes, once each has written its chunks in this save.

        Raises RuntimeError, with the processes that did not, once `give_up` is set.
        """
        gathered, missing = [own], list(range(1, jax.process_count()))
        while missing:
            reads = {i: self.store.read(f'written/{i}') for i in missing}
            for i, read in reads.items():
                found, _, checksums = read.result().value.partition(b'\n')
                if found == save_id:  # what an earlier save left there has another one
                    gathered.append(json.loads(checksums))
                    missing.remove(i)
            if missing and give_up.wait(POLL_SECONDS):
                raise RuntimeError(f'processes {listed(missing)} did not write their chunks')
        return gathered

    def commit(self, metadata: bytes) -> None:
        """Writes metadata.json and COMMIT, with which the step counts."""
        self.check_owner()
        self.store.write(METADATA, metadata).result()
        self.check_owner()
        self.store.write(COMMIT, checksum(metadata)).result()

    def refuse_links(self) -> None:
        """Raises LinkedError if there are links, which `remove` would remove."""
        if self.folder:
            folders.refuse_links(self.folder, OWN)

    def remove(self) -> None:
        """Removes all files of the step; COMMIT first, so that a rest does not count.

        Raises LinkedError before anything is removed if the folder, or something in it, is a link.
        """
        self.refuse_links()
        self.check_owner()
        if self.folder:
            folders.remove(self.folder, OWN)
            return
        for name in OWN:
            self.store.write(name, None).result()
            (self.store / f'{name}/').delete_range(ts.KvStore.KeyRange()).result()

    # -----------------------------------------------------------------------------------------
    # Reading
    # -----------------------------------------------------------------------------------------

    def is_committed(self) -> bool:
        """Returns True if the step counts; it may be damaged all the same.

        Raises ConfigError if it cannot be read.
        """
        with access_errors(self.root):
            if self.folder:
                return folders.is_file(os.path.join(self.folder, COMMIT))
            return self.store.read(COMMIT).result().state == 'value'

    def metadata(self) -> dict[str, Any] | None:
        """Returns the content of metadata.json, or None if the step is not committed.

        Raises DamagedError if the file is missing, does not match COMMIT or is another step's,
        ConfigError if the step has another layout or cannot be read.
        """
        with store_errors(f'{self.path} cannot be read'):
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
        if metadata['versions']['layout'] not in READABLE:
            raise ConfigError(
                f'{self.path} has layout {metadata["versions"]["layout"]}, this code reads '
                f'{listed(READABLE)}: restore it with the code that wrote it'
            )
        if metadata['step'] != self.step:
            raise DamagedError(
                f'{self.path}/{METADATA} is that of step {metadata["step"]}: the folder was copied '
                f'or renamed; its name is {metadata["step"]}'
            )
        return metadata

    def open_leaf(self, name: str, entry: Mapping[str, Any]) -> ts.TensorStore:
        """Opens a leaf's array for reading and writing, by its entry in metadata.json alone."""
        return open_leaf(self.store, self.context, name, entry)

    def reader(self) -> Reader:
        """Returns what reads the arrays of the step."""
        return Reader(self.store, self.context, f'step {self.step} in {self.root}', self.path)


class Steps:
    """All steps below one path: finds, checks and removes them.

    Errors of tensorstore are ValueError or OSError.
    """

    def __init__(
        self,
        path: str,
        context: ts.Context | None = None,
        check_owner: Callable[[], None] | None = None,
    ):
        """`context` brings what a URL needs: credentials, or the memory behind memory://.

        `check_owner` is called before a step is written, committed or removed, and raises to
        prevent it.
        """
        self.path, self._folder = expanded(path).rstrip('/'), local_folder(path)
        self._context = ts.Context({'file_io_concurrency': {'limit': IO_THREADS}}, context)
        self._store = open_store(self.path, self._context)
        self._check_owner = check_owner

    def files(self, step: int) -> StepFiles:
        """Returns the files of a step, which need not be there."""
        folder = os.path.join(self._folder, str(step)) if self._folder else None
        store = self._store / f'{step}/'
        return StepFiles(step, self.path, store, self._context, folder, self.check_owner)

    def check_owner(self) -> None:
        """Raises NotOwnerError if `check_owner` raises, but errors of the store as they are."""
        try:
            if self._check_owner:
                self._check_owner()
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise NotOwnerError(str(error)) from error

    def committed(self) -> list[int]:
        """Lists the committed steps, in order. Raises ConfigError if they cannot be listed."""
        return sorted(step for step, names in self._listed().items() if COMMIT in names)

    def begun(self) -> set[int]:
        """Returns all steps, committed or not, even those without a whole file.

        A folder with a number for a name that holds only other files is no step. A link counts.
        Raises ConfigError if they cannot be listed.
        """
        return {step for step, names in self._listed().items() if not names or names & {*OWN}}

    def _listed(self) -> dict[int, set[str]]:
        """Returns the names in each folder or link that is called as a step.

        A link has the name of COMMIT if that is where it leads, and otherwise none.
        """
        found: dict[int, set[str]] = {}
        with access_errors(self.path):
            if not self._folder:
                keys = [key.split(b'/')[:2] for key in self._store.list().result()]
                for step, name in (key for key in keys if len(key) == 2):
                    if _NUMBER.fullmatch(step):
                        found.setdefault(int(step), set()).add(name.decode())
                return found
            for entry in folders.entries(self._folder):
                if not _NUMBER.fullmatch(os.fsencode(entry.name)):
                    continue
                if folders.is_file(os.path.join(entry.path, COMMIT)):
                    found[int(entry.name)] = {COMMIT}
                elif entry.is_symlink():
                    found[int(entry.name)] = set()
                elif entry.is_dir():
                    inside = folders.entries(entry.path)
                    names = {e.name.removesuffix(folders.TEMPORARY) for e in inside}
                    found[int(entry.name)] = names - {COMMIT}
        return found

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
        self.files(step).reader().verify(self.metadata(step)['leaves'])

    def unfinished(self) -> list[int]:
        """Lists the steps that were never committed. Raises ConfigError if it cannot be told."""
        return sorted(self.begun() - set(self.committed()))

    def remove_all(self, steps: Iterable[int]) -> None:
        """Removes these steps, or none if one of them is a link or holds one: then LinkedError."""
        found = [self.files(step) for step in steps]
        for files in found:
            files.refuse_links()
        for files in found:
            files.remove()

    def not_saved(self, step: int, error: BaseException | None) -> str:
        """Returns the message of a failed save; `error` is None if another process failed."""
        cause = error or 'another process failed, see its message'
        try:
            safe = listed(self.committed())
        except ConfigError as unlisted:
            safe = f'unknown ({unlisted})'
        remedy = 'Make room or mend the access; the same command then goes on from the newest.'
        if isinstance(error, NotOwnerError):
            remedy = 'This run must not write there any more.'
        if isinstance(error, NotFiniteError):
            remedy = (
                'The same command goes on from the newest and meets the same batches: set '
                'guard.nonfinite=True or lower optimizer.peak_lr; if neither helps, look at the '
                'device or the kernel that makes such numbers.'
            )
        return (
            f'step {step} could not be saved in {self.path}: {cause}\n'
            f'Steps that are safe there: {safe}. {remedy}'
        )

    def remove_old(self, newest: int, keep: int, keep_every: int) -> None:
        """Removes all steps but `newest`, the newest `keep` (0: all) and each multiple of
        `keep_every` (0: none).

        Steps whose metadata is damaged or of another layout neither count nor go, nor do links; a
        step with links in it does not go.
        """
        whole = [step for step in self.committed() if keep and self._is_whole(step)]
        for step in whole[:-keep]:
            if step != newest and not (keep_every and step % keep_every == 0):
                with contextlib.suppress(folders.LinkedError):
                    self.files(step).remove()

    def _is_whole(self, step: int) -> bool:
        """Returns True if a step is committed, with undamaged metadata, and no link."""
        files = self.files(step)
        try:
            linked = files.folder is not None and os.path.islink(files.folder)
            return not linked and files.metadata() is not None
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
