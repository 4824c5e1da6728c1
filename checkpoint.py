"""Saves and restores any pytree of arrays, on any mesh, with any number of processes.

    with Checkpointer('runs/a/checkpoints', keep=3) as checkpoints:
        checkpoints.save(10, state)  # returns once host memory holds a copy
        state = checkpoints.restore(10, shapes)  # ShapeDtypeStructs that carry shardings

A checkpoint is one folder per step, below a local folder or a URL that tensorstore knows (gs://,
s3://); storage/steps.py says what is in it. A step counts once its marker COMMIT is there, which is
written last. This file adds what goes beyond files: saving in the background, and the processes'
agreement on what failed. While processes write, they meet in the store alone: a collective in the
background would run into those of the training step.
"""

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import tensorstore as ts

from config import ConfigError
from machine.processes import all_processes, from_process_0
from storage.leaves import HostLeaf, Tree, check_leaves, copy_to_host, leaf_names
from storage.metadata import encode_metadata, with_checksums
from storage.reading import Reader
from storage.steps import DamagedError, NotOwnerError, StepFiles, Steps, listed

UNREADABLE = -2  # instead of a step
GRACE_SECONDS = 60  # for the other processes' chunks when this one ends by an exception


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which steps are safe."""


class Saving(NamedTuple):
    """A save under way."""

    step: int
    written: Future  # this process's files; its result are their checksums
    committed: Future  # on process 0 the marker, too, and the removal of old steps

    def failure(self) -> BaseException | None:
        """Waits for the save, and returns the error of this process."""
        return self.written.exception() or self.committed.exception()


class Checkpointer:
    """The checkpoints below one path, which one run at a time writes.

    With several processes all call `save`, `wait`, `close`, `clean`, `restore` and `latest_step`,
    in the same order.
    """

    def __init__(
        self,
        path: str,
        keep: int = 0,
        keep_every: int = 0,
        context: ts.Context | None = None,
        check_owner: Callable[[], None] | None = None,
    ):
        """Keeps the newest `keep` steps (0: all), and each multiple of `keep_every` for ever (0:
        none).

        `context` brings what a URL needs: credentials, or the memory behind memory://.
        `check_owner` is called, in any thread, before a step is written, committed or removed; if
        it raises, because another run writes here now, nothing is, and that is a CheckpointError.
        """
        if keep < 0 or keep_every < 0:
            raise ConfigError(
                f'keep and keep_every count steps, but are {keep} and {keep_every}: use 0 or more'
            )
        self.keep, self.keep_every = keep, keep_every
        self._steps = Steps(path, context, check_owner)
        self._pool = ThreadPoolExecutor(1, 'checkpoint')
        self._saving: Saving | None = None
        self._give_up = threading.Event()
        self._run_id, self._saves = 0, 0

    @property
    def path(self) -> str:
        """The path, without a slash at its end."""
        return self._steps.path

    def __enter__(self) -> 'Checkpointer':
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return self.close()
        # The other processes may never come to an agreement: finish alone what is under way.
        if saving := self._saving:
            wait([saving.written])
            wait([saving.committed], GRACE_SECONDS)
            self._give_up.set()
            if failure := saving.failure():
                if jax.process_count() == 1:  # others may still be writing
                    self._remove_unfinished(saving.step)
                error.add_note(self._not_saved(saving.step, failure))
        self._pool.shutdown()

    def close(self) -> None:
        """Waits for the save under way; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def steps(self) -> list[int]:
        """Lists the committed steps, in order. Raises ConfigError if they cannot be listed."""
        return self._steps.committed()

    def latest_step(self) -> int | None:
        """Returns the newest committed step as process 0 sees it, or None.

        Raises ConfigError on all processes if process 0 cannot list them.
        """
        step = self._of_process_0(lambda: max(self.steps(), default=-1))
        return None if step < 0 else step

    def _of_process_0(self, look: Callable[[], int]) -> int:
        """Returns what process 0 sees in the store; raises its ConfigError on all processes."""
        seen, error = 0, None
        try:
            if jax.process_index() == 0:
                seen = look()
        except ConfigError as e:
            seen, error = UNREADABLE, e
        seen = from_process_0(seen)
        if seen == UNREADABLE:
            raise error or ConfigError(f'process 0 cannot read {self.path}, see its message')
        return seen

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the content of a committed step's metadata.json.

        Raises ConfigError if there is no such step, CheckpointError if it is damaged.
        """
        try:
            return self._steps.metadata(step)
        except DamagedError as error:
            raise CheckpointError(f'{error}\n{self._steps.remedy(step)}') from error

    def verify(self, step: int) -> None:
        """Reads all of a step.

        Raises ConfigError if there is no such step, CheckpointError, with the first damaged leaf
        and file, if it is damaged.
        """
        try:
            self._steps.verify(step)
        except DamagedError as error:
            raise CheckpointError(str(error)) from error

    def clean(self) -> list[int]:
        """Removes the steps that were never committed; process 0 returns those that it removed.

        Raises CheckpointError if process 0 could not. Nothing is removed if one of them is a link,
        or holds one.
        """
        unfinished, error = [], None
        try:
            if jax.process_index() == 0:
                unfinished = self._steps.unfinished()
                self._steps.remove_all(unfinished)
        except (OSError, ValueError, NotOwnerError) as e:
            error = e
        if not all_processes(error is None):
            raise CheckpointError(
                f'the unfinished steps {listed(unfinished)} in {self.path} could not be removed: '
                f'{error or "see process 0"}'
            ) from error
        return unfinished

    # ---------------------------------------------------------------------------------------------
    # Saving
    # ---------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        tree: Tree,
        config: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        finite: bool = False,
    ) -> None:
        """Copies the tree to host memory, and writes it in the background.

        First waits for the save before, so that host memory holds one copy. `config` and `data` are
        any JSON; `metadata` returns them. With `finite`, a tree that holds NaN or infinity fails to
        be saved, and no older step is removed. Raises CheckpointError if the save before failed,
        ConfigError if the step is there already.
        """
        self._start(step, functools.partial(copy_to_host, tree, finite), config, data)

    def save_leaves(
        self,
        step: int,
        leaves: list[HostLeaf],
        config: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        window: int = 0,
    ) -> None:
        """Saves leaves whose chunks may be made while they are written, `window` bytes at a time
        (0: as many as of another save); returns once the step is committed.

        Each chunk is that of one process. Raises as `save` and `wait`; what making a chunk raises
        is the cause of the CheckpointError.
        """
        self._start(step, lambda: leaves, config, data, window)
        self.wait()

    def _start(
        self,
        step: int,
        take: Callable[[], list[HostLeaf]],
        config: Mapping[str, Any] | None,
        data: Mapping[str, Any] | None,
        window: int = 0,
    ) -> None:
        """Writes in the background what `take` returns, once the save before has ended."""
        self.wait()
        files = self._steps.files(step)
        if self._of_process_0(files.is_committed):
            raise ConfigError(f'{self.path} holds step {step} already: remove it to save it again')
        leaves = take()
        metadata = encode_metadata(step, leaves, config, data)
        self._run_id = self._run_id or from_process_0(secrets.randbits(31))
        self._saves += 1
        save_id = f'{self._run_id}-{self._saves}'.encode()
        self._give_up.clear()
        written = self._pool.submit(files.write, leaves, save_id, window)
        committed = self._pool.submit(self._commit, files, written, metadata, save_id)
        self._saving = Saving(step, written, committed)

    def _commit(self, files: StepFiles, written: Future, metadata: str, save_id: bytes) -> None:
        """On process 0, writes the marker once all processes have written; then removes old steps.

        Runs in the background, after this process has written its own files.
        """
        if jax.process_index() != 0 or written.exception() is not None:
            return
        checksums = files.gather(save_id, written.result(), self._give_up)
        files.commit(with_checksums(metadata, checksums))
        step = files.step
        try:
            self._steps.remove_old(step, self.keep, self.keep_every)
        except (OSError, ValueError, NotOwnerError) as error:
            raise CheckpointError(
                f'step {step} is saved in {self.path}, but older ones could not be removed: {error}'
                f'\nMend the access; the same command then goes on from step {step}.'
            ) from error

    def failed(self) -> bool:
        """Returns True if the save under way has failed on this process, as far as is known.

        Does not wait. `wait` and the next `save` raise on all processes then.
        """
        if self._saving is None:
            return False
        futures = (self._saving.written, self._saving.committed)
        return any(future.done() and future.exception() for future in futures)

    def wait(self) -> None:
        """Waits until the save under way is committed.

        Raises CheckpointError on all processes if the save failed on any; what it has written is
        removed then, if that is possible.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        if not all_processes(saving.written.exception() is None):
            self._give_up.set()
        error = saving.failure()
        if not all_processes(error is None):  # now no process writes any more
            self._remove_unfinished(saving.step)
            raise CheckpointError(self._not_saved(saving.step, error)) from error

    def _remove_unfinished(self, step: int) -> None:
        """Frees, on process 0, the room that a failed save has taken, unless it is committed."""
        files = self._steps.files(step)
        # Where the store fails or another run writes, the next start removes it.
        with contextlib.suppress(OSError, ValueError, NotOwnerError):
            if jax.process_index() == 0 and not files.is_committed():
                files.remove()

    def _not_saved(self, step: int, error: BaseException | None) -> str:
        """Returns the message of a failed save; `error` is None if another process failed."""
        if isinstance(error, CheckpointError):
            return str(error)
        return self._steps.not_saved(step, error)

    # ---------------------------------------------------------------------------------------------
    # Restoring
    # ---------------------------------------------------------------------------------------------

    def reader(self, step: int) -> Reader:
        """Returns what reads parts of a step's leaves, for programs that need no arrays of jax."""
        return self._steps.files(step).reader()

    def restore(self, step: int, tree: Tree) -> Tree:
        """Returns the leaves that `tree` asks for, by its ShapeDtypeStructs or arrays.

        A leaf that has a sharding becomes a jax array with it, others become numpy arrays. One that
        was saved in bfloat16 or float16 may be asked for in float32, which holds the same. Leaves
        of the checkpoint that the tree leaves out are not read. Raises ConfigError if there is no
        such step, or a leaf is missing or has another shape or type; CheckpointError, with leaf,
        file and older steps, if on any process a file is missing or damaged.
        """
        leaves, error, wanted = [], None, leaf_names(tree)
        try:
            entries = self._steps.metadata(step)['leaves']
            check_leaves(wanted, entries, f'{self.path}/{step}')
            leaves = self._steps.files(step).reader().read(wanted, entries)
        except (DamagedError, OSError, ValueError) as e:
            error = e
        if all_processes(error is None):
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)
        if isinstance(error, ValueError):
            raise error
        cause = error or 'another process could not read it, see its message'
        raise CheckpointError(f'{cause}\nNothing was loaded. {self._steps.remedy(step)}') from error
