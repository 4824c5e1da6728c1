"""A saved state comes back bit for bit, on any mesh; a damaged or unfinished one never does."""

import functools
import json
import os
import pathlib
import random
import re
import shutil
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from common_checkpoint import assert_placed, assert_same, bits, config_on, shapes_on, state_on
from common_data import damage, swap
from jax.sharding import NamedSharding
from servers import serve_gs, serve_s3

import checkpoint
from checkpoint import Checkpointer, CheckpointError
from config import ConfigError
from parallel import P, Tree, make_mesh
from storage import folders, leaves, reading
from storage.leaves import chunk_shape, leaf_names
from storage.metadata import encode_metadata, with_checksums
from storage.reading import windowed
from storage.steps import StepFiles, Steps
from storage.stores import open_store

UNSYNCED = {'file_io_sync': False}  # a context: many small files, and no power cut
MESHES = [
    {'dp': 1},
    {'dp': 2},
    {'pp': 2, 'fsdp': 2, 'tp': 2},
    {'fsdp': 2, 'ep': 4},
    {'tp': 8},
    {'pp': 2, 'ep': 2, 'tp': 2},
]


def wanted(tree: Tree) -> Tree:
    """Returns shapes, types and shardings of a tree of arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None)),
        tree,
    )


def small_tree(seed: int = 0) -> Tree:
    """Returns two leaves on a mesh and one on a device, in four files of chunks or more."""
    mesh = make_mesh({'fsdp': 2, 'tp': 2})
    rng = np.random.default_rng(seed)

    def put(shape: tuple[int, ...], *spec: str) -> jax.Array:
        values = rng.normal(size=shape).astype(np.float32)
        return jax.device_put(values, NamedSharding(mesh, P(*spec)))

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


@functools.cache
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
        checkpoints.save(3, tree, {'block': ('dense',)}, {'digest': 'abc'})
    with Checkpointer(path, context=context) as checkpoints:
        assert checkpoints.latest_step() == 3
        assert_same(checkpoints.restore(3, wanted(tree)), tree)
        checkpoints.verify(3)
        metadata = checkpoints.metadata(3)
    assert metadata['step'] == 3
    assert metadata['config'] == {'block': ['dense']}
    assert metadata['data'] == {'digest': 'abc'}
    assert metadata['versions']['jax'] == jax.__version__


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_checkpoints_in_a_bucket(scheme, monkeypatch):
    tree = {name: odd_tree()[name] for name in ('special', 'empty', 'keys', 'a key.with/signs')}
    with serve_gs() if scheme == 'gs' else serve_s3() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with Checkpointer(f'{scheme}://bucket/run/checkpoints', keep=2) as checkpoints:
            for step in (1, 10, 3):
                checkpoints.save(step, tree)
            checkpoints.wait()
            assert checkpoints.steps() == [3, 10]
            keys = open_store(checkpoints.path).list().result()
            assert {key.split(b'/')[0] for key in keys} == {b'3', b'10'}
            assert_same(checkpoints.restore(10, wanted(tree)), tree)
            checkpoints.verify(3)
            with pytest.raises(ConfigError, match='use one of: 3, 10'):
                checkpoints.restore(1, tree)


@pytest.fixture(scope='module', params=[MESHES[0], MESHES[-1]], ids=str)
def saved(request, tmp_path_factory) -> tuple[str, Tree]:
    """A checkpoint's path, and the state on some mesh that its step 1 holds."""
    folder, state = str(tmp_path_factory.mktemp('saved')), state_on(config_on(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves, 'CHUNK_BYTES', 4000)  # a few rows, as with a large model
        patch.setattr(reading, 'WINDOW_BYTES', 10_000)  # a few leaves
        with Checkpointer(folder, context=ts.Context(UNSYNCED)) as checkpoints:
            checkpoints.save(1, state)
    return folder, state


@pytest.mark.parametrize('to', MESHES, ids=str)
def test_a_state_moves_between_meshes(to, saved, monkeypatch):
    monkeypatch.setattr(reading, 'WINDOW_BYTES', 10_000)
    folder, state = saved
    target = shapes_on(config_on(to))
    restored = Checkpointer(folder).restore(1, target)
    assert_same(restored, state)
    assert_placed(restored, target)


def test_a_subtree_is_restored_without_reading_the_rest(tmp_path):
    tree = small_tree()
    tree['moments'] = jax.tree.map(jnp.zeros_like, tree['params'])
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        for path in files(tmp_path):
            if '/moments.' in str(path):
                path.unlink()
        part = {'params': tree['params']}
        assert_same(checkpoints.restore(1, wanted(part)), part)
        with pytest.raises(CheckpointError, match='moments'):
            checkpoints.restore(1, wanted(tree))


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
        with pytest.raises(ConfigError, match='bias is not there') as caught:
            checkpoints.restore(4, tree)
        text = str(caught.value)
        assert 'params.w is float32 [8, 6], asked for float32 [8, 7]' in text
        assert 'step is int32 [], asked for float32 []' in text
        assert 'gain' not in text
        for ask in (checkpoints.metadata, checkpoints.verify, lambda s: checkpoints.restore(s, {})):
            with pytest.raises(ConfigError, match='no committed step 5; use one of: 4'):
                ask(5)
        with pytest.raises(ConfigError, match='holds step 4 already'):
            checkpoints.save(4, tree)
    with pytest.raises(ConfigError, match='use 0 or more'):
        Checkpointer(str(tmp_path), keep=-1)


# ---------------------------------------------------------------------------------------------
# Time: the background, retention, failures
# ---------------------------------------------------------------------------------------------


class Gate:
    """Holds a method of StepFiles back until the gate is opened."""

    def __init__(self, monkeypatch, method: str):
        self.reached, self.opened = threading.Event(), threading.Event()
        original = getattr(StepFiles, method)

        def held(*args):
            self.reached.set()
            assert self.opened.wait(60)
            return original(*args)

        monkeypatch.setattr(StepFiles, method, held)


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, 'write')
    # One leaf whose memory XLA would rather use again than give back.
    tree = small_tree(1)
    sharding = tree['params']['w'].sharding
    tree['large'] = jax.device_put(np.arange(1 << 18, dtype=np.float32).reshape(512, -1), sharding)
    counts = np.arange(3)
    expected = jax.tree.map(np.array, tree | {'counts': counts})

    @functools.partial(jax.jit, donate_argnums=0)
    def next_step(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x + 1, tree)

    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, tree | {'counts': counts})
        assert gate.reached.wait(60)
        jax.block_until_ready(next_step(tree))  # which takes the buffers
        counts += 1
        assert checkpoints.steps() == []
        gate.opened.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]
        assert_same(checkpoints.restore(1, wanted(expected)), expected)


