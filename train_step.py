"""One optimizer step of a training run, read from the top: the step, its gradients, its state.

    s = setup(config, mesh)
    state, step = init_state(s), make_train_step(s)
    state, metrics = step(state, put_batch(batch_at, 0, s))

The step runs inside one shard_map, on each device's own shards. Without a pipeline the microbatches
are a scan of value_and_grad; with one, pipeline/executor.py runs them through the stages by a
schedule. Both compute the gradient of the same loss.
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

from config import ModelConfig, OptimizerConfig
from layers.dense import linear_weight_gradient
from layers.moe import update_biases
from machine.chips import check_matmul_type, chip_of
from model import (
    block_params,
    declared_params,
    first_layers,
    hidden_states,
    input_ids,
    loss,
    model_for,
    position_tables,
    run_blocks,
    split_router_loss,
    token_loss,
    token_scores,
)
from optimizer import (
    AVERAGE,
    OPTIMIZERS,
    average,
    clip_by_global_norm,
    count_updates,
    init_history,
    judge,
    learning_rate,
    optimizer_for,
    select,
    slots_of,
)
from parallel import (
    BATCH,
    PP,
    SEQUENCE,
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
    own_positions,
    psum,
    replicate,
    scatter_gradients,
    shardings,
    specs,
    sum_gradients,
    varying,
)
from pipeline.executor import Functions, Sums, run_pipeline
from pipeline.schedules import make_schedule
from pipeline.tables import Schedule


@dataclasses.dataclass(frozen=True)
class Setup:
    """One config on one mesh, with all that follows from them: made once by `setup`, handed on."""

    config: ConfigDict
    mesh: Mesh
    platform: str  # of the mesh's devices, as jax names it
    model: ModelConfig
    optimizer: OptimizerConfig
    declared: Tree  # every parameter
    slots: dict[str, Tree]  # what the optimizer keeps beside them, declared
    schedule: Schedule | None  # of the pipeline; None without one


def setup(config: ConfigDict, mesh: Mesh, end_of_text: int = -1) -> Setup:
    """Derives all that a step needs from a config that `config_checks.validate` accepts.

    `end_of_text`, the token that ends a document of the data, counts with data.isolate_documents.
    """
    platform = mesh.devices.flat[0].platform
    check_matmul_type(config, chip_of(mesh.devices.flat[0].device_kind))
    model = model_for(config, platform, end_of_text)
    declared, optimizer = declared_params(config), optimizer_for(config, platform)
    slots = slots_of(declared, optimizer)
    schedule = train_schedule(config) if config.mesh.pp > 1 else None
    return Setup(config, mesh, platform, model, optimizer, declared, slots, schedule)


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


def train_step(state: Tree, tokens_MBT: Array, s: Setup) -> tuple[Tree, dict[str, Array]]:
    """Makes one update on one device of the mesh: gradients, clipping, optimizer, expert biases.

    tokens_MBT: int32 [M, B, T + 1], this device's rows of each microbatch. Returns the new state,
    and metrics that all devices hold alike. A step that `judge` skips advances `step` and
    `history` alone.
    """
    key = jax.random.fold_in(jax.random.key(s.config.seed), state['step'])
    lr = learning_rate(state['step'], s.optimizer)
    updates = count_updates(state['step'], state['history'])
    slots = dict(state['moments'])
    mean = slots.pop(AVERAGE, None)
    before = state['params'], slots
    grads, metrics = gradients(state['params'], tokens_MBT, key, s)
    with jax.named_scope('optimizer'):
        grads, norm = clip_by_global_norm(grads, s.declared, s.optimizer.clip_norm)
        params, slots = OPTIMIZERS[s.optimizer.name].update(
            state['params'], grads, slots, lr, updates, s.declared, s.optimizer
        )
    params['blocks'] = update_biases(params['blocks'], metrics['router'], s.model.bias_rate)
    apply, history = judge(norm, state['history'], s.config.guard)
    params, slots = select(apply, (params, slots), before)
    if s.optimizer.ema:
        new = average(mean, params, updates, s.optimizer.ema)
        # Before the first update it is the parameters.
        slots = slots | {AVERAGE: select(apply | (updates == 0), new, mean)}
    metrics |= {
        'router': whole_router_statistics(metrics['router'], s),
        'grad_norm': norm,
        'grad_norm_mean': jnp.exp(history['log_norm']),
        'lr': lr,
        'skipped': history['skipped'],
        'skips_in_a_row': history['in_a_row'],
    }
    numbers = {'step': state['step'] + 1, 'history': history}
    return {'params': params, 'moments': slots, **numbers}, metrics


def whole_router_statistics(stats: Tree, s: Setup) -> Tree:
    """Brings the statistics of all stages' layers to all devices: [(chunks,) blocks, ...]."""
    stage_dim = 0 if s.config.pipeline.chunks == 1 else 1
    return jax.tree.map(lambda x: replicate(x, PP, stage_dim), stats)


