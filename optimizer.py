"""The update: clipping by the global norm, optimizers, the learning rate, and steps to skip.

Pure functions on sharded trees. Parameters (the float32 master copy) and slots are sharded alike.
All is elementwise on the shards that a device holds, but for the one number that clipping needs,
and for Muon, which brings whole matrices together: each to one device, its home.

To add an optimizer, write its functions and add a line to OPTIMIZERS.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from config import MuonConfig, OptimizerConfig, optimizer_config
from parallel import (
    AXES,
    Array,
    Param,
    Tree,
    all_to_all,
    global_sum_of_squares,
    is_param,
    local_slice,
    map_params,
    merged,
    part,
    replicate,
    spec_axes,
    zeros,
)


class Optimizer(NamedTuple):
    """One optimizer.

    slots(declared) declares the arrays that it keeps beside the parameters, {name: tree of Param}:
    layout, checkpoints and plans follow from that. A slot starts as its `Param.init` says.
    update(params, grads, slots, lr, updates, declared, cfg) returns the new parameters and slots,
    all float32; lr is the rate of this step, updates the number of those before it, which does not
    count steps that were skipped. rules(config) yields what cannot run.
    """

    slots: Callable[[Tree], dict[str, Tree]]
    update: Callable[[Tree, Tree, Tree, Array, Array, Tree, OptimizerConfig], tuple[Tree, Tree]]
    rules: Callable[[ConfigDict], Iterator[str]]


def zeros_like(declared: Tree) -> Tree:
    """Declares a slot of each parameter's shape and layout that starts at zero."""
    return map_params(lambda p: dataclasses.replace(p, init=zeros), declared)


def optimizer_for(config: ConfigDict, platform: str) -> OptimizerConfig:
    """Returns the optimizer's part of a config for devices of this jax platform: Newton-Schulz
    runs in float32 on CPU, which computes bfloat16 no faster, else in bfloat16."""
    cfg = optimizer_config(config)
    if cfg.muon.dtype != 'auto':
        return cfg
    dtype = 'float32' if platform == 'cpu' else 'bfloat16'
    return dataclasses.replace(cfg, muon=dataclasses.replace(cfg.muon, dtype=dtype))


# ---------------------------------------------------------------------------------------------
# Learning rate and clipping
# ---------------------------------------------------------------------------------------------


def learning_rate(step: Array, cfg: OptimizerConfig) -> Array:
    """Returns the rate of step number `step` (from 0, with skipped ones): float32 scalar.

    Linear warmup to peak_lr, then 'cosine': half a cosine to final_lr at the last step
    (Loshchilov & Hutter 2017); 'wsd': constant, then linear to final_lr over the last decay_steps,
    or over all after warmup if they are fewer (warmup-stable-decay, Hu et al. 2024).
    """
    step = step.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(cfg.warmup_steps, 1))
    span = max(cfg.steps - 1 - cfg.warmup_steps, 1)
    if cfg.lr_schedule == 'cosine':
        done = jnp.clip((step - cfg.warmup_steps) / span, 0, 1)
        share = 0.5 * (1 + jnp.cos(math.pi * done))
    else:
        decay = max(min(cfg.decay_steps, span), 1)
        share = jnp.clip((cfg.steps - 1 - step) / decay, 0, 1)
    return warmup * (cfg.final_lr + (cfg.peak_lr - cfg.final_lr) * share)


def clip_by_global_norm(grads: Tree, declared: Tree, max_norm: float) -> tuple[Tree, Array]:
    """Scales the gradient of the whole model to at most max_norm (0: as it is).

    Also returns its norm before. Moves one float32 number per device (`global_sum_of_squares`).
    """
    norm = jnp.sqrt(global_sum_of_squares(grads, declared))
    if max_norm == 0:
        return grads, norm
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda g: g * scale, grads), norm


# ---------------------------------------------------------------------------------------------
# AdamW
# ---------------------------------------------------------------------------------------------