def test_one_save_is_in_flight_at_a_time(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, 'write')
    copies = []
    original = checkpoint.copy_to_host
    monkeypatch.setattr(checkpoint, 'copy_to_host', lambda t, *_: copies.append(t) or original(t))
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


def test_no_more_than_a_window_is_under_way(monkeypatch):
    monkeypatch.setattr(reading, 'WINDOW_BYTES', 10)
    events = []

    def items():
        for number, size in enumerate([4, 4, 4, 20, 1]):
            events.append(f'start {number}')
            yield number, size

    for number in windowed(items()):
        events.append(f'end {number}')
    assert events == [
        'start 0', 'start 1', 'start 2', 'end 0', 'start 3', 'end 1', 'end 2', 'end 3', 'start 4',
        'end 4',
    ]  # fmt: skip


def test_host_copies_are_freed_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, 'WINDOW_BYTES', 0)
    left = []
    original = StepFiles.open_leaf

    def counting(self, name, entry):
        left.append(len(copies))
        return original(self, name, entry)

    monkeypatch.setattr(StepFiles, 'open_leaf', counting)
    copies = leaves.copy_to_host(small_tree())
    Steps(str(tmp_path)).files(1).write(copies, b'')
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
        with pytest.raises(ConfigError, match='no committed step 3'):
            checkpoints.restore(3, wanted(small_tree()))
        assert checkpoints.clean() == [3, 4]
        assert sorted(os.listdir(tmp_path)) == ['1', '2', 'notes.txt']
        checkpoints.save(3, small_tree(3))