def make_train_step(s: Setup) -> Callable[[Tree, Array], tuple[Tree, dict]]:
    """Returns the jitted step, (state, tokens_MBT) -> (state, metrics); the state is donated."""
    sharded = jax.shard_map(
        functools.partial(train_step, s=s),
        mesh=s.mesh,
        in_specs=(state_specs(s), P(None, BATCH)),
        out_specs=(state_specs(s), P()),
        check_vma=s.config.check_vma,
    )
    options = compiler_options(s.config.compiler_options, s.platform)
    return jax.jit(sharded, donate_argnums=0, compiler_options=options)


def lower_train_step(s: Setup) -> jax.stages.Lowered:
    """Lowers the step, for a mesh whose devices need not be there."""
    M, B = s.config.microbatches, s.config.batch_size // s.config.microbatches
    sharding = NamedSharding(s.mesh, P(None, BATCH))
    tokens = jax.ShapeDtypeStruct((M, B, s.config.seq_len + 1), jnp.int32, sharding=sharding)
    return make_train_step(s).lower(abstract_state(s), tokens)


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


def gradients(params: Tree, tokens_MBT: Array, key: Array, s: Setup) -> tuple[Tree, dict]:
    """Computes the gradient of the mean loss over all valid targets of the step's global batch.

    Returns gradients, float32, summed over the axes that do not shard their parameter, and metrics:
    the loss, and the routers' statistics of this stage's layers. Runs inside shard_map.
    """
    blocks, ahead = s.declared['blocks'], s.config.fsdp_gather == 'step'
    compute = accumulated
    if s.schedule is not None:
        compute = functools.partial(pipelined, schedule=s.schedule)
    tokens_MBT = varying(tokens_MBT, (PP, *SEQUENCE))
    params = varying_params(params, s.declared)
    n_targets = psum(jnp.sum(tokens_MBT[..., 1:] >= 0), BATCH).astype(jnp.float32)
    if ahead:
        dtype = jnp.dtype(s.model.compute_dtype)
        params = params | {'blocks': gather_ahead(params['blocks'], blocks, dtype)}
    grads, nll, stats = compute(params, tokens_MBT, key, n_targets, s.model)
    if ahead:
        grads = grads | {'blocks': scatter_gradients(grads['blocks'], blocks, s.model.fsdp_reduce)}
    router = jax.tree.map(lambda x: lax.psum(x, (*BATCH, *SEQUENCE)), stats)
    return sum_gradients(grads, s.declared), {'loss': global_sum(nll), 'router': router}


def varying_params(params: Tree, declared: Tree) -> Tree:
    """Lets parameters count as different on all devices, as all values do inside the step."""
    return map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)


