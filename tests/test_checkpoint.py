"""What is saved comes back bit for bit, on any mesh; what is damaged or unfinished never does."""

import os
import pathlib
import random
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from common import small_config
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from servers import serve_gs, serve_s3

import checkpoint
import train_step
from checkpoint import Checkpointer, CheckpointError
from parallel import P, Tree, make_mesh
from runtime.config_checks import validate
from storage import leaves
from storage.leaves import chunk_shape, leaf_names

UNSYNCED = {'file_io_sync': False}  # a context: many small files, and no power cut
MESHES = [
    {'dp': 1},
    {'dp': 2},
    {'pp': 2, 'fsdp': 2, 'tp': 2},
    {'fsdp': 2, 'ep': 4},
    {'tp': 8},
    {'pp': 2, 'ep': 2, 'tp': 2},
]


def bits(x) -> tuple:
    """Shape, type and bytes: equal for NaN and -0.0 alike only if every bit is."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), *bits(jax.random.key_data(x))
    x = np.asarray(x)
    return x.shape, x.dtype, x.tobytes()


def assert_same(a: Tree, b: Tree) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert bits(x) == bits(y), jax.tree_util.keystr(path)


def wanted(tree: Tree) -> Tree:
    """Shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None)),
        tree,
    )


def small_tree(seed: int = 0) -> Tree:
    """Two leaves on a mesh and one on a device; four files of chunks or more."""
    mesh = make_mesh({'fsdp': 2, 'tp': 2})
    rng = np.random.default_rng(seed)
    put = lambda shape, *spec: jax.device_put(  # noqa: E731
        rng.normal(size=shape).astype(np.float32), NamedSharding(mesh, P(*spec))
    )
    params = {'w': put((8, 6), 'fsdp', 'tp'), 'gain': put((6,), 'tp')}
    return {'params': params, 'step': jnp.int32(seed)}


def save_steps(folder, *numbers: int, **options) -> None:
    with Checkpointer(str(folder), context=ts.Context(UNSYNCED), **options) as checkpoints:
        for step in numbers:
            checkpoints.save(step, small_tree(step), {'steps': step})


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob('*') if path.is_file())


# ---------------------------------------------------------------------------------------------
# Trees, types, meshes, stores
# ---------------------------------------------------------------------------------------------


def odd_tree() -> Tree:
    rng = np.random.default_rng(0)
    on_device = {
        name: jnp.asarray(rng.integers(0, 2, (3, 5)), name)
        for name in ('float32', 'bfloat16', 'float16', 'int8', 'uint32', 'bool', 'complex64')
    }
    return {
        'types': on_device,
        'special': jnp.array([np.nan, -0.0, np.inf, 1e-45], jnp.float32),
        'scalar': jnp.float32(3),
        'empty': jnp.zeros((0, 3)),
        'keys': jax.random.split(jax.random.key(7), 3),
        'nothing': None,
        'pair': (jnp.arange(3), [jnp.ones((2, 2))]),
        'a key.with/signs': jnp.arange(4),
        'numpy': np.arange(5, dtype=np.int64),
        'number': np.asarray(7),
    }


@pytest.mark.parametrize('kind', ['folder', 'file://', 'memory://'])
def test_any_tree_comes_back(kind, tmp_path):
    tree = odd_tree()
    path = {'folder': f'{tmp_path}/a', 'file://': f'file://{tmp_path}/a'}.get(kind, 'memory://a')
    context = ts.Context()
    with Checkpointer(path, context=context) as checkpoints:
        checkpoints.save(3, tree, {'block': ('dense',)})
    with Checkpointer(path, context=context) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert_same(checkpoints.restore(3, wanted(tree)), tree)
        checkpoints.verify(3)
        metadata = checkpoints.metadata(3)
    assert metadata['step'] == 3
    assert metadata['config'] == {'block': ['dense']}
    assert metadata['versions']['jax'] == jax.__version__


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_checkpoints_in_a_bucket(scheme, monkeypatch):
    tree = odd_tree()
    with serve_gs() if scheme == 'gs' else serve_s3() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with Checkpointer(f'{scheme}://bucket/run/checkpoints', keep=2) as checkpoints:
            for step in (1, 10, 3):
                checkpoints.save(step, tree)
            checkpoints.wait()
            assert checkpoints.steps() == [3, 10]
            assert_same(checkpoints.restore(10, wanted(tree)), tree)
            checkpoints.verify(3)
            with pytest.raises(ValueError, match='use one of: 3, 10'):
                checkpoints.restore(1, tree)