def test_what_is_no_step_is_left_alone(tmp_path):
    for name in ('04', '\u0663', '20261127', 'notes'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'mine.txt').write_text('mine')
    (tmp_path / '05' / 'arrays').mkdir(parents=True)
    (tmp_path / '04' / 'COMMIT').write_text('no number as steps have them')
    (tmp_path / '7').write_text('a file')
    (tmp_path / '8' / 'arrays').mkdir(parents=True)
    (tmp_path / '8' / 'mine.txt').write_text('mine')
    (tmp_path / '8' / 'metadata.json.__lock').write_text('half')
    before = {path for path in tmp_path.rglob('*') if path.parent.name != '8'}
    checkpoints = Checkpointer(str(tmp_path))
    assert checkpoints.latest_step() is None
    assert checkpoints.clean() == [8]
    assert checkpoints.clean() == []
    assert {path for path in tmp_path.rglob('*') if path.parent.name != '8'} == before
    assert os.listdir(tmp_path / '8') == ['mine.txt']


def test_leftovers_of_killed_writes_confuse_nothing(tmp_path):
    save_steps(tmp_path, 1, 2)
    for path in files(tmp_path):
        path.with_name(path.name + '.__lock').write_text('half')
    (tmp_path / '3').mkdir()
    (tmp_path / '3' / 'COMMIT.__lock').write_text('half')
    with Checkpointer(str(tmp_path), keep=2) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.clean() == [3]
        assert_same(checkpoints.restore(2, wanted(small_tree(2))), small_tree(2))
        checkpoints.save(3, small_tree(3))
    assert sorted(os.listdir(tmp_path)) == ['2', '3']


def test_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with Checkpointer('~/a/') as checkpoints:
        checkpoints.save(1, small_tree(1))
    assert os.listdir(tmp_path / 'a') == ['1']
    assert checkpoints.path == f'{tmp_path}/a'


@pytest.mark.parametrize(
    ('keep', 'keep_every', 'left'),
    [(0, 0, [1, 2, 3, 4, 5, 6]), (2, 0, [5, 6]), (1, 3, [3, 6]), (2, 4, [4, 5, 6])],
)
def test_retention(keep, keep_every, left, tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, 5, 6, keep=keep, keep_every=keep_every)
    assert Checkpointer(str(tmp_path)).steps() == left
    assert sorted(map(int, os.listdir(tmp_path))) == left


def write_metadata(folder: pathlib.Path, content: str) -> None:
    """Replaces metadata.json, and COMMIT by its checksum."""
    (folder / 'metadata.json').write_text(content)
    (folder / 'COMMIT').write_text(f'{zlib.crc32(content.encode()):08x}')