def adamw_slots(declared: Tree) -> dict[str, Tree]:
    """Declares both moments."""
    return {'m': zeros_like(declared), 'v': zeros_like(declared)}


def adamw(
    params: Tree,
    grads: Tree,
    slots: Tree,
    lr: Array,
    updates: Array,
    declared: Tree,
    cfg: OptimizerConfig,
) -> tuple[Tree, Tree]:
    """Makes one update of AdamW.

    Decay is decoupled (Loshchilov & Hutter 2019) and for matrices only: gains stay free. The bias
    correction counts updates, as the moments hold no more gradients than that.
    """
    t = (updates + 1).astype(jnp.float32)
    m_scale, v_scale = 1 / (1 - cfg.b1**t), 1 / (1 - cfg.b2**t)
    m = mixed(slots['m'], grads, cfg.b1)
    v = jax.tree.map(lambda v, g: cfg.b2 * v + (1 - cfg.b2) * g * g, slots['v'], grads)

    def update(p: Param, x: Array, m: Array, v: Array) -> Array:
        return moved(p, x, m * m_scale / (jnp.sqrt(v * v_scale) + cfg.eps), lr, cfg)

    return map_params(update, declared, params, m, v), {'m': m, 'v': v}


def mixed(mean: Tree, new: Tree, share: float) -> Tree:
    """Returns a running mean that keeps this share of itself, elementwise."""
    return jax.tree.map(lambda m, x: share * m + (1 - share) * x, mean, new)


def moved(p: Param, x: Array, direction: Array, lr: Array, cfg: OptimizerConfig) -> Array:
    """Returns the parameter after a step against `direction`, with the decay of a matrix.

    With `cautious_decay` a number decays only where the step goes the same way: where direction and
    number agree in sign (Chen et al. 2025, "Cautious Weight Decay", arXiv:2510.12402, algorithm 1).
    """
    if not p.trainable:
        return x
    decay = cfg.weight_decay if p.matrix else 0.0
    if cfg.cautious_decay:
        decay = jnp.where(direction * x >= 0, decay, 0.0)
    return x - lr * (direction + decay * x)


def adamw_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for constants out of range."""
    for name in ('b1', 'b2'):
        if config.optimizer[name] >= 1:
            yield (f'optimizer.{name}={config.optimizer[name]} never forgets; use a value below 1')


# ---------------------------------------------------------------------------------------------
# Muon
# ---------------------------------------------------------------------------------------------

# Coefficients (a, b, c) of the steps of Newton-Schulz, x -> a x + (b s + c s²) x with s = x xᵀ; the
# last serves all further steps. 'jordan' (Jordan et al. 2024, github.com/KellerJordan/Muon): steep
# at zero, leaves singular values between 0.7 and 1.2. 'polar_express' (Amsel et al. 2025,
# arXiv:2505.16932, algorithm 1): the best polynomial for each step, nearer to 1. All but the last
# take a hundredth off their input, the first one two (that of the norm too), so that rounding does
# not throw a singular value out of range.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    'jordan': ((3.4445, -4.7750, 2.0315),),
    'polar_express': (
        *(
            (a / safe, b / safe**3, c / safe**5)
            for a, b, c, safe in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933, 1.01**2),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601, 1.01),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137, 1.01),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372, 1.01),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673, 1.01),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835, 1.01),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248, 1.01),
            )
        ),
        (1.875, -1.25, 0.375),
    ),
}

# Factors on the orthogonal matrix, from the sizes of its input and output. 'spectral': the update
# changes outputs alike whatever the shape (Jordan et al. 2024; Bernstein 2025); 'rms': its numbers
# are as large as AdamW's usually are, so AdamW's rates serve (Liu et al. 2025, arXiv:2502.16982).
SCALES: dict[str, Callable[[int, int], float]] = {
    'spectral': lambda inputs, outputs: math.sqrt(max(1, outputs / inputs)),
    'rms': lambda inputs, outputs: 0.2 * math.sqrt(max(inputs, outputs)),
}

SMALLEST_NORM = 1e-7  # by which a matrix is divided; the 1e-7 of torch.optim.Muon


class Matrices(NamedTuple):
    """Matrices of one shape and layout: what travels, and is computed, together.

    rows <= columns: a parameter whose matrices are taller is turned, which Newton-Schulz allows.
    """

    rows: int
    columns: int
    row_axis: str | None  # the mesh axis that shards the rows
    column_axis: str | None
    front: tuple[str, ...]  # axes that shard the dimensions that count matrices: pp, ep, tp

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes whose devices hold parts of one matrix."""
        return tuple(axis for axis in (self.row_axis, self.column_axis) if axis)

    @property
    def replicas(self) -> tuple[str, ...]:
        """The axes whose devices hold the same parts."""
        return tuple(axis for axis in AXES if axis not in (*self.axes, *self.front))