def config_on(mesh: dict[str, int], chunks: int = 1) -> ConfigDict:
    """Four blocks of a dense and an MoE layer, after a dense one."""
    config = small_config(moe=True)
    config.model.n_layers, config.microbatches = 9, 2
    config.mesh.update(mesh)
    config.pipeline.chunks = chunks
    if chunks > 1:
        config.pipeline.schedule = 'interleaved'
    validate(config, 8)
    return config


def state_on(config: ConfigDict) -> Tree:
    """A train state on this mesh, each leaf with values of its own."""
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.normal(scale=100, size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(fill, train_step.abstract_state(config, make_mesh(config.mesh)))


def assert_placed(tree: Tree, target: Tree) -> None:
    for x, want in zip(jax.tree.leaves(tree), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(want.sharding, x.ndim)


@pytest.mark.parametrize('to', MESHES, ids=str)
@pytest.mark.parametrize('source', [MESHES[0], MESHES[-1]], ids=str)
def test_a_state_moves_between_meshes(source, to, tmp_path, monkeypatch):
    # Chunks of a few rows, and a window of a few leaves, as with a large model.
    monkeypatch.setattr(leaves, 'CHUNK_BYTES', 2000)
    monkeypatch.setattr(checkpoint, 'WINDOW_BYTES', 10_000)
    state = state_on(config_on(source))
    config = config_on(to)
    target = train_step.abstract_state(config, make_mesh(config.mesh))
    with Checkpointer(str(tmp_path), context=ts.Context(UNSYNCED)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(1, target)
    assert_same(restored, state)
    assert_placed(restored, target)


def test_a_subtree_is_restored_without_reading_the_rest(tmp_path):
    state = state_on(config_on({'fsdp': 2, 'tp': 2}))
    with Checkpointer(str(tmp_path), context=ts.Context(UNSYNCED)) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        for path in files(tmp_path):
            if '/moments.' in str(path):
                path.unlink()
        target = train_step.abstract_state(config_on({'tp': 4}), make_mesh({'tp': 4}))
        restored = checkpoints.restore(1, {'params': target['params']})
        assert_same(restored, {'params': state['params']})
        with pytest.raises(CheckpointError, match='moments'):
            checkpoints.restore(1, target)


def test_other_libraries_read_the_arrays(tmp_path):
    zarr = pytest.importorskip('zarr')
    save_steps(tmp_path, 1)
    found = zarr.open_array(str(tmp_path / '1' / 'arrays' / 'params.w'), mode='r')[:]
    assert bits(found) == bits(small_tree(1)['params']['w'])


@pytest.mark.parametrize(
    ('shape', 'chunk'),
    [
        ((), []),
        ((0, 4), [1, 4]),
        ((8, 16), [8, 16]),
        ((64, 1024, 1024), [4, 1024, 1024]),
        ((4, 8192, 8192), [1, 512, 8192]),
        ((65537, 768), [65537, 48]),  # a prime number of rows
        ((3 * 2**24,), [2**22]),
    ],
)
def test_chunks_divide_the_shard(shape, chunk):
    assert chunk_shape(shape, 4) == chunk
    assert all(size % c == 0 for size, c in zip(shape, chunk, strict=True))


def test_names_are_distinct():
    assert list(leaf_names({'a': {'b': 0}, 'a.b': 1, 'a/b': 2})) == ['a.b', 'a%2Eb', 'a%2Fb']
    assert list(leaf_names(5)) == ['tree']
    with pytest.raises(ValueError, match='distinct names'):
        leaf_names([{'': 1}])


def test_what_does_not_fit_is_refused_leaf_by_leaf(tmp_path):
    save_steps(tmp_path, 4)
    tree = small_tree()
    tree['params'] |= {'w': jnp.zeros((8, 7)), 'bias': jnp.zeros(3)}
    tree['step'] = jnp.float32(0)
    with Checkpointer(str(tmp_path)) as checkpoints:
        with pytest.raises(ValueError, match='bias is not there') as caught:
            checkpoints.restore(4, tree)
        text = str(caught.value)
        assert 'params.w is float32 [8, 6], asked for float32 [8, 7]' in text
        assert 'step is int32 [], asked for float32 []' in text
        assert 'gain' not in text
        with pytest.raises(ValueError, match='no committed step 5; use one of: 4'):
            checkpoints.restore(5, tree)
        with pytest.raises(ValueError, match='holds step 4 already'):
            checkpoints.save(4, tree)
    with pytest.raises(ValueError, match='use 0 or more'):
        Checkpointer(str(tmp_path), keep=-1)


# ---------------------------------------------------------------------------------------------
# Time: what runs in the background, what is kept, what fails
# ---------------------------------------------------------------------------------------------


class Gate:
    """Holds a method of Checkpointer back until it is opened."""

    def __init__(self, monkeypatch, method: str):
        self.reached, self.opened = threading.Event(), threading.Event()
        original = getattr(Checkpointer, method)

        def held(*args):
            self.reached.set()
            assert self.opened.wait(60)
            return original(*args)

        monkeypatch.setattr(Checkpointer, method, held)


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, '_write')
    tree = small_tree(1)
    expected = jax.tree.map(np.array, tree)
    add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, tree)
        assert gate.reached.wait(60)
        jax.block_until_ready(add(tree))  # the next step takes the buffers
        assert checkpoints.steps() == []
        gate.opened.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        assert_same(checkpoints.restore(1, wanted(expected)), expected)


def test_one_save_is_in_flight_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, '_write')
    copies = []
    original = checkpoint.copy_to_host
    monkeypatch.setattr(checkpoint, 'copy_to_host', lambda t: copies.append(t) or original(t))
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, small_tree(1))
        second = threading.Thread(target=checkpoints.save, args=(2, small_tree(2)))
        second.start()
        assert gate.reached.wait(60)
        second.join(0.2)
        assert second.is_alive()
        assert len(copies) == 1
        gate.opened.set()
        second.join(60)
        assert len(copies) == 2
    assert checkpoints.steps() == [1, 2]


