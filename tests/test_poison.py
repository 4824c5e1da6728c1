"""A state that is not finite never becomes the newest checkpoint."""

import jax
import numpy as np
import pytest
import tensorstore as ts
from common import on_mesh, set_up, small_config
from common_runs import share_programs
from training_worker import small_run

import train
from checkpoint import Checkpointer, CheckpointError
from parallel import Tree
from storage.leaves import NotFiniteError, check_finite, leaf_names
from train_step import abstract_state

UNSYNCED = {'file_io_sync': False}

# (dp, fsdp, tp, ep, pp, cp)
MESHES = [
    (2, 2, 2), (1, 1, 2, 2, 2), (1,), (8,), (1, 8), (1, 1, 8), (1, 1, 1, 8), (1, 2, 2, 2),
    (2, 1, 1, 1, 1, 4), (1, 2, 1, 1, 2, 2),
]  # fmt: skip


def state_with(shapes: Tree, poisoned: str, device: jax.Device | None, value: float) -> Tree:
    """Returns a state of ones; `value` stands in the copy that one device has of one leaf."""

    def leaf(name: str, s: jax.ShapeDtypeStruct) -> jax.Array:
        shards = []
        for own, index in s.sharding.addressable_devices_indices_map(s.shape).items():
            data = np.ones(s.shape, s.dtype)[index]
            if name == poisoned and own == device:
                data[..., -1] = value
            shards.append(jax.device_put(data, own))
        return jax.make_array_from_single_device_arrays(s.shape, s.sharding, shards)

    named = [leaf(name, s) for name, s in leaf_names(shapes).items()]
    return jax.tree.unflatten(jax.tree.structure(shapes), named)


@pytest.mark.parametrize(
    'sizes', [*MESHES[:2], *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[2:])], ids=str
)
def test_a_poisoned_copy_on_one_device_is_not_saved(sizes, tmp_path):
    """It is refused if the copy is one that would be saved; the others are of no consequence."""
    shapes = abstract_state(set_up(on_mesh(small_config(moe=True, microbatches=2), sizes)))
    names = [name for name, s in leaf_names(shapes).items() if s.dtype == np.float32 and s.shape]
    rng = np.random.default_rng(len(sizes))
    good = state_with(shapes, '', None, 0.0)
    with Checkpointer(str(tmp_path), 1, context=ts.Context(UNSYNCED)) as checkpoints:
        checkpoints.save(1, good, finite=True)
        checkpoints.wait()
        refused, saved = 0, 1
        for step, name in enumerate(rng.choice(names, 4), start=2):
            like = leaf_names(good)[name]
            device, value = rng.choice(sorted(like.devices(), key=lambda d: d.id)), np.nan
            (shard,) = (s for s in like.addressable_shards if s.device == device)
            checkpoints.save(step, state_with(shapes, name, device, value), finite=True)
            if shard.replica_id == 0:
                with pytest.raises(CheckpointError, match=f'step {step} could .* {name} holds nan'):
                    checkpoints.wait()
                refused += 1
            else:
                checkpoints.wait()
                saved = step
            assert checkpoints.steps() == [saved]
        for name in names[:: len(names) // 2]:  # the first copy, on whichever device it is
            (first, *_) = (s for s in leaf_names(good)[name].addressable_shards if not s.replica_id)
            checkpoints.save(9, state_with(shapes, name, first.device, -np.inf), finite=True)
            with pytest.raises(CheckpointError, match=f'{name} holds -inf'):
                checkpoints.wait()
        assert checkpoints.latest_step() == saved
        for x in jax.tree.leaves(checkpoints.restore(saved, shapes)):
            assert np.isfinite(x).all()
    if len(sizes) == 1 and sizes[0] == 1:
        assert refused == 4


def test_the_place_of_what_is_not_finite():
    x = np.zeros((2, 3), np.float32)
    check_finite('w', ((4, 6), (0, 3)), x)
    check_finite('n', ((0, 2),), np.array([1, 2]))
    check_finite('none', ((0, 0),), np.zeros(0, np.float32))
    for value in (np.nan, np.inf, -np.inf):
        x[1, 2] = value
        with pytest.raises(NotFiniteError, match=rf'leaf w holds {value} at \[5, 2\]'):
            check_finite('w', ((4, 6), (0, 3)), x)
    half = np.array([1, np.nan], jax.numpy.bfloat16)
    with pytest.raises(NotFiniteError, match=r'holds nan at \[1\]'):
        check_finite('half', ((0, 2),), half)


def test_a_run_whose_weights_overflow_ends_and_keeps_its_checkpoint(tokens, tmp_path, monkeypatch):
    """A norm that is finite lets an update pass that is not."""
    share_programs(monkeypatch)
    config = small_run(tokens, steps=2, checkpoint__every=1, checkpoint__keep=1)
    train.train(config, str(tmp_path / 'run'))
    config = small_run(tokens, steps=4, checkpoint__every=1, checkpoint__keep=1)
    config.optimizer.update(peak_lr=3e38, final_lr=3e38, weight_decay=100.0)
    with pytest.raises(CheckpointError, match=r'step 3 could not be saved.*\n.*safe there: 2\. .*'):
        train.train(config, str(tmp_path / 'run'))
    with Checkpointer(str(tmp_path / 'run' / 'checkpoints')) as checkpoints:
        assert checkpoints.steps() == [2]