class View(NamedTuple):
    """Tells where the matrices of one parameter lie in it."""

    group: Matrices
    inputs: int  # numbers that one of its matrices takes ...
    outputs: int  # ... and gives
    heads: int | None  # the dimension that goes to the front, as each head is a matrix
    front: int  # dimensions that count matrices, once it is there
    split: int  # the first dimension of the outputs, then
    turned: bool  # whether the group's rows are the outputs


def is_muons(p: Param) -> bool:
    """Returns True for what Muon updates: the matrices inside layers."""
    return p.inputs > 0


def is_adamws(p: Param) -> bool:
    """Returns True for what AdamW updates beside it: embedding, head, router, gains, biases."""
    return not is_muons(p)


def view(p: Param, split_heads: bool) -> View:
    """Returns how the matrices of a parameter lie in it: [front ..., inputs ..., outputs ...].

    Of a side of two dimensions the first counts heads. With `split_heads` each head is a matrix.
    """
    front = len(p.shape) - p.inputs - p.outputs
    order, inputs, heads = list(range(len(p.shape))), p.inputs, None
    if split_heads and p.inputs + p.outputs > 2:
        heads = front if p.inputs == 2 else front + p.inputs
        order.insert(front, order.pop(heads))
        front, inputs = front + 1, 1
    split = front + inputs
    spec = [*p.spec, *[None] * (len(p.shape) - len(p.spec))]
    shape, spec = tuple(p.shape[i] for i in order), tuple(spec[i] for i in order)
    sides = [
        (math.prod(shape[dims]), spec_axes(spec[dims]))
        for dims in (slice(front, split), slice(split, None))
    ]
    for dims in (slice(front + 1, split), slice(split + 1, None)):
        # Parts of a side are then its rows in order, which all_to_all joins.
        assert not spec_axes(spec[dims]), f'{p.spec} shards an inner dimension of a matrix'
    (n_in, _), (n_out, _) = sides
    (rows, row_axes), (columns, column_axes) = ordered = sorted(sides)
    for axes in (row_axes, column_axes):
        assert len(axes) < 2, f'{p.spec} shards a side of a matrix over several axes'
    row_axis, column_axis = (axes[0] if axes else None for axes in (row_axes, column_axes))
    group = Matrices(rows, columns, row_axis, column_axis, spec_axes(spec[:front]))
    return View(group, n_in, n_out, heads, front, split, turned=ordered != sides)


def to_matrices(x: Array, v: View) -> Array:
    """Brings this device's shard of a parameter into the form of its group: [n, rows, columns]."""
    if v.heads is not None:
        x = jnp.moveaxis(x, v.heads, v.front - 1)
    sizes = (x.shape[: v.front], x.shape[v.front : v.split], x.shape[v.split :])
    x = x.reshape([math.prod(size) for size in sizes])
    return x.swapaxes(1, 2) if v.turned else x


