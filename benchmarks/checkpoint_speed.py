"""Saving and restoring, beside a plain sequential write and read of as many bytes and beside Orbax.

    python benchmarks/checkpoint_speed.py --megabytes=1024
    python benchmarks/checkpoint_speed.py --noorbax --folder=/mnt/disk --cpu_devices=8 --json

The tree is a train state's: parameters and two moments, float32, sharded over all devices.
`blocked` is the time until `save` returns, `save` until the step is committed, with nothing else
running. `loop_blocked` and `loop_save` are the same times of a save within a loop of steps which go
on meanwhile and update the tree in place, as training does; the tree restored then has to be the
one before them: what a step writes into donated buffers must not reach the files. Orbax is measured
twice: as it comes (OCDBT, compressed by zstd), and like for like (`orbax_plain`: one zarr array a
leaf, not compressed); neither has a checksum of a chunk as ours do. Each round does everything
once, in an order that turns round from one to the next, since the speed of a disk drifts; the
figures are medians over the rounds after the first, and ratios are medians of the ratios of a
round: at most 1 where ours takes no longer. Before anything is read, its pages are dropped from the
system's cache (but not from that of a virtual disk's host). Orbax is no dependency of the project:
pip install orbax-checkpoint
"""

import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import common
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from common import Figures, timed, timed_until_ready
from jax.sharding import Mesh, NamedSharding

from checkpoint import Checkpointer
from config import ConfigError
from parallel import P, Tree, make_mesh

FLAGS = flags.FLAGS
BLOCK = 16 << 20  # bytes of a plain write or read

# figure -> the two times of a round whose ratio it is
RATIOS = {
    'blocked_share_of_save': ('blocked', 'save'),
    'loop_blocked_share_of_save': ('loop_blocked', 'loop_save'),
    'loop_step_slowed_by': ('loop_step_while_saving', 'loop_step_alone'),
    'save_rate_over_plain_write': ('plain_write', 'save'),
    'restore_rate_over_plain_read': ('plain_read', 'restore'),
}
TIMES = ('blocked', 'save', 'restore', 'loop_blocked', 'loop_save', 'loop_step_while_saving')
ORBAX = {'orbax': True, 'orbax_plain': False}  # name -> with OCDBT and compression
ORBAX_RATIOS = {f'{t}_over_{name}': (t, f'{name}_{t}') for name in ORBAX for t in TIMES}


def orbax() -> ModuleType:
    """Returns orbax.checkpoint. Raises ConfigError if it is not installed."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ConfigError(
            f'Orbax cannot be imported ({error}): pip install orbax-checkpoint, or --noorbax'
        ) from error
    return ocp


def make_tree(megabytes: int, mesh: Mesh) -> Tree:
    """Returns 3 x 16 leaves, float32, of this size together, and a step number."""
    columns = 1024
    rows = max(mesh.size, (megabytes << 20) // (48 * 4 * columns) // mesh.size * mesh.size)
    rng = np.random.default_rng(0)
    sharding = NamedSharding(mesh, P('fsdp'))

    def group() -> Tree:
        leaves = (rng.standard_normal((rows, columns), np.float32) for _ in range(16))
        return {f'layer_{i:02}': jax.device_put(leaf, sharding) for i, leaf in enumerate(leaves)}

    step = jax.device_put(np.int32(1), NamedSharding(mesh, P()))
    return {'params': group(), 'moments': {'m': group(), 'v': group()}, 'step': step}


def copy_of(tree: Tree) -> Tree:
    """Returns the tree in buffers of its own."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, tree))


def same(a: Tree, b: Tree) -> bool:
    """Says whether all leaves are equal."""
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---------------------------------------------------------------------------------------------
# Plain files
# ---------------------------------------------------------------------------------------------


def drop_cached(folder: pathlib.Path) -> None:
    """Makes the next read of the folder's files come from the disk."""
    os.sync()
    for path in folder.rglob('*'):
        if path.is_file():
            with open(path, 'rb') as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_write(file: pathlib.Path, data: memoryview) -> None:
    """Writes the data to a new file, through to the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, 'wb', buffering=0) as f:
        for i in range(0, len(data), BLOCK):
            f.write(data[i : i + BLOCK])
        os.fsync(f.fileno())


def plain_read(file: pathlib.Path, into: memoryview) -> None:
    """Reads the file into the buffer."""
    with open(file, 'rb', buffering=0) as f:
        for i in range(0, len(into), BLOCK):
            f.readinto(into[i : i + BLOCK])


# ---------------------------------------------------------------------------------------------
# Saves while steps go on
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0)
def train_step(tree: Tree, x: jax.Array) -> Tree:
    """Returns a new tree in the place of the old one, after the FLOPs of about 128 tokens."""
    x = jax.lax.fori_loop(0, FLAGS.megabytes // 4, lambda _, y: jnp.tanh(x @ y), x)
    return jax.tree.map(lambda leaf: leaf + x[0, 0].astype(leaf.dtype), tree)


def steps_until(done: Callable[[], bool], tree: Tree) -> float:
    """Makes steps until `done` says so, one at least, and returns the seconds per step."""
    x, n, start = jnp.eye(512), 0, time.perf_counter()
    while not n or not done():
        tree, n = jax.block_until_ready(train_step(tree, x)), n + 1
    return (time.perf_counter() - start) / n


class Ours:
    """This project's checkpoints below a folder."""

    def __init__(self, folder: pathlib.Path):
        self.checkpoints = Checkpointer(str(folder))
        self.wait, self.close = self.checkpoints.wait, self.checkpoints.close
        self.save = functools.partial(self.checkpoints.save, 1)
        self.restore = functools.partial(self.checkpoints.restore, 1)


