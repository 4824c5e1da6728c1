"""Saving and restoring, beside a plain sequential write and read of as many bytes and beside Orbax.

    python benchmarks/checkpoint_speed.py --megabytes=1024
    python benchmarks/checkpoint_speed.py --noorbax --folder=/mnt/disk --cpu_devices=8 --json

The tree is a train state's: parameters and two moments, float32, sharded over all devices.
`blocked` is the time until `save` returns, `save` until the step is committed, with nothing else
running. `loop_blocked` and `loop_save` are the same times of a save within a loop of steps which go
on meanwhile and update the tree in place, as training does; the tree restored then has to be the
one before them. Each round does everything once, one after the other, since the speed of a disk
drifts; the figures are medians over the rounds after the first, and ratios are medians of the
ratios of a round. Before anything is read, its pages are dropped from the system's cache (but not
from that of a virtual disk's host). Orbax is no dependency of the project: pip install
orbax-checkpoint
"""

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
ORBAX_RATIOS = {
    'orbax_blocked_share_of_save': ('orbax_blocked', 'orbax_save'),
    'save_rate_over_orbax': ('orbax_save', 'save'),
    'restore_rate_over_orbax': ('orbax_restore', 'restore'),
}


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
    file.parent.mkdir(parents=True)
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


def save_in_a_loop(tree: Tree, shapes: Tree, folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of a save during which steps go on, and of a step with and without it."""
    times, count = {}, itertools.count()
    times['loop_step_alone'] = steps_until(lambda: next(count) == 4, copy_of(tree))
    state, saved = copy_of(tree), threading.Event()
    with Checkpointer(str(folder)) as checkpoints, ThreadPoolExecutor(1) as thread:
        start = time.perf_counter()
        checkpoints.save(2, state)
        times['loop_blocked'] = time.perf_counter() - start
        step = thread.submit(steps_until, saved.is_set, state)
        checkpoints.wait()
        times['loop_save'] = time.perf_counter() - start
        saved.set()
        times['loop_step_while_saving'] = step.result()
        assert same(tree, checkpoints.restore(2, shapes))
    return times


# ---------------------------------------------------------------------------------------------
# Rounds
# ---------------------------------------------------------------------------------------------


def measure_plain(folder: pathlib.Path, buffer: memoryview) -> dict[str, float]:
    """Returns the seconds of a plain write and read of the buffer."""
    write, _ = timed(plain_write, folder / 'file', buffer)
    drop_cached(folder)
    read, _ = timed(plain_read, folder / 'file', buffer)
    return {'plain_write': write, 'plain_read': read}


def measure_ours(tree: Tree, shapes: Tree, folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of saving and restoring the tree, alone and in a loop of steps."""
    with Checkpointer(str(folder)) as checkpoints:
        blocked, _ = timed(checkpoints.save, 1, tree)
        rest, _ = timed(checkpoints.wait)
        drop_cached(folder)
        restore, restored = timed_until_ready(checkpoints.restore, 1, shapes)
    assert same(tree, restored)
    del restored
    times = {'blocked': blocked, 'save': blocked + rest, 'restore': restore}
    return times | save_in_a_loop(tree, shapes, folder)


def measure_orbax(tree: Tree, shapes: Tree, folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds of saving and restoring the tree with Orbax."""
    with orbax().StandardCheckpointer() as checkpointer:
        blocked, _ = timed(checkpointer.save, folder, tree)
        rest, _ = timed(checkpointer.wait_until_finished)
        drop_cached(folder)
        restore, restored = timed_until_ready(checkpointer.restore, folder, shapes)
    assert same(tree, restored)
    return {'orbax_blocked': blocked, 'orbax_save': blocked + rest, 'orbax_restore': restore}


def one_round(
    tree: Tree, shapes: Tree, folder: pathlib.Path, buffer: memoryview
) -> dict[str, float]:
    """Returns the seconds of everything, done once."""
    times = measure_plain(folder / 'plain', buffer)
    times |= measure_ours(tree, shapes, folder / 'ours')
    if FLAGS.orbax:
        times |= measure_orbax(tree, shapes, folder / 'orbax')
    shutil.rmtree(folder)
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
        folders = [pathlib.Path(folder) / str(i) for i in range(FLAGS.repeats + 1)]
        rounds = [one_round(tree, shapes, path, buffer) for path in folders][1:]

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