def from_matrices(x: Array, v: View, shape: tuple[int, ...]) -> Array:
    """Undoes `to_matrices`, for a shard of this shape."""
    x = x.swapaxes(1, 2) if v.turned else x
    if v.heads is None:
        return x.reshape(shape)
    moved_shape = [*shape]
    moved_shape.insert(v.front - 1, moved_shape.pop(v.heads))
    return jnp.moveaxis(x.reshape(moved_shape), v.front - 1, v.heads)


def muon_slots(declared: Tree) -> dict[str, Tree]:
    """Declares the momentum of Muon's matrices, and AdamW's moments of the rest."""
    return {
        'momentum': zeros_like(part(declared, declared, is_muons)),
        **adamw_slots(part(declared, declared, is_adamws)),
    }


def muon(
    params: Tree,
    grads: Tree,
    slots: Tree,
    lr: Array,
    updates: Array,
    declared: Tree,
    cfg: OptimizerConfig,
) -> tuple[Tree, Tree]:
    """Makes one update: of the matrices inside layers by Muon, of all else by AdamW.

    Muon (Jordan et al. 2024) moves a matrix against the orthogonal matrix nearest to its momentum.
    The momentum is a mean, as AdamW's first moment is; its scale is divided out. With Nesterov it
    counts the newest gradient once more (torch.optim.Muon does the same).
    """
    settings = cfg.muon
    of_muon, of_adamw = (part(declared, declared, which) for which in (is_muons, is_adamws))
    rest = (part(tree, declared, is_adamws) for tree in (params, grads))
    rate = settings.adamw_lr / cfg.peak_lr if settings.adamw_lr else 1.0
    moments = {name: slots[name] for name in ('m', 'v')}
    others, moments = adamw(*rest, moments, lr * rate, updates, of_adamw, cfg)

    params, grads = (part(tree, declared, is_muons) for tree in (params, grads))
    momentum = mixed(slots['momentum'], grads, settings.momentum)
    ahead = mixed(momentum, grads, settings.momentum) if settings.nesterov else momentum
    direction = orthogonal(ahead, of_muon, settings)

    def update(p: Param, x: Array, direction: Array) -> Array:
        return moved(p, x, direction, lr, cfg)

    params = map_params(update, of_muon, params, direction)
    return merged(params, others), {'momentum': momentum, **moments}


def muon_groups(declared: Tree, split_heads: bool) -> dict[Matrices, list[tuple[int, View]]]:
    """Returns the leaves of each group: their places in the flattened tree of Muon's, and views."""
    groups = collections.defaultdict(list)
    for i, p in enumerate(jax.tree.leaves(declared, is_leaf=is_param)):
        v = view(p, split_heads)
        groups[v.group].append((i, v))
    return groups


@jax.named_scope('muon')
def orthogonal(tree: Tree, declared: Tree, cfg: MuonConfig) -> Tree:
    """Returns the nearest orthogonal matrix of every matrix in a sharded tree, times its scale.

    Leaves whose matrices have one shape and layout travel together, so that there are as many
    collectives as shapes, and matrices of all layers share the homes.
    """
    leaves, structure = jax.tree.flatten(tree)
    for group, members in muon_groups(declared, cfg.split_heads).items():
        x = jnp.concatenate([to_matrices(leaves[i], v) for i, v in members])
        x = at_home(x.astype(cfg.dtype), group, cfg)
        start = 0
        for i, v in members:
            shape = leaves[i].shape
            n = math.prod(shape) // math.prod(x.shape[1:])
            scale = SCALES[cfg.scale](v.inputs, v.outputs)
            direction = from_matrices(x[start : start + n], v, shape)
            leaves[i] = scale * direction.astype(jnp.float32)
            start += n
    return structure.unflatten(leaves)


