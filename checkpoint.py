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

import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import jax
import tensorstore as ts

from config import ConfigError
from machine.processes import all_processes, from_process_0
from storage.leaves import Tree, check_leaves, copy_to_host, leaf_names
from storage.steps import DamagedError, StepFiles, Steps, encode_metadata, listed

GRACE_SECONDS = 60  # for the other processes' chunks when this one ends by an exception


class CheckpointError(Exception):
    """A checkpoint could not be written or read; the message says which steps are safe."""


class Saving(NamedTuple):
    """A save under way."""

    step: int
    written: Future  # this process's files
    committed: Future  # on process 0 the marker, too, and the removal of old steps


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
            raise ConfigError(
                f'keep and keep_every count steps, but are {keep} and {keep_every}: use 0 or more'
            )
        self.keep, self.keep_every = keep, keep_every
        self._steps = Steps(path, context)
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
        """Lists the committed steps, in order."""
        return self._steps.committed()

    def latest_step(self) -> int | None:
        """Returns the newest committed step as process 0 sees it, or None."""
        step = from_process_0(max(self.steps(), default=-1))
        return None if step < 0 else step

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

        Raises CheckpointError if process 0 could not.
        """
        unfinished, error = [], None
        try:
            if jax.process_index() == 0:
                unfinished = sorted(self._steps.begun() - set(self.steps()))
            for step in unfinished:
                self._steps.files(step).remove()
        except (OSError, ValueError) as e:
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

    def save(self, step: int, tree: Tree, config: Mapping[str, Any] | None = None) -> None:
        """Copies the tree to host memory, and writes it in the background.

        First waits for the save before, so that host memory holds one copy. `config` is any JSON;
        `metadata` returns it. Raises CheckpointError if the save before failed, ConfigError if the
        step is there already.
        """
        self.wait()
        files = self._steps.files(step)
        if files.is_committed():
            raise ConfigError(f'{self.path} holds step {step} already: remove it to save it again')
        leaves = copy_to_host(tree)
        metadata = encode_metadata(step, leaves, config)
        self._run_id = self._run_id or from_process_0(secrets.randbits(31))
        self._saves += 1
        save_id = f'{self._run_id}-{self._saves}'.encode()
        self._give_up.clear()
        written = self._pool.submit(files.write, leaves, metadata, save_id)
        committed = self._pool.submit(self._commit, files, written, metadata, save_id)
        self._saving = Saving(step, written, committed)

    def _commit(self, files: StepFiles, written: Future, metadata: bytes, save_id: bytes) -> None:
        """On process 0, writes the marker once all processes have written; then removes old steps.

        Runs in the background, after this process has written its own files.
        """
        if jax.process_index() != 0 or written.exception() is not None:
            return
        files.wait_for_processes(save_id, self._give_up)
        files.commit(metadata)
        step = files.step
        try:
            self._steps.remove_old(step, self.keep, self.keep_every)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f'step {step} is saved in {self.path}, but older ones could not be removed: {error}'
                f'\nMend the access; the same command then goes on from step {step}.'
            ) from error

    def wait(self) -> None:
        """Waits until the save under way is committed.

        Raises CheckpointError on all processes if the save failed on any.
        """
        if self._saving is None:
            return
        (step, written, committed), self._saving = self._saving, None
        if not all_processes(written.exception() is None):
            self._give_up.set()
        error = written.exception() or committed.exception()
        if not all_processes(error is None):
            raise CheckpointError(self._not_saved(step, error)) from error

    def _not_saved(self, step: int, error: BaseException | None) -> str:
        """Returns the message of a failed save; `error` is None if another process failed."""
        if isinstance(error, CheckpointError):
            return str(error)
        cause = error or 'another process failed, see its message'
        return (
            f'step {step} could not be saved in {self.path}: {cause}\nSteps that are safe there: '
            f'{listed(self.steps())}. Make room or mend the access; the same command then goes on '
            f'from the newest.'
        )

    # ---------------------------------------------------------------------------------------------
    # Restoring
    # ---------------------------------------------------------------------------------------------

    def restore(self, step: int, tree: Tree) -> Tree:
        """Returns the leaves that `tree` asks for, by its ShapeDtypeStructs or arrays.

        A leaf that has a sharding becomes a jax array with it, others become numpy arrays. Leaves
        of the checkpoint that the tree leaves out are not read. Raises ConfigError if there is no
        such step, or a leaf is missing or has another shape or type; CheckpointError, with leaf,
        file and older steps, if on any process a file is missing or damaged.
        """
        leaves, error, wanted = [], None, leaf_names(tree)
        try:
            entries = self._steps.metadata(step)['leaves']
            check_leaves(wanted, entries, f'{self.path}/{step}')
            leaves = self._steps.files(step).read(wanted, entries)
        except (DamagedError, OSError, ValueError) as e:
            error = e
        if all_processes(error is None):
            return jax.tree.unflatten(jax.tree.structure(tree), leaves)
        if isinstance(error, ValueError):
            raise error
        cause = error or 'another process could not read it, see its message'
        raise CheckpointError(f'{cause}\nNothing was loaded. {self._steps.remedy(step)}') from error