def accumulated(
    params: Tree, tokens_MBT: Array, key: Array, n_targets: Array, cfg: ModelConfig
) -> tuple[Tree, Array, Tree]:
    """Computes microbatches one after the other.

    Returns gradients, added up in float32; this device's share of the mean cross-entropy; and
    statistics of the routers, [blocks, ...] per layer of the block.
    """
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
    """Computes the results of `accumulated` by a schedule, where layers are spread over pp."""
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
    head: Callable[[Tree, Array, Array, Array], tuple[Array, Tree]] | None = None,
) -> tuple[Tree, Sums]:
    """Cuts the model into the functions of a stage, and runs them by the schedule.

    `head` takes the last layer's output, labels and number of a microbatch in place of the loss.
    """

    def ids(i: Array) -> Array:
        return input_ids(tokens_MBT[i])

    def first(shared: Tree, i: Array) -> Array:
        return first_layers(shared, ids(i), cfg, jax.random.fold_in(key, i))

    def stage(blocks: Tree, x_BtD: Array, virtual: Array, i: Array) -> tuple[Array, Array, Tree]:
        n_layers = jax.tree.leaves(blocks)[0].shape[0] * len(cfg.block)
        start = cfg.first_dense + virtual * n_layers
        x_key = jax.random.fold_in(key, i)
        tables = position_tables(ids(i), cfg)
        x_BtD, stats = run_blocks(blocks, x_BtD, tables, x_key, cfg, cfg.block, start)
        router, stats = split_router_loss(stats)
        return x_BtD, jnp.zeros_like(n_targets) + router / schedule.microbatches, stats

    def loss_head(shared: Tree, x_tD: Array, labels_t: Array, _: Array) -> tuple[Array, Tree]:
        total, nll = token_loss(shared, x_tD, labels_t, cfg)
        return total / n_targets, {'nll': nll / n_targets}

    def last(shared: Tree, x_tD: Array, i: Array) -> tuple[Array, Tree]:
        labels_t = own_positions(tokens_MBT[i, :, 1:], 1).reshape(-1)
        return (head or loss_head)(shared, x_tD, local_slice(labels_t, PP, 0), i)

    if schedule.chunks == 1:
        params = params | {'blocks': jax.tree.map(lambda x: x[None], params['blocks'])}
    weight_gradient = functools.partial(linear_weight_gradient, cfg=cfg)
    functions = Functions(first, stage, last, weight_gradient)
    return run_pipeline(schedule, functions, params, block_params(cfg, cfg.block))


def pipeline_costs(remat: str) -> tuple[float, float, float]:
    """Returns the relative times of F, B and W, for which zero_bubble is laid out.

    B runs the stage's forward again, from its stashed input; with remat='full' it then runs that of
    each layer once more.
    """
    return 1.0, 2.0 + (remat == 'full'), 1.0


def train_schedule(config: ConfigDict) -> Schedule:
    """Returns the pipeline schedule of a config."""
    p, costs = config.pipeline, pipeline_costs(config.model.remat)
    return make_schedule(p.schedule, config.mesh.pp, config.microbatches, p.chunks, costs, p.clock)


# ---------------------------------------------------------------------------------------------
# The state
# ---------------------------------------------------------------------------------------------


def init_state(s: Setup) -> Tree:
    """Makes parameters, optimizer slots, the step number and the history, on their devices."""
    params = init_params(jax.random.key(s.config.seed), s.declared, s.mesh)
    slots = init_slots(s)
    numbers = jax.jit(init_numbers, out_shardings=NamedSharding(s.mesh, P()))()
    return {'params': params, 'moments': slots, **numbers}  # slots by the name in checkpoints


def init_slots(s: Setup) -> dict[str, Tree]:
    """Makes the optimizer's slots, each as its declaration says."""

    def init() -> dict[str, Tree]:
        key = jax.random.key(s.config.seed)
        return map_params(lambda p: p.init(key, p.shape), s.slots)

    return jax.jit(init, out_shardings=shardings(s.slots, s.mesh))()


def init_numbers() -> Tree:
    """Makes the part of the state that is alike on all devices."""
    return {'step': jnp.zeros((), jnp.int32), 'history': init_history()}


def state_specs(s: Setup) -> Tree:
    """Returns the PartitionSpecs of the state."""
    numbers = jax.tree.map(lambda _: P(), jax.eval_shape(init_numbers))
    return {'params': specs(s.declared), 'moments': specs(s.slots), **numbers}


