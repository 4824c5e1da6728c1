"""Small configs, shared initial values, and comparisons for the tests of models and steps."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import train_step
from config import ModelConfig
from configs import default
from model import model_for, model_params
from parallel import (
    AXES,
    P,
    Param,
    Tree,
    global_sum,
    init_params,
    make_mesh,
    map_params,
    shardings,
    varying,
)
from train_step import Setup, setup

TOLERANCE = 2e-5  # of a leaf's norm, in float32


def small_config(
    attention: str = 'mla', tied: bool = True, microbatches: int = 1, moe: bool = False
) -> ConfigDict:
    c = default.get_config()
    c.batch_size, c.seq_len, c.steps, c.microbatches = 16, 16, 10, microbatches
    c.data.path = 'none'
    c.model.update(
        vocab_size=64, d_model=32, n_layers=4, block=('dense', 'dense'), d_ff=48,
        attention=attention, n_heads=8, n_kv_heads=8, head_dim=8, qk_norm=True, q_rank=16,
        kv_rank=16, nope_dim=4, rope_dim=4, v_dim=8, attention_block=8, tie_embeddings=tied,
        loss_chunk=16, z_loss=1e-2,
    )  # fmt: skip
    if moe:
        c.model.update(
            n_layers=5, first_dense=1, block=('dense', 'moe'), n_experts=8, experts_per_token=3,
            d_expert=16, n_expert_groups=4, n_top_groups=3, bias_rate=0.02, balance_loss=0.1,
            router_z_loss=0.01, routed_scale=1.5,
        )  # fmt: skip
    c.optimizer.update(warmup_steps=2, clip_norm=0.1, peak_lr=1e-3)
    return c


# Models of layers of several kinds: `small_config` with these fields.
KINDS: dict[str, dict[str, Any]] = {
    'gqa': {  # everything that it can have, with the norms behind
        'block': ('gqa_window_nope+dense', 'gqa_window+dense'), 'window': 5, 'rotary_dim': 4,
        'n_kv_heads': 4, 'qk_norm_over': 'heads', 'attention_bias': 'qkvo', 'norms': 'after',
        'attention_sinks': True, 'attention_gate': True,
    },
    'mla': {
        'block': ('mla_window+dense', 'mla_nope+dense'), 'window': 5, 'attention_sinks': True,
        'attention_gate': True,
    },
    'both': {  # both kinds of attention, with one head of keys and values for gqa
        'block': ('mla_nope+dense', 'gqa_window+dense'), 'window': 7, 'n_kv_heads': 1,
        'attention_sinks': True,
    },
    # both linear kinds and one that compares keys; at the start of a document the output of a head
    # may be next to nothing, which a norm with a smaller eps scales up with its rounding
    'delta': {
        'block': ('kda+dense', 'gdn+dense', 'mla_nope+dense'), 'delta_heads': 8,
        'delta_key_heads': 4, 'delta_key_dim': 4, 'delta_value_dim': 8, 'norm_eps': 0.01,
    },
}  # fmt: skip


def kinds_config(name: str, microbatches: int = 1, moe: bool = False) -> ConfigDict:
    """Returns a small config of layers of several kinds; `moe` gives the last of a block experts,
    and a layer comes before the blocks."""
    config = small_config(microbatches=microbatches, moe=moe)
    config.model.update(KINDS[name])
    if moe:
        *others, last = config.model.block
        config.model.block = (*others, last.replace('+dense', '+moe'))
        config.model.n_layers = 1 + 2 * len(config.model.block)
    else:
        config.model.n_layers = len(config.model.block)
    return config


def on_mesh(config: ConfigDict, sizes: tuple[int, ...]) -> ConfigDict:
    """Returns the config on a mesh of (dp, fsdp, tp), ep, pp and cp if given."""
    config = config.copy_and_resolve_references()
    config.mesh.update(dict(zip(('dp', 'fsdp', 'tp', 'ep', 'pp', 'cp'), sizes, strict=False)))
    return config


def set_up(config: ConfigDict) -> Setup:
    """Returns the setup of a config on as many simulated devices as its mesh takes."""
    return setup(config, make_mesh(config.mesh))


def cpu_model(config: ConfigDict) -> ModelConfig:
    """Returns the model with the kernels that run on CPU."""
    return model_for(config, 'cpu')


# ---------------------------------------------------------------------------------------------
# Initial values, whose program takes seconds to compile: once for all meshes, since the values are
# the same on each, as tests/test_model.py shows
# ---------------------------------------------------------------------------------------------

# Fields that the values do not depend on.
ANY = {
    'remat': 'none', 'remat_keep': (), 'compute_dtype': 'float32', 'dropout': 0.0,
    'capacity_factor': 0.0, 'attention_kernel': 'blockwise', 'expert_kernel': 'blocks',
    'document_end': -1, 'cp': 1, 'cp_style': 'ring', 'ragged': False, 'window': 0, 'rotary_dim': 0,
    'norms': 'before', 'padded': False,
}  # fmt: skip


@functools.cache
def _initial_values(cfg: ModelConfig, seed: int, chunks: int) -> Tree:
    declared = model_params(cfg, chunks)
    values = jax.device_get(init_params(jax.random.key(seed), declared, make_mesh({})))
    return jax.tree_util.tree_map_with_path(_told_apart, values)


def _told_apart(path: tuple, x: np.ndarray) -> np.ndarray:
    """Draws sinks and biases of attention, which all start as zeros: so their order shows."""
    if path[-1].key not in ('sinks', 'b_q', 'b_k', 'b_v', 'b_o'):
        return x
    rng = np.random.default_rng(zlib.crc32(path[-1].key.encode()))
    return 0.3 * rng.standard_normal(x.shape).astype(x.dtype)


def initial_params(cfg: ModelConfig, mesh: Mesh, seed: int = 0, chunks: int = 1) -> Tree:
    """Returns the parameters that `init_params` makes, but for zeros: `_told_apart`."""
    values = _initial_values(dataclasses.replace(cfg, **ANY), seed, chunks)
    return jax.tree.map(jax.device_put, values, shardings(model_params(cfg, chunks), mesh))


def initial_state(s: Setup) -> Tree:
    """Returns the state that `train_step.init_state` makes."""
    params = initial_params(s.model, s.mesh, s.config.seed, s.config.pipeline.chunks)

    def zeros(p: Param) -> jax.Array:
        sharding = NamedSharding(s.mesh, p.spec)
        return jax.device_put(np.zeros(p.shape, np.float32), sharding)

    moments = map_params(zeros, s.slots)
    numbers = jax.device_put(train_step.init_numbers(), NamedSharding(s.mesh, P()))
    return {'params': params, 'moments': moments, **numbers}


# ---------------------------------------------------------------------------------------------
# Batches and comparisons
# ---------------------------------------------------------------------------------------------


def batch_at(step: int, rows: slice, seq_len: int = 16) -> np.ndarray:
    """Draws random tokens, with some targets left out, and not as many in each row."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 64, (16, seq_len + 1))
    tokens[np.arange(seq_len + 1) > seq_len // 2 + np.arange(16)[:, None]] = -1
    return tokens.astype(np.int32)[rows]


def assert_trees_close(got: Tree, want: Tree, tolerance: float) -> None:
    """Compares each leaf by the relative error of its norm."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)
        assert error < tolerance, f'{jax.tree_util.keystr(path)}: relative error {error:.2e}'


def assert_replicas_identical(tree: Tree) -> None:
    """Compares the copies of each shard, bit by bit."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        first: dict[str, np.ndarray] = {}
        for shard in x.addressable_shards:
            data = np.asarray(shard.data)
            same = first.setdefault(str(shard.index), data)
            assert np.array_equal(same, data), f'{jax.tree_util.keystr(path)} differs'


def on_one_device(f: Callable) -> Callable[..., Any]:
    """Returns f on a mesh of one device; arguments and results vary as within the model."""

    def body(*args: Any) -> Any:
        args = jax.tree.map(lambda x: varying(x, AXES), args)
        return jax.tree.map(global_sum, f(*args))

    return jax.jit(jax.shard_map(body, mesh=make_mesh({}), in_specs=P(), out_specs=P()))
