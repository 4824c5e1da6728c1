"""One optimizer step: gradients with and without a pipeline, the update, evaluation, batches.

Without a pipeline the microbatches are a scan of value_and_grad; with one, pipeline/executor.py runs them
through the stages by a schedule. Both return the gradient of the same loss.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from config import ModelConfig, optimizer_config
from layers.attention import positions
from layers.dense import linear_weight_gradient
from layers.moe import update_biases
from model import (
    block_params,
    declared_params,
    first_layers,
    loss,
    model_config,
    run_blocks,
    split_router_loss,
    token_loss,
)
from optimizer import (
    adamw,
    adamw_init,
    clip_by_global_norm,
    init_history,
    judge,
    learning_rate,
    select,
)
from parallel import (
    BATCH,
    PP,
    TP,
    Array,
    P,
    Param,
    Tree,
    free_axes,
    gather_ahead,
    global_sum,
    init_params,
    local_slice,
    map_params,
    psum,
    replicate,
    scatter_gradients,
    specs,
    sum_gradients,
    varying,
)
from pipeline.executor import Functions, Sums, run_pipeline
from pipeline.schedules import Schedule, make_schedule

# Options of the compiler for the train step, by platform; config.compiler_options overrides each
# by name, and the compiler refuses names that it does not know. They let weights be gathered while
# matmuls run. (The collective fusions of v5e would do more, but v4 refuses them.) On TPU (libtpu
# 0.0.52) the pass that moves all-reduces out of loops fails an assertion of its own where gradients
# are accumulated; there is nothing for it to move.
COMPILER_OPTIONS = {
    'tpu': {
        'xla_enable_async_all_gather': True,
        'xla_enable_async_collective_permute': True,
        'xla_disable_hlo_passes': 'while-loop-all-reduce-code-motion',
    },
    'gpu': {'xla_gpu_enable_latency_hiding_scheduler': True},
}


def compiler_options(overrides: str, platform: str) -> dict[str, str | bool]:
    """The table's for this platform, overridden by 'name=value name=value'. A value of true or
    false is handed over as a bool, since the compiler for GPUs refuses the words."""
    options = dict(COMPILER_OPTIONS.get(platform, {}))
    for entry in overrides.split():
        name, value = entry.split('=', 1)
        options[name] = {'true': True, 'false': False}.get(value.lower(), value)
    return options


def state_specs(declared: Tree) -> Tree:
    p = specs(declared)
    numbers = jax.tree.map(lambda _: P(), jax.eval_shape(init_numbers))
    return {'params': p, 'moments': {'m': p, 'v': p}, **numbers}


def init_state(config: ConfigDict, mesh: Mesh) -> Tree:
    """Parameters, moments, the step number and the guards' history, on their devices."""
    params = init_params(jax.random.key(config.seed), declared_params(config), mesh)
    numbers = jax.jit(init_numbers, out_shardings=NamedSharding(mesh, P()))()
    return {'params': params, 'moments': adamw_init(params), **numbers}


def init_numbers() -> Tree:
    """What of the state is alike on all devices."""
    return {'step': jnp.zeros((), jnp.int32), 'history': init_history()}


def abstract_state(config: ConfigDict, mesh: Mesh) -> Tree:
    """Shapes, types and shardings of `init_state`; nothing is computed."""

    def like(p: Param) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=NamedSharding(mesh, p.spec))

    params = map_params(like, declared_params(config))
    sharding = NamedSharding(mesh, P())
    numbers = jax.tree.map(lambda x: x.update(sharding=sharding), jax.eval_shape(init_numbers))
    return {'params': params, 'moments': {'m': params, 'v': params}, **numbers}


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


def accumulated(
    params: Tree, tokens_MBT: Array, key: Array, n_targets: Array, cfg: ModelConfig
) -> tuple[Tree, Array, Tree]:
    """Microbatches one after the other: gradients, added up in float32; this device's share of
    the mean cross-entropy; statistics of the routers, [blocks, ...] a layer of the block."""
    n_microbatches = tokens_MBT.shape[0]

    def loss_share(params: Tree, tokens_BT: Array, i: Array) -> tuple[Array, tuple]:
        total, (nll, router, stats) = loss(params, tokens_BT, cfg, jax.random.fold_in(key, i))
        return total / n_targets + router / n_microbatches, (nll / n_targets, stats)

    def accumulate(carry: tuple[Tree, Array], microbatch: tuple[Array, Array]):
        grads, nll_sum = carry
        (_, (nll, stats)), new = jax.value_and_grad(loss_share, has_aux=True)(params, *microbatch)
        return (jax.tree.map(jnp.add, grads, new), nll_sum + nll), stats

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=jnp.float32), params)
    microbatches = (tokens_MBT, jnp.arange(n_microbatches))
    (grads, nll), stats = lax.scan(accumulate, (zeros, jnp.zeros_like(n_targets)), microbatches)
    return grads, nll, jax.tree.map(lambda x: jnp.sum(x, axis=0), stats)


