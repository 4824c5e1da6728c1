"""Saving and restoring, beside a plain sequential write and read of as many bytes and beside Orbax.

    python benchmarks/checkpoint_speed.py --megabytes=1024
    python benchmarks/checkpoint_speed.py --noorbax --folder=/mnt/disk --cpu_devices=8 --json

The tree is a train state's: parameters and two moments, float32, sharded over all devices.
`blocked` is the time until `save` returns, `save` until the step is committed, with nothing else
running. `loop_` says the same of a save within a loop of steps which go on meanwhile and update
the tree in place, as training does; what is then restored has to be the tree before them. Each
round does everything once, one after the other, since the speed of a disk drifts; the figures are
medians over the rounds after the first, and ratios are medians of the ratios of a round. Before
anything is read, its pages are dropped from the system's cache (but not from that of a virtual
disk's host). Orbax is no dependency of the project: pip install orbax-checkpoint
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import NamedSharding

from checkpoint import Checkpointer
from machine.memory import keep_freed_memory
from parallel import P, make_mesh

FLAGS = flags.FLAGS
BLOCK = 16 << 20  # bytes of a plain write or read


def make_tree(megabytes: int, mesh) -> dict:
    """3 x 16 leaves and a step."""
    columns = 1024
    rows = max(mesh.size, (megabytes << 20) // (48 * 4 * columns) // mesh.size * mesh.size)
    rng = np.random.default_rng(0)
    sharding = NamedSharding(mesh, P('fsdp'))
    leaf = lambda: jax.device_put(  # noqa: E731
        rng.standard_normal((rows, columns), np.float32), sharding
    )
    group = lambda: {f'layer_{i:02}': leaf() for i in range(16)}  # noqa: E731
    step = jax.device_put(np.int32(1), NamedSharding(mesh, P()))
    return {'params': group(), 'moments': {'m': group(), 'v': group()}, 'step': step}


def drop_cached(folder: pathlib.Path) -> None:
    """Makes the next read of the files come from the disk."""
    os.sync()
    for path in folder.rglob('*'):
        if path.is_file():
            with open(path, 'rb') as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(f):
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def plain_write(file: pathlib.Path, data: memoryview) -> None:
    file.parent.mkdir(parents=True)
    with open(file, 'wb', buffering=0) as f:
        for i in range(0, len(data), BLOCK):
            f.write(data[i : i + BLOCK])
        os.fsync(f.fileno())


def plain_read(file: pathlib.Path, into: memoryview) -> None:
    with open(file, 'rb', buffering=0) as f:
        for i in range(0, len(into), BLOCK):
            f.readinto(into[i : i + BLOCK])


def same(a, b) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@functools.partial(jax.jit, donate_argnums=0)
def train_step(tree: dict, x: jax.Array) -> dict:
    """A new tree in the place of the old one, after the FLOPs of about 128 tokens."""
    x = jax.lax.fori_loop(0, FLAGS.megabytes // 4, lambda _, y: jnp.tanh(x @ y), x)
    return jax.tree.map(lambda leaf: leaf + x[0, 0].astype(leaf.dtype), tree)


def steps_until(done: Callable[[], bool], tree: dict) -> float:
    """Seconds a step of a loop that makes one at least."""
    x, n, start = jnp.eye(512), 0, time.perf_counter()
    while not n or not done():
        tree, n = jax.block_until_ready(train_step(tree, x)), n + 1
    return (time.perf_counter() - start) / n


def save_in_a_loop(tree: dict, shapes: dict, folder: pathlib.Path) -> dict:
    """Seconds of a save during which steps go on, and of a step with it and without."""
    copy = lambda: jax.block_until_ready(jax.tree.map(jnp.copy, tree))  # noqa: E731
    times, count = {}, itertools.count()
    times['loop_step_alone'] = steps_until(lambda: next(count) == 4, copy())
    state, saved = copy(), threading.Event()
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


def one_round(tree: dict, shapes: dict, folder: pathlib.Path, buffer: memoryview) -> dict:
    """Seconds of everything."""
    times = {}
    times['plain_write'], _ = timed(lambda: plain_write(folder / 'plain' / 'file', buffer))
    drop_cached(folder / 'plain')
    times['plain_read'], _ = timed(lambda: plain_read(folder / 'plain' / 'file', buffer))

    with Checkpointer(str(folder / 'ours')) as checkpoints:
        times['blocked'], _ = timed(lambda: checkpoints.save(1, tree))
        rest, _ = timed(checkpoints.wait)
        times['save'] = times['blocked'] + rest
        drop_cached(folder / 'ours')
        times['restore'], restored = timed(
            lambda: jax.block_until_ready(checkpoints.restore(1, shapes))
        )
    assert same(tree, restored)
    del restored
    times |= save_in_a_loop(tree, shapes, folder / 'ours')

    if FLAGS.orbax:
        with orbax().StandardCheckpointer() as checkpointer:
            times['orbax_blocked'], _ = timed(lambda: checkpointer.save(folder / 'orbax', tree))
            rest, _ = timed(checkpointer.wait_until_finished)
            times['orbax_save'] = times['orbax_blocked'] + rest
            drop_cached(folder / 'orbax')
            times['orbax_restore'], restored = timed(
                lambda: jax.block_until_ready(checkpointer.restore(folder / 'orbax', shapes))
            )
        assert same(tree, restored)
    shutil.rmtree(folder)
    return times


def orbax():
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        sys.exit(f'Orbax cannot be imported ({error}): pip install orbax-checkpoint, or --noorbax')
    return ocp


def main(_):
    keep_freed_memory()
    if FLAGS.cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', FLAGS.cpu_devices)
    if FLAGS.orbax:
        orbax()
    mesh = make_mesh({'fsdp': jax.device_count()})
    tree = make_tree(FLAGS.megabytes, mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    n_bytes = sum(x.nbytes for x in jax.tree.leaves(tree))
    buffer = memoryview(np.random.default_rng(1).bytes(n_bytes)).cast('B')
    buffer = memoryview(bytearray(buffer))
    rounds = []
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as folder:
        for i in range(FLAGS.repeats + 1):
            rounds.append(one_round(tree, shapes, pathlib.Path(folder) / str(i), buffer))
    rounds = rounds[1:]

    ratios = {
        'blocked_share_of_save': ('blocked', 'save'),
        'loop_blocked_share_of_save': ('loop_blocked', 'loop_save'),
        'loop_step_slowed_by': ('loop_step_while_saving', 'loop_step_alone'),
        'save_rate_over_plain_write': ('plain_write', 'save'),
        'restore_rate_over_plain_read': ('plain_read', 'restore'),
    }
    if FLAGS.orbax:
        ratios |= {
            'orbax_blocked_share_of_save': ('orbax_blocked', 'orbax_save'),
            'save_rate_over_orbax': ('orbax_save', 'save'),
            'restore_rate_over_orbax': ('orbax_restore', 'restore'),
        }
    median = lambda values: float(np.median(list(values)))  # noqa: E731
    result = {'bytes': n_bytes, 'devices': mesh.size, 'rounds': len(rounds)}
    for name in rounds[0]:
        result[f'{name}_seconds'] = median(r[name] for r in rounds)
        if 'blocked' not in name and 'step' not in name:
            result[f'{name}_mb_per_s'] = n_bytes / 1e6 / result[f'{name}_seconds']
    for name, (a, b) in ratios.items():
        result[name] = median(r[a] / r[b] for r in rounds)
    for name, value in result.items():
        print(f'{name:>32}  {value:,.3f}' if isinstance(value, float) else f'{name:>32}  {value:,}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_integer('megabytes', 1024, 'Size of the tree.', lower_bound=1)
    flags.DEFINE_integer('repeats', 5, 'Rounds, after one that warms up.', lower_bound=1)
    flags.DEFINE_string('folder', None, 'Where to write; the system folder for temporary files.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulated devices.')
    flags.DEFINE_boolean('orbax', True, 'Also measure Orbax.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    app.run(main)