def test_host_copies_are_freed_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'WINDOW_BYTES', 0)
    left = []
    original = Checkpointer._open

    def counting(self, step, name, entry):
        left.append(len(copies))
        return original(self, step, name, entry)

    monkeypatch.setattr(Checkpointer, '_open', counting)
    with Checkpointer(str(tmp_path)) as checkpoints:
        copies = checkpoint.copy_to_host(small_tree())
        checkpoints._write(1, copies, b'{}', b'')
    assert left == [2, 1, 0]


def test_without_its_marker_a_folder_does_not_count(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / '3' / 'COMMIT').unlink()
    (tmp_path / '4' / 'arrays').mkdir(parents=True)
    (tmp_path / '4' / 'arrays' / 'w.__lock').write_text('half')
    (tmp_path / 'notes.txt').write_text('mine')
    with Checkpointer(str(tmp_path)) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.latest_step() == 2
        with pytest.raises(ValueError, match='no committed step 3'):
            checkpoints.restore(3, wanted(small_tree()))
        assert checkpoints.clean() == [3, 4]
        assert sorted(os.listdir(tmp_path)) == ['1', '2', 'notes.txt']
        checkpoints.save(3, small_tree(3))


@pytest.mark.parametrize(
    ('keep', 'keep_every', 'left'),
    [(0, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [5, 6]), (1, 3, [3, 6]), (2, 4, [4, 5, 6])],
)
def test_retention(keep, keep_every, left, tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6, keep=keep, keep_every=keep_every)
    assert Checkpointer(str(tmp_path)).steps() == left
    assert sorted(map(int, os.listdir(tmp_path))) == left