def pipelined(
    params: Tree,
    tokens_MBT: Array,
    key: Array,
    n_targets: Array,
    cfg: ModelConfig,
    schedule: Schedule,
) -> tuple[Tree, Array, Tree]:
    """`accumulated` where layers are spread over pp, and microbatches follow a schedule."""
    grads, sums = run_stages(params, tokens_MBT, key, n_targets, cfg, schedule)
    stats = sums.stage
    if schedule.chunks == 1:
        grads['blocks'], stats = jax.tree.map(lambda x: x[0], (grads['blocks'], stats))
    return grads, sums.last['nll'], stats


def run_stages(
    params: Tree,
    tokens_MBT: Array,
    key: Array,
    n_targets: Array,
    cfg: ModelConfig,
    schedule: Schedule,
) -> tuple[Tree, Sums]:
    """The model, cut into the functions that pipeline/executor.py runs."""

    def ids(i: Array) -> Array:
        return jnp.maximum(tokens_MBT[i, :, :-1], 0)

    def first(shared: Tree, i: Array) -> Array:
        return first_layers(shared, ids(i), cfg, jax.random.fold_in(key, i))

    def stage(blocks: Tree, x_BTD: Array, virtual: Array, i: Array) -> tuple[Array, Array, Tree]:
        n_layers = jax.tree.leaves(blocks)[0].shape[0] * len(cfg.block)
        start = cfg.first_dense + virtual * n_layers
        x_key = jax.random.fold_in(key, i)
        table = positions(ids(i), cfg)
        x_BTD, stats = run_blocks(blocks, x_BTD, table, x_key, cfg, cfg.block, start)
        router, stats = split_router_loss(stats)
        return x_BTD, jnp.zeros_like(n_targets) + router / schedule.microbatches, stats

    def last(shared: Tree, x_TD: Array, i: Array) -> tuple[Array, Tree]:
        labels_T = local_slice(tokens_MBT[i, :, 1:], TP, 1).reshape(-1)  # B T -> B T/tp
        labels_T = local_slice(labels_T, PP, 0)
        total, nll = token_loss(shared, x_TD, labels_T, cfg)
        return total / n_targets, {'nll': nll / n_targets}

    if schedule.chunks == 1:
        params = params | {'blocks': jax.tree.map(lambda x: x[None], params['blocks'])}
    functions = Functions(first, stage, last, linear_weight_gradient)
    return run_pipeline(schedule, functions, params, block_params(cfg, cfg.block))


def make_gradients(
    config: ConfigDict, platform: str = 'cpu'
) -> Callable[[Tree, Array, Array], tuple[Tree, dict]]:
    """(parameters, tokens_MBT, key) -> gradients and metrics, for use inside shard_map on devices
    of this platform.

    The gradient of the mean loss over all valid targets of the step's global batch; tokens_MBT:
    int32, this device's rows of each microbatch.
    """
    cfg, declared = model_config(config, platform), declared_params(config)
    dtype, ahead = jnp.dtype(cfg.compute_dtype), config.fsdp_gather == 'step'
    compute = accumulated
    if config.mesh.pp > 1:
        compute = functools.partial(pipelined, schedule=train_schedule(config))

    def gradients(params: Tree, tokens_MBT: Array, key: Array) -> tuple[Tree, dict]:
        tokens_MBT = varying(tokens_MBT, (PP, TP))
        params = map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)
        n_targets = psum(jnp.sum(tokens_MBT[..., 1:] >= 0), BATCH).astype(jnp.float32)
        if ahead:
            params['blocks'] = gather_ahead(params['blocks'], declared['blocks'], dtype)
        grads, nll, stats = compute(params, tokens_MBT, key, n_targets, cfg)
        if ahead:
            grads['blocks'] = scatter_gradients(grads['blocks'], declared['blocks'])
        stats = jax.tree.map(lambda x: lax.psum(x, (*BATCH, TP)), stats)
        return sum_gradients(grads, declared), {'loss': global_sum(nll), 'router': stats}

    return gradients


def pipeline_costs(remat: str) -> tuple[float, float, float]:
    """Relative times of F, B and W, for which zero_bubble is laid out. B runs the stage's forward
    again, from its stashed input; with remat='full' it then runs that of each layer once more."""
    return 1.0, 2.0 + (remat == 'full'), 1.0


def train_schedule(config: ConfigDict) -> Schedule:
    p, costs = config.pipeline, pipeline_costs(config.model.remat)
    return make_schedule(p.schedule, config.mesh.pp, config.microbatches, p.chunks, costs)


# ---------------------------------------------------------------------------------------------
# The compiled steps
# ---------------------------------------------------------------------------------------------