def abstract_state(s: Setup) -> Tree:
    """Returns shapes, types and shardings of `init_state`; nothing is computed."""

    def like(p: Param) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=NamedSharding(s.mesh, p.spec))

    sharding = NamedSharding(s.mesh, P())
    numbers = jax.tree.map(lambda x: x.update(sharding=sharding), jax.eval_shape(init_numbers))
    return {
        'params': map_params(like, s.declared),
        'moments': map_params(like, s.slots),
        **numbers,
    }


# ---------------------------------------------------------------------------------------------
# Options of the compiler, evaluation, batches
# ---------------------------------------------------------------------------------------------

# By platform; config.compiler_options overrides each by name, and the compiler refuses names that
# it does not know. They let weights be gathered while matmuls run. (The collective fusions of v5e
# would do more, but v4 refuses them.) On TPU (libtpu 0.0.52) the pass that moves all-reduces out of
# loops fails an assertion of its own where gradients are accumulated; there is nothing for it to
# move.
COMPILER_OPTIONS = {
    'tpu': {
        'xla_enable_async_all_gather': True,
        'xla_enable_async_collective_permute': True,
        'xla_tpu_enable_async_all_to_all': True,
        'xla_disable_hlo_passes': 'while-loop-all-reduce-code-motion',
    },
    'gpu': {'xla_gpu_enable_latency_hiding_scheduler': True},
}


def compiler_options(overrides: str, platform: str) -> dict[str, str | bool]:
    """Returns the table's options for this platform, overridden by 'name=value name=value'.

    A value of true or false is handed over as a bool, since the compiler for GPUs refuses the
    words.
    """
    options = dict(COMPILER_OPTIONS.get(platform, {}))
    for entry in overrides.split():
        name, value = entry.split('=', 1)
        options[name] = {'true': True, 'false': False}.get(value.lower(), value)
    return options


def make_eval_step(s: Setup) -> Callable[[Tree, Array, Array], dict[str, Array]]:
    """Returns the jitted (params, tokens_MBT, token_bytes_V) -> sums of nats, targets and bytes."""
    sharded = jax.shard_map(
        functools.partial(eval_step, s=s),
        mesh=s.mesh,
        in_specs=(specs(s.declared), P(None, BATCH), P()),
        out_specs=P(),
        check_vma=s.config.check_vma,
    )
    return jax.jit(sharded)


def eval_step(params: Tree, tokens_MBT: Array, token_bytes_V: Array, s: Setup) -> dict[str, Array]:
    """Sums nats, targets and bytes of text over a batch, on one device of the mesh."""
    tokens_MBT = varying(tokens_MBT, (PP, *SEQUENCE))
    params = varying_params(params, s.declared)
    labels = tokens_MBT[..., 1:]
    n_bytes = jnp.where(labels >= 0, token_bytes_V[jnp.maximum(labels, 0)], 0)
    alike = lax.axis_size((PP, *SEQUENCE))  # devices that hold the same rows
    return {
        'nats': global_sum(nats_share(params, tokens_MBT, s)),
        'targets': global_sum(jnp.sum(labels >= 0)) // alike,
        'bytes': global_sum(jnp.sum(n_bytes)) // alike,
    }


def nats_share(params: Tree, tokens_MBT: Array, s: Setup) -> Array:
    """Returns this device's share of the summed cross-entropy of a batch, without dropout."""
    cfg = dataclasses.replace(s.model, dropout=0.0, padded=False)
    key, one = jax.random.key(0), jnp.ones_like(tokens_MBT, shape=(), dtype=jnp.float32)
    if s.schedule is not None:
        return run_stages(params, tokens_MBT, key, one, cfg, forward_schedule(s))[1].last['nll']
    return jnp.sum(lax.map(lambda x: loss(params, x, cfg, key)[1][0], tokens_MBT))


def forward_schedule(s: Setup) -> Schedule:
    """Returns the schedule that runs the stages of the pipeline forward alone."""
    p = s.schedule
    return make_schedule('forward', p.stages, p.microbatches, p.chunks)