def at_home(x_nrc: Array, group: Matrices, cfg: MuonConfig) -> Array:
    """Runs `newton_schulz` on each matrix as a whole, on one device: its home.

    Layout: [n, rows/r, columns/c], a shard of each of n matrices, on each of r · c devices. They
    become [n/(r·c), rows, columns], every matrix on one of them; then go back. n is filled up with
    zeros to a multiple. With replicas='split' the copies of a shard part the matrices between them.
    Moves, each way: an all-to-all over each of the two axes, of size · (1 - 1/r) and
    size · (1 - 1/c) bytes in cfg.dtype; with replicas='split' an all-gather of the results.
    """
    n, copies = x_nrc.shape[0], group.replicas if cfg.replicas == 'split' else ()
    homes = math.prod(lax.axis_size(axis) for axis in (*group.axes, *copies))
    # The barrier: XLA:CPU (jax 0.10.2) does not compile an all-to-all of which it knows one part to
    # be zero, if the layout of another one differs.
    x = lax.optimization_barrier(jnp.pad(x_nrc, ((0, -n % homes), (0, 0), (0, 0))))
    for axis in copies:
        x = local_slice(x, axis, 0)
    sharded = [(axis, dim) for dim, axis in ((1, group.row_axis), (2, group.column_axis)) if axis]
    for axis, dim in sharded:
        x = all_to_all(x, axis, 0, dim)
    x = newton_schulz(x, cfg)
    for axis, dim in reversed(sharded):
        x = all_to_all(x, axis, dim, 0)
    for axis in reversed(copies):
        x = replicate(x, axis, 0)
    return x[:n]