def make_train_step(config: ConfigDict, mesh: Mesh) -> Callable[[Tree, Array], tuple[Tree, dict]]:
    """jitted (state, tokens_MBT) -> (state, metrics); the state's buffers are donated.

    A step that the guards skip advances `step` and `history` alone.
    """
    cfg, optimizer = model_config(config), optimizer_config(config)
    platform = mesh.devices.flat[0].platform
    declared, gradients = declared_params(config), make_gradients(config, platform)
    stage_dim = 0 if config.pipeline.chunks == 1 else 1

    def train_step(state: Tree, tokens_MBT: Array) -> tuple[Tree, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state['step'])
        grads, metrics = gradients(state['params'], tokens_MBT, key)
        with jax.named_scope('optimizer'):
            grads, norm = clip_by_global_norm(grads, declared, optimizer.clip_norm)
            params, moments = adamw(
                state['params'], grads, state['moments'], state['step'], declared, optimizer
            )
        params['blocks'] = update_biases(params['blocks'], metrics['router'], cfg.bias_rate)
        apply, history = judge(norm, state['history'], config.guard)
        updated = {'params': params, 'moments': moments}
        updated = select(apply, updated, {name: state[name] for name in updated})
        metrics['router'] = jax.tree.map(lambda x: replicate(x, PP, stage_dim), metrics['router'])
        metrics |= {'grad_norm': norm, 'lr': learning_rate(state['step'], optimizer)}
        metrics |= {'skipped': history['skipped'], 'skips_in_a_row': history['in_a_row']}
        metrics['grad_norm_mean'] = jnp.exp(history['log_norm'])
        return updated | {'step': state['step'] + 1, 'history': history}, metrics

    sharded = jax.shard_map(
        train_step,
        mesh=mesh,
        in_specs=(state_specs(declared), P(None, BATCH)),
        out_specs=(state_specs(declared), P()),
        check_vma=config.check_vma,
    )
    options = compiler_options(config.compiler_options, platform)
    return jax.jit(sharded, donate_argnums=0, compiler_options=options)


def lower_train_step(config: ConfigDict, mesh: Mesh) -> jax.stages.Lowered:
    """The step, lowered for a mesh whose devices need not be there."""
    M, B = config.microbatches, config.batch_size // config.microbatches
    sharding = NamedSharding(mesh, P(None, BATCH))
    tokens = jax.ShapeDtypeStruct((M, B, config.seq_len + 1), jnp.int32, sharding=sharding)
    return make_train_step(config, mesh).lower(abstract_state(config, mesh), tokens)


def make_eval_step(config: ConfigDict, mesh: Mesh) -> Callable[[Tree, Array, Array], dict]:
    """jitted (params, tokens_MBT, token_bytes_V) -> sums of nats, targets and text bytes."""
    platform = mesh.devices.flat[0].platform
    cfg = dataclasses.replace(model_config(config, platform), dropout=0.0)
    declared, chunks = declared_params(config), config.pipeline.chunks

    def nats_share(params: Tree, tokens_MBT: Array) -> Array:
        key, one = jax.random.key(0), jnp.ones_like(tokens_MBT, shape=(), dtype=jnp.float32)
        if config.mesh.pp > 1:
            schedule = make_schedule('forward', config.mesh.pp, config.microbatches, chunks)
            return run_stages(params, tokens_MBT, key, one, cfg, schedule)[1].last['nll']
        return jnp.sum(lax.map(lambda x: loss(params, x, cfg, key)[1][0], tokens_MBT))

    def eval_step(params: Tree, tokens_MBT: Array, token_bytes_V: Array) -> dict[str, Array]:
        tokens_MBT = varying(tokens_MBT, (PP, TP))
        params = map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)
        labels = tokens_MBT[..., 1:]
        n_bytes = jnp.where(labels >= 0, token_bytes_V[jnp.maximum(labels, 0)], 0)
        alike = lax.axis_size((PP, TP))  # devices that hold the same rows
        return {
            'nats': global_sum(nats_share(params, tokens_MBT)),
            'targets': global_sum(jnp.sum(labels >= 0)) // alike,
            'bytes': global_sum(jnp.sum(n_bytes)) // alike,
        }

    sharded = jax.shard_map(
        eval_step,
        mesh=mesh,
        in_specs=(specs(declared), P(None, BATCH), P()),
        out_specs=P(),
        check_vma=config.check_vma,
    )
    return jax.jit(sharded)


def put_batch(
    batch_at: Callable[[int, slice], np.ndarray], i: int, config: ConfigDict, mesh: Mesh
) -> Array:
    """Batch i on the mesh: int32 [microbatches, batch_size / microbatches, seq_len + 1].

    A process reads only the rows of its own devices, and each of them once.
    """
    M, B = config.microbatches, config.batch_size // config.microbatches

    @functools.cache
    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([batch_at(i, slice(m * B + start, m * B + stop)) for m in range(M)])

    sharding = NamedSharding(mesh, P(None, BATCH))
    return jax.make_array_from_callback(
        (M, B, config.seq_len + 1), sharding, lambda index: read(*index[1].indices(B)[:2])
    )