def test_a_damaged_step_takes_no_intact_one_s_place(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / '2' / 'metadata.json').write_text('{}')
    with Checkpointer(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(3, small_tree(3))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3]


@pytest.mark.parametrize('where', ['next save', 'close', 'wait', 'exception'])
@pytest.mark.parametrize('method', ['_write', '_commit'])
def test_a_failed_save_is_raised(where, method, tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def fail(self, *args):
        raise ValueError('RESOURCE_EXHAUSTED: no space left')

    checkpoints = Checkpointer(str(tmp_path))
    monkeypatch.setattr(Checkpointer, method, fail)
    checkpoints.save(2, small_tree(2))
    if where == 'exception':
        with pytest.raises(KeyError) as caught, checkpoints:
            raise KeyError('the loop')
        text = '\n'.join(caught.value.__notes__)
    else:
        call = {'next save': lambda: checkpoints.save(3, small_tree(3))}
        with pytest.raises(CheckpointError) as caught:
            call.get(where, getattr(checkpoints, where, None))()
        text = str(caught.value)
    assert 'step 2 could not be saved' in text
    assert 'no space left' in text
    assert 'Steps that are safe there: 1.' in text
    assert checkpoints.steps() == [1]


def test_a_failed_removal_is_told_from_a_failed_save(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def fail(self, step):
        raise OSError('permission denied')

    monkeypatch.setattr(Checkpointer, '_delete', fail)
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    checkpoints.save(2, small_tree(2))
    with pytest.raises(CheckpointError, match=r'step 2 is saved .* permission denied'):
        checkpoints.close()
    assert checkpoints.steps() == [1, 2]


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_noticed_or_harmless(tmp_path):
    save_steps(tmp_path, 1, 2)
    tree = small_tree(2)
    rng = random.Random(0)
    noticed = set()
    for path in files(tmp_path / '2'):
        good = path.read_bytes()
        positions = range(len(good)) if len(good) < 200 else rng.sample(range(len(good)), 100)
        for position in positions:
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            kind = path.name if path.suffix or path.name == 'COMMIT' else 'chunk'
            checkpoints = Checkpointer(str(tmp_path))  # a cache of its own
            assert checkpoints.steps() == [1, 2]
            error = ''
            try:
                assert_same(checkpoints.restore(2, wanted(tree)), tree)
            except CheckpointError as e:
                error = str(e)
            # zarr.json is for other readers.
            assert bool(error) == (kind != 'zarr.json')
            if error:
                noticed.add(kind)
                assert 'The older step 1 is intact' in error
            if kind == 'chunk':
                leaf = path.relative_to(tmp_path / '2' / 'arrays').parts[0]
                assert str(path) in error
                assert f'leaf {leaf}:' in error
        path.write_bytes(good)
    assert noticed == {'chunk', 'metadata.json', 'COMMIT'}
    assert_same(Checkpointer(str(tmp_path)).restore(2, wanted(tree)), tree)


@pytest.mark.parametrize('damage', ['missing', 'short', 'empty', 'long'])
def test_lost_files_are_named(damage, tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    tree = small_tree(4)
    (tmp_path / '3' / 'arrays' / 'params.w' / 'c' / '0' / '0').unlink()
    for path in files(tmp_path / '4'):
        if path.name in ('zarr.json', 'COMMIT'):
            continue
        good = path.read_bytes()
        changed = {'short': good[:-1], 'empty': b'', 'long': good + b'\0', 'missing': b''}[damage]
        path.write_bytes(changed)
        if damage == 'missing':
            path.unlink()
        if damage == 'long' and path.name != 'metadata.json':  # what follows a chunk is not read
            assert_same(Checkpointer(str(tmp_path)).restore(4, wanted(tree)), tree)
            path.write_bytes(good)
            continue
        with pytest.raises(CheckpointError) as caught:
            Checkpointer(str(tmp_path)).restore(4, wanted(tree))
        text = str(caught.value)
        assert str(path) in text
        assert 'Nothing was loaded' in text
        assert 'The older step 2 is intact (not read: 1): remove 4, 3 from' in text
        path.write_bytes(good)
