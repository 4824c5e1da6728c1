"""States on meshes, and comparisons of trees, that the tests of checkpoints share."""

import jax
import jax.numpy as jnp
import numpy as np
from common import set_up, small_config
from ml_collections import ConfigDict

from parallel import Tree
from runtime.config_checks import validate
from train_step import abstract_state


def bits(x: object) -> tuple:
    """Returns shape, type and bytes: alike for NaN and -0.0, too, only if every bit is."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(x.dtype), *bits(jax.random.key_data(x))
    x = np.asarray(x)
    return x.shape, x.dtype, x.tobytes()


def assert_same(a: Tree, b: Tree) -> None:
    """Compares two trees bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        assert bits(x) == bits(y), jax.tree_util.keystr(path)


def assert_placed(tree: Tree, target: Tree) -> None:
    """Checks that the leaves lie on devices as the target's shardings say."""
    for x, want in zip(jax.tree.leaves(tree), jax.tree.leaves(target), strict=True):
        assert x.sharding.is_equivalent_to(want.sharding, x.ndim)


def config_on(mesh: dict[str, int], chunks: int = 1) -> ConfigDict:
    """Returns the config of four blocks of a dense and an MoE layer, after a dense one."""
    config = small_config(moe=True)
    config.model.n_layers, config.microbatches = 9, 2
    config.mesh.update(mesh)
    config.pipeline.chunks = chunks
    if chunks > 1:
        config.pipeline.schedule = 'interleaved'
    validate(config, 8)
    return config


def shapes_on(config: ConfigDict) -> Tree:
    """Returns the shapes and shardings of the train state on the config's mesh."""
    return abstract_state(set_up(config))


def state_on(config: ConfigDict) -> Tree:
    """Returns a train state on the config's mesh, each leaf with values of its own."""
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.normal(scale=100, size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(fill, shapes_on(config))