def make_score_step(s: Setup) -> Callable[[Tree, Array], dict[str, Array]]:
    """Returns the jitted (params, tokens_MBT) -> 'nats', -log p of each row's targets, float32
    [M, B], and 'missed', how many of them greedy decoding would not choose, int32 [M, B]; both are
    alike on all devices. Tokens that are no targets are given as `model.input_ids` takes them.
    """
    sharded = jax.shard_map(
        functools.partial(score_step, s=s),
        mesh=s.mesh,
        in_specs=(specs(s.declared), P(None, BATCH)),
        out_specs=P(),
        check_vma=s.config.check_vma,
    )
    return jax.jit(sharded)


def score_step(params: Tree, tokens_MBT: Array, s: Setup) -> dict[str, Array]:
    """Scores the rows of a batch, on one device of the mesh: see `make_score_step`.

    A row's scores depend neither on the other rows, nor on the mesh, nor on what fills it up:
    experts take all choices, since a capacity is a share of a whole sequence.
    """
    no_limits = {'capacity_factor': 0.0, 'buffer_factor': 0.0}
    cfg = dataclasses.replace(s.model, dropout=0.0, padded=False, **no_limits)
    tokens_MBT = varying(tokens_MBT, (PP, *SEQUENCE))
    params = varying_params(params, s.declared)
    shares = row_scores(params, tokens_MBT, cfg, s)
    whole = jax.tree.map(lambda x: lax.psum(x, (PP, *SEQUENCE)), shares)
    return jax.tree.map(lambda x: replicate(x, BATCH, 1), whole)


def row_scores(params: Tree, tokens_MBT: Array, cfg: ModelConfig, s: Setup) -> Tree:
    """Returns this device's shares of both scores of its rows, [M, B] each."""
    M, B, T = tokens_MBT.shape[0], tokens_MBT.shape[1], tokens_MBT.shape[2] - 1
    key, one = jax.random.key(0), jnp.ones_like(tokens_MBT, shape=(), dtype=jnp.float32)
    rows_t = own_positions(jnp.broadcast_to(jnp.arange(B)[:, None], (B, T)), 1).reshape(-1)

    def by_row(shared: Tree, x_tD: Array, labels_t: Array, rows_t: Array) -> Tree:
        nats_t, missed_t = token_scores(shared, x_tD, labels_t, cfg)
        add = functools.partial(jax.ops.segment_sum, segment_ids=rows_t, num_segments=B)
        return {'nats': add(nats_t), 'missed': add(missed_t.astype(jnp.int32))}

    def head(shared: Tree, x_tD: Array, labels_t: Array, i: Array) -> tuple[Array, Tree]:
        found = by_row(shared, x_tD, labels_t, local_slice(rows_t, PP, 0))
        zeros = functools.partial(jnp.zeros_like, shape=(M, B))
        return 0 * one, jax.tree.map(lambda x: zeros(x).at[i].set(x), found)

    def microbatch(tokens_BT: Array) -> Tree:
        x_BtD, _ = hidden_states(params, input_ids(tokens_BT), cfg, key)
        labels_t = own_positions(tokens_BT[:, 1:], 1).reshape(-1)
        return by_row(params, x_BtD.reshape(-1, cfg.d_model), labels_t, rows_t)

    if s.schedule is None:
        return lax.map(microbatch, tokens_MBT)
    return run_stages(params, tokens_MBT, key, one, cfg, forward_schedule(s), head)[1].last


def put_batch(batch_at: Callable[[int, slice], np.ndarray], i: int, s: Setup) -> Array:
    """Puts batch i on the mesh: int32 [microbatches, batch_size / microbatches, seq_len + 1].

    A process reads only the rows of its own devices, and each of them once.
    """
    M, B = s.config.microbatches, s.config.batch_size // s.config.microbatches

    @functools.cache
    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([batch_at(i, slice(m * B + start, m * B + stop)) for m in range(M)])

    sharding = NamedSharding(s.mesh, P(None, BATCH))
    return jax.make_array_from_callback(
        (M, B, s.config.seq_len + 1), sharding, lambda index: read(*index[1].indices(B)[:2])
    )