class Orbax:
    """Orbax's checkpoint in a folder: as it comes, or one array a leaf and not compressed."""

    def __init__(self, folder: pathlib.Path, as_it_comes: bool):
        ocp = orbax()
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=as_it_comes, use_compression=as_it_comes)
        self.folder, self.ocp = folder / '1', ocp
        self.checkpointer = ocp.AsyncCheckpointer(handler)
        self.wait, self.close = self.checkpointer.wait_until_finished, self.checkpointer.close

    def save(self, tree: Tree) -> None:
        self.checkpointer.save(self.folder, args=self.ocp.args.PyTreeSave(tree))

    def restore(self, shapes: Tree) -> Tree:
        ways = self.ocp.checkpoint_utils.construct_restore_args(shapes)
        asked = self.ocp.args.PyTreeRestore(shapes, restore_args=ways)
        return self.checkpointer.restore(self.folder, args=asked)


def save_in_a_loop(saver: Ours | Orbax, tree: Tree, shapes: Tree) -> dict[str, float]:
    """Returns the seconds of a save during which steps go on, and of a step meanwhile."""
    times, state, saved = {}, copy_of(tree), threading.Event()
    with contextlib.closing(saver), ThreadPoolExecutor(1) as thread:
        start = time.perf_counter()
        saver.save(state)
        times['loop_blocked'] = time.perf_counter() - start
        step = thread.submit(steps_until, saved.is_set, state)
        del state
        saver.wait()
        times['loop_save'] = time.perf_counter() - start
        saved.set()
        times['loop_step_while_saving'] = step.result()
        assert same(tree, saver.restore(shapes))
    return times


# ---------------------------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------------------------


def measure_plain(folder: pathlib.Path, buffer: memoryview) -> dict[str, float]:
    """Returns the seconds of a plain write and read of the buffer."""
    write, _ = timed(plain_write, folder / 'file', buffer)
    drop_cached(folder)
    read, _ = timed(plain_read, folder / 'file', buffer)
    return {'write': write, 'read': read}


def measure_saves(
    new: Callable[[pathlib.Path], Ours | Orbax], tree: Tree, shapes: Tree, folder: pathlib.Path
) -> dict[str, float]:
    """Returns the seconds of saving and restoring the tree, alone and in a loop of steps."""
    folder.mkdir(parents=True)
    with contextlib.closing(new(folder / 'alone')) as saver:
        blocked, _ = timed(saver.save, tree)
        rest, _ = timed(saver.wait)
        drop_cached(folder)
        restore, restored = timed_until_ready(saver.restore, shapes)
    assert same(tree, restored)
    del restored
    times = {'blocked': blocked, 'save': blocked + rest, 'restore': restore}
    return times | save_in_a_loop(new(folder / 'loop'), tree, shapes)


def one_round(
    number: int, tree: Tree, shapes: Tree, folder: pathlib.Path, buffer: memoryview
) -> dict[str, float]:
    """Returns the seconds of everything, done once; odd rounds go backwards."""
    count = itertools.count()
    runs = {
        'loop_step_alone': lambda _: {'': steps_until(lambda: next(count) == 4, copy_of(tree))},
        'plain_': lambda folder: measure_plain(folder, buffer),
        '': lambda folder: measure_saves(Ours, tree, shapes, folder),
    }
    for name, as_it_comes in ORBAX.items() if FLAGS.orbax else ():
        new = functools.partial(Orbax, as_it_comes=as_it_comes)
        runs[f'{name}_'] = functools.partial(measure_saves, new, tree, shapes)
    times = {}
    for name in reversed(runs) if number % 2 else runs:
        os.sync()  # what the one before left to write does not count here
        times |= {name + t: x for t, x in runs[name](folder / (name or 'ours')).items()}
        shutil.rmtree(folder / (name or 'ours'), ignore_errors=True)
    return times


def main() -> Figures:
    common.prepare_devices(FLAGS.cpu_devices)
    if FLAGS.orbax:
        orbax()
    mesh = make_mesh({'fsdp': jax.device_count()})
    tree = make_tree(FLAGS.megabytes, mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(tree))
    buffer = memoryview(bytearray(np.random.default_rng(1).bytes(n_bytes)))
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
        rounds = [
            one_round(i, tree, shapes, pathlib.Path(folder), buffer)
            for i in range(FLAGS.repeats + 1)
        ][1:]

    ratios = RATIOS | (ORBAX_RATIOS if FLAGS.orbax else {})
    figures: Figures = {'bytes': n_bytes, 'devices': mesh.size, 'rounds': len(rounds)}
    for name, seconds in common.medians(rounds).items():
        figures[f'{name}_seconds'] = seconds
        if 'blocked' not in name and 'step' not in name:
            figures[f'{name}_mb_per_s'] = n_bytes / 1e6 / seconds
    return figures | common.medians(
        [{name: r[a] / r[b] for name, (a, b) in ratios.items()} for r in rounds]
    )


if __name__ == '__main__':
    flags.DEFINE_integer('megabytes', 1024, 'Size of the tree.', lower_bound=1)
    flags.DEFINE_integer('repeats', 5, 'Rounds, after one that warms up.', lower_bound=1)
    flags.DEFINE_string('folder', None, 'Where to write; the system folder for temporary files.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulated devices.')
    flags.DEFINE_boolean('orbax', True, 'Also measure Orbax.')
    common.run(main)