@jax.named_scope('newton_schulz')
def newton_schulz(x_nRC: Array, cfg: MuonConfig) -> Array:
    """Brings the singular values of each matrix, R <= C, near 1: [n, R, C] -> the same.

    A step takes 4 R² C + 2 R³ FLOPs a matrix, and no collective.
    """
    dtype = x_nRC.dtype
    # The barrier: XLA:TPU (libtpu 0.0.52) would make float32 of what arrived, and only then bring
    # the parts of a matrix together.
    x_nRC = lax.optimization_barrier(x_nRC)
    norm = jnp.sqrt(jnp.sum(jnp.square(x_nRC.astype(jnp.float32)), axis=(1, 2), keepdims=True))
    x_nRC = (x_nRC / jnp.maximum(norm, SMALLEST_NORM)).astype(dtype)
    # Sums are float32 whatever the type of the factors. HIGHEST: float32 is meant as such on TPU
    # too, whose matmuls would otherwise round it to bfloat16.
    matmul = functools.partial(
        jnp.matmul, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    def step(x: Array, abc: Array) -> tuple[Array, None]:
        a, b, c = abc
        s = matmul(x, x.swapaxes(-1, -2)).astype(dtype)
        of_s = (b * s + c * matmul(s, s)).astype(dtype)
        return (a * x + matmul(of_s, x)).astype(dtype), None

    def steps(x: Array) -> Array:
        # Without a loop, whose carry is copied each time: a step reads x while it makes the next.
        table = jnp.asarray(coefficients(cfg), jnp.float32)
        return lax.scan(step, x, table, unroll=min(cfg.steps, 8))[0]

    def one_by_one(x_nRC: Array) -> Array:
        return lax.map(steps, x_nRC)

    # XLA:CPU multiplies the matrices of a batch at two thirds of the rate of single ones.
    return lax.platform_dependent(x_nRC, cpu=one_by_one, default=steps)


def coefficients(cfg: MuonConfig) -> list[tuple[float, float, float]]:
    """Returns the coefficients of each step."""
    table = COEFFICIENTS[cfg.coefficients]
    return [table[min(i, len(table) - 1)] for i in range(cfg.steps)]


def muon_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for constants out of range."""
    yield from adamw_rules(config)
    o = config.optimizer
    if o.muon.adamw_lr and not o.peak_lr:
        yield (
            f'optimizer.muon.adamw_lr={o.muon.adamw_lr} follows the schedule of optimizer.peak_lr, '
            f'which is 0; use a peak_lr above 0'
        )


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Optimizer] = {
    'adamw': Optimizer(adamw_slots, adamw, adamw_rules),
    'muon': Optimizer(muon_slots, muon, muon_rules),
}

# ---------------------------------------------------------------------------------------------
# Averaged weights
# ---------------------------------------------------------------------------------------------

AVERAGE = 'ema'  # the slot of the averaged parameters


def slots_of(declared: Tree, cfg: OptimizerConfig) -> dict[str, Tree]:
    """Declares all that is kept beside the parameters: the optimizer's slots, and the average."""
    slots = OPTIMIZERS[cfg.name].slots(declared)
    assert AVERAGE not in slots, f'{AVERAGE!r} is the name of the averaged weights'
    return slots | ({AVERAGE: zeros_like(declared)} if cfg.ema else {})


def average(mean: Tree, params: Tree, updates: Array, decay: float) -> Tree:
    """Returns the exponential mean of the parameters after each update, elementwise.

    `updates` counts those before this one. The mean of what was there so far: the weights of the
    parameters always add up to 1 (as in AdamW's bias correction), so that those from before the
    first update have none (Polyak & Juditsky 1992; as an exponential mean, Izmailov et al. 2018).
    """
    t = (updates + 1).astype(jnp.float32)
    weight = (1 - decay) / -jnp.expm1(t * math.log(decay))
    return jax.tree.map(lambda mean, x: mean + weight * (x - mean), mean, params)


# ---------------------------------------------------------------------------------------------
# Skipped steps
# ---------------------------------------------------------------------------------------------

# A step whose gradient norm is not finite, or far above its recent history, leaves parameters,
# slots and expert biases as they were; the step number, and with it data and learning rate, goes
# on. The norm is one number that all devices hold, so they decide alike.


def init_history() -> Tree:
    """Returns an empty history of gradient norms: scalars, alike on all devices.

    log_norm: float32, the mean logarithm of the gradient norm; counted: int32, the norms in it;
    skipped and in_a_row: int32, the steps skipped so far, and those since the last update.
    """
    counts = {name: jnp.zeros((), jnp.int32) for name in ('counted', 'skipped', 'in_a_row')}
    return {'log_norm': jnp.zeros((), jnp.float32)} | counts


def count_updates(step: Array, history: Tree) -> Array:
    """Returns the number of updates before this step: all steps but those that were skipped."""
    return step - history['skipped']


def judge(norm: Array, history: Tree, guard: ConfigDict) -> tuple[Array, Tree]:
    """Decides whether to apply a step with this gradient norm (bool), and updates the history.

    Compares the norm with a geometric mean, which the few large norms of a healthy run move little:
    of all steps at first, then with a weight of 1/guard.history for the newest. Skipped steps do
    not enter it. Before it holds guard.history steps, no norm is too large.
    """
    log_norm, counted = history['log_norm'], history['counted']
    apply = jnp.array(True)
    if guard.nonfinite:
        apply &= jnp.isfinite(norm)
    if guard.spike_factor:
        spike = norm > guard.spike_factor * jnp.exp(log_norm)
        apply &= ~(spike & (counted >= guard.history))
    counts = apply & jnp.isfinite(norm) & (norm > 0)
    weight = 1 / jnp.minimum(counted + 1, guard.history).astype(jnp.float32)
    moved = log_norm + weight * (jnp.log(norm) - log_norm)
    after = {
        'log_norm': jnp.where(counts, moved, log_norm),
        'counted': counted + counts,
        'skipped': history['skipped'] + ~apply,
        'in_a_row': jnp.where(apply, 0, history['in_a_row'] + 1),
    }
    return apply, after


def select(apply: Array, new: Tree, old: Tree) -> Tree:
    """Returns the new leaves if the step is to be applied, otherwise the old ones.

    Elementwise, so that the update is still written over the donated state; `lax.cond` would keep
    the old state beside it.
    """
    return jax.tree.map(lambda x, y: jnp.where(apply, x, y), new, old)