def test_a_step_that_cannot_be_read_takes_no_intact_one_s_place(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    (tmp_path / '3' / 'metadata.json').write_text('{}')
    metadata = json.loads((tmp_path / '2' / 'metadata.json').read_text())
    metadata['versions']['layout'] = 0
    write_metadata(tmp_path / '2', json.dumps(metadata))
    with Checkpointer(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(4, small_tree(4))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3, 4]
        with pytest.raises(ConfigError, match='/2 has layout 0, this code reads 1, 2:'):
            checkpoints.restore(2, wanted(small_tree()))
        with pytest.raises(CheckpointError, match='The older step 1 is intact: remove 3, 2 from'):
            checkpoints.metadata(3)


@pytest.mark.parametrize('where', ['next save', 'close', 'wait', 'exception'])
@pytest.mark.parametrize('method', ['write', 'commit'])
def test_a_failed_save_is_raised(where, method, tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def fail(self, *args):
        raise ValueError('RESOURCE_EXHAUSTED: no space left')

    checkpoints = Checkpointer(str(tmp_path))
    monkeypatch.setattr(StepFiles, method, fail)
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
    assert os.listdir(tmp_path) == ['1']  # the room that it took is free again


def test_a_failed_save_is_visible_at_once(tmp_path, monkeypatch):
    gate = Gate(monkeypatch, 'write')
    checkpoints = Checkpointer(str(tmp_path))
    assert not checkpoints.failed()
    checkpoints.save(1, small_tree(1))
    assert not checkpoints.failed()
    monkeypatch.setattr(StepFiles, 'commit', fail)
    gate.opened.set()
    deadline = time.monotonic() + 60
    while not checkpoints.failed():
        assert time.monotonic() < deadline
    with pytest.raises(
        CheckpointError, match=r'step 1 could not .*\nSteps that are safe there: none'
    ):
        checkpoints.wait()
    assert not checkpoints.failed()


def fail(*args) -> None:
    raise OSError('the disk is gone')


def test_a_store_that_is_gone_hides_no_failure(tmp_path, monkeypatch):
    checkpoints = Checkpointer(str(tmp_path))
    for method in ('write', 'remove'):
        monkeypatch.setattr(StepFiles, method, fail)
    checkpoints.save(1, small_tree(1))
    monkeypatch.setattr(folders, 'entries', fail)
    with pytest.raises(CheckpointError, match=r'disk is gone\nSteps that are safe there: unknown'):
        checkpoints.close()


def test_who_lost_the_lease_neither_writes_nor_removes(tmp_path):
    def lost() -> None:
        raise RuntimeError('pid 7 writes here')

    save_steps(tmp_path, 1, 2)
    (tmp_path / '3').mkdir()
    checkpoints = Checkpointer(str(tmp_path), keep=1, check_owner=lost)
    with pytest.raises(CheckpointError, match=r'steps 3 in .* not be removed: pid 7 writes here'):
        checkpoints.clean()
    checkpoints.save(4, small_tree(4))
    with pytest.raises(
        CheckpointError, match=r'step 4 could not be saved in .*: pid 7 writes'
    ) as e:
        checkpoints.close()
    assert 'must not write there any more' in str(e.value)
    assert sorted(os.listdir(tmp_path)) == ['1', '2', '3']
    calls = []
    with Checkpointer(str(tmp_path), keep=1, check_owner=lambda: calls.append(0)) as checkpoints:
        checkpoints.clean()
        checkpoints.save(5, small_tree(5))
    assert len(calls) == 1 + 3 + 2  # an unfinished step; chunks, metadata, COMMIT; two old
    assert os.listdir(tmp_path) == ['5']


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / 'file').write_text('')
    checkpoints = Checkpointer(f'{tmp_path}/file')
    match = f'the checkpoints in {tmp_path}/file cannot be read: '
    for look in (checkpoints.latest_step, checkpoints.steps):
        with pytest.raises(ConfigError, match=match):
            look()
    with pytest.raises(CheckpointError, match=match):
        checkpoints.clean()


def test_a_failed_removal_is_told_from_a_failed_save(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def fail(self):
        raise OSError('permission denied')

    monkeypatch.setattr(StepFiles, 'remove', fail)
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    checkpoints.save(2, small_tree(2))
    with pytest.raises(CheckpointError, match=r'^step 2 is saved .* permission denied'):
        checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    (tmp_path / '3').mkdir()
    with pytest.raises(CheckpointError, match=r'steps 3 in .* not be removed: permission denied'):
        checkpoints.clean()


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


# Kind of file -> the bytes of each whose bits are tried; a crc32c finds any bit of a chunk alike.
TRIED = {'chunk': 12, 'metadata.json': 60, 'COMMIT': 8, 'zarr.json': 15}


def test_a_flipped_bit_in_any_file_is_noticed_or_harmless(tmp_path):
    save_steps(tmp_path, 1, 2)
    tree = small_tree(2)
    rng = random.Random(0)
    noticed = set()
    for path in files(tmp_path / '2'):
        good = path.read_bytes()
        kind = path.name if path.name in TRIED else 'chunk'
        for position in rng.sample(range(len(good)), min(len(good), TRIED[kind])):
            bad = bytearray(good)
            bad[position] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
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
        with pytest.raises(CheckpointError) as caught:
            Checkpointer(str(tmp_path)).restore(4, wanted(tree))
        text = str(caught.value)
        assert str(path) in text
        assert 'Nothing was loaded' in text
        assert 'The older step 2 is intact (not read: 1): remove 4, 3 from' in text
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            Checkpointer(str(tmp_path)).verify(4)
        path.write_bytes(good)


def assert_damaged(folder: pathlib.Path, step: int, match: str) -> None:
    """Checks that a step can be neither restored nor verified, and that the message says why."""
    checkpoints = Checkpointer(str(folder))
    with pytest.raises(CheckpointError, match=match):
        checkpoints.restore(step, wanted(small_tree()))
    with pytest.raises(CheckpointError, match=match):
        checkpoints.verify(step)


def test_a_step_under_another_number_is_refused(tmp_path):
    save_steps(tmp_path, 1, 2)
    shutil.copytree(tmp_path / '2', tmp_path / '3')
    (tmp_path / '1').rename(tmp_path / '4')
    assert_damaged(tmp_path, 3, '/3/metadata.json is that of step 2: the folder was copied')
    assert_damaged(tmp_path, 4, '/4/metadata.json is that of step 1: the folder was copied')
    save_steps(tmp_path, 5, 6, keep=1)  # they take no place of a good one
    assert sorted(os.listdir(tmp_path)) == ['3', '4', '6']


EXCHANGED = ['leaves', 'chunks', 'chunk of a step', 'leaf of a step', 'arrays of a step']


@pytest.mark.parametrize('what', EXCHANGED)
def test_exchanged_files_are_noticed(what, tmp_path):
    save_steps(tmp_path, 1, 2)
    w, other = 'arrays/params.w', tmp_path / '1'
    if what == 'leaves':
        tree = {'a': jnp.arange(6.0), 'b': jnp.zeros(6)}
        with Checkpointer(f'{tmp_path}/x') as checkpoints:
            checkpoints.save(2, tree)
        swap(tmp_path / 'x/2/arrays/a', tmp_path / 'x/2/arrays/b')
        with pytest.raises(CheckpointError, match='/x/2/arrays/a/c/0 is not the file that was'):
            Checkpointer(f'{tmp_path}/x').restore(2, wanted(tree))
        return
    if what == 'chunks':
        swap(tmp_path / '2' / w / 'c/0/0', tmp_path / '2' / w / 'c/1/0')
    else:
        path = {'chunk of a step': f'{w}/c/0/0', 'leaf of a step': w}.get(what, 'arrays')
        swap(tmp_path / '2' / path, other / path)
        assert_damaged(tmp_path, 1, 'is not the file that was written there')
    assert_damaged(tmp_path, 2, 'leaf params.*: .*/c/[01](/0)? is not the file that was written')


def to_layout_1(folder: pathlib.Path) -> None:
    """Makes a step what was saved before metadata.json had the chunks' checksums."""
    metadata = json.loads((folder / 'metadata.json').read_text())
    metadata['versions']['layout'] = 1
    del metadata['data']
    for entry in metadata['leaves'].values():
        del entry['crc32c']
    write_metadata(folder, json.dumps(metadata))


def test_layout_1_is_read(tmp_path):
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(1, odd_tree(), {'steps': 1})
    to_layout_1(tmp_path / '1')
    checkpoints = Checkpointer(str(tmp_path), keep=1)
    assert_same(checkpoints.restore(1, wanted(odd_tree())), odd_tree())
    assert checkpoints.metadata(1).get('data') is None
    checkpoints.verify(1)
    checkpoints.save(2, odd_tree())
    checkpoints.close()
    assert os.listdir(tmp_path) == ['2']


def test_processes_write_one_step(tmp_path, monkeypatch):
    """Each writes its chunks; process 0 gathers the checksums, but not those of an earlier save."""
    tree = small_tree(3)
    step = Steps(str(tmp_path)).files(3)
    written = []
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    for process in (1, 0):
        monkeypatch.setattr(jax, 'process_index', lambda p=process: p)
        parts = leaves.copy_to_host(tree)
        for leaf in parts:
            leaf.chunks[:] = leaf.chunks[process::2]
        written.append(step.write(parts, b'7-1'))
    gave_up = threading.Event()
    gave_up.set()
    with pytest.raises(RuntimeError, match='processes 1 did not write their chunks'):
        step.gather(b'7-2', {}, gave_up)
    found = step.gather(b'7-1', written[1], threading.Event())
    metadata = encode_metadata(3, leaves.copy_to_host(tree), None, {'digest': 'x'})
    with pytest.raises(AssertionError, match=r'each chunk of params.* is written once'):
        with_checksums(metadata, written[1:])
    step.commit(with_checksums(metadata, found))
    monkeypatch.undo()
    checkpoints = Checkpointer(str(tmp_path))
    assert_same(checkpoints.restore(3, wanted(tree)), tree)
    assert checkpoints.metadata(3)['data'] == {'digest': 'x'}
    swap(tmp_path / '3/arrays/params.w/c/0/0', tmp_path / '3/arrays/params.w/c/1/0')
    assert_damaged(tmp_path, 3, 'is not the file that was written there')


# ---------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------


def test_a_linked_folder_of_checkpoints(tmp_path):
    (tmp_path / 'big').mkdir()
    (tmp_path / 'checkpoints').symlink_to(tmp_path / 'big')
    save_steps(tmp_path / 'checkpoints', 1, 2, keep=1)
    (tmp_path / 'big' / '2' / 'COMMIT').unlink()
    save_steps(tmp_path / 'checkpoints', 3)
    checkpoints = Checkpointer(f'{tmp_path}/checkpoints')
    assert checkpoints.latest_step() == 3
    assert checkpoints.clean() == [2]
    assert_same(checkpoints.restore(3, wanted(small_tree(3))), small_tree(3))
    (tmp_path / 'big').rename(tmp_path / 'unmounted')
    with pytest.raises(ConfigError, match=r'is a link to .*/big, which is not there.*: mount it'):
        Checkpointer(f'{tmp_path}/checkpoints').latest_step()
    (tmp_path / 'run').symlink_to(tmp_path / 'big')
    with pytest.raises(ConfigError, match=f'{tmp_path}/run is a link to .*/big, which is not'):
        Checkpointer(f'{tmp_path}/run/checkpoints').latest_step()


def moved(step: pathlib.Path) -> pathlib.Path:
    """Moves a file or folder elsewhere, and leaves a link to it; returns where it is."""
    target = step.parent.parent / f'elsewhere-{step.name}'
    while target.exists():
        target = target.with_name(target.name + '+')
    step.rename(target)
    step.symlink_to(target)
    return target


def test_a_linked_step_is_read_and_stays(tmp_path):
    folder = tmp_path / 'checkpoints'
    save_steps(folder, 1, 2)
    target = moved(folder / '1')
    checkpoints = Checkpointer(str(folder), keep=1)
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.clean() == []
    assert_same(checkpoints.restore(1, wanted(small_tree(1))), small_tree(1))
    checkpoints.save(3, small_tree(3))
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]
    assert (folder / '1').readlink() == target


@pytest.mark.parametrize('which', ['.', 'arrays', 'arrays/params.w', 'metadata.json'])
def test_nothing_is_removed_through_links(which, tmp_path):
    folder = tmp_path / 'checkpoints'
    save_steps(folder, 1, 2)
    (folder / '0' / 'arrays').mkdir(parents=True)
    moved(folder / '2' / which)
    (folder / '2' / 'COMMIT').unlink()
    assert_not_cleaned(folder, which)


@pytest.mark.parametrize('which', ['.', 'COMMIT'])
def test_a_step_on_a_disk_that_is_not_there_is_not_removed(which, tmp_path):
    folder = tmp_path / 'checkpoints'
    save_steps(folder, 1, 2)
    moved(folder / '2' / which).rename(tmp_path / 'unmounted')
    assert 'which is not there (is its disk mounted?)' in assert_not_cleaned(folder, which)


def assert_not_cleaned(folder: pathlib.Path, link: str) -> str:
    """Checks that the unfinished step 2 stays, for the link in it; returns the message."""
    before = sorted(folder.parent.rglob('*'))
    checkpoints = Checkpointer(str(folder))
    assert checkpoints.steps() == [1]
    with pytest.raises(CheckpointError, match='nothing is removed through links') as caught:
        checkpoints.clean()
    assert f'{os.path.normpath(folder / "2" / link)} is a link to ' in str(caught.value)
    assert sorted(folder.parent.rglob('*')) == before
    return str(caught.value)


# ---------------------------------------------------------------------------------------------
# Everything at random
# ---------------------------------------------------------------------------------------------


def test_whatever_is_damaged_a_restore_is_right_or_refused(tmp_path):
    save_steps(tmp_path / 'whole', 1, 2)
    rng, messages = random.Random(0), []
    right = {step: list(map(bits, jax.tree.leaves(small_tree(step)))) for step in (1, 2)}
    wants = {step: wanted(small_tree(step)) for step in (1, 2)}
    for i in range(100):
        folder = tmp_path / f'copy-{i}'
        shutil.copytree(tmp_path / 'whole', folder)
        said = damage(folder, rng)
        checkpoints = Checkpointer(str(folder))
        for step in checkpoints.steps():
            try:
                restored = checkpoints.restore(step, wants[step])
            except (CheckpointError, ConfigError) as error:
                messages.append(str(error))
            else:
                assert list(map(bits, jax.tree.leaves(restored))) == right[step], said
    assert len(messages) > 40
    assert all(str(tmp_path) in message for message in messages)
