"""Mesh axes, parameter declarations, and every collective that the model uses.

    python parallel.py --schedule=zero_bubble --stages=4 --microbatches=8   # prints the schedule

The whole model runs inside one `jax.shard_map`. Two conventions make its gradients right:

1.  Inside, every value counts as *varying* over every mesh axis. Parameters are made varying once
    per step (`varying`), and each verb below returns a varying value.
2.  Each device returns its *share* of the loss; the shares of all devices add up to the loss.

Then the transpose of each verb is another verb of this file, with `check_vma` on and off, and the
gradient of a parameter is the sum of the local gradients over the axes that do not shard it
(`sum_gradients`, once per step).
"""

import dataclasses
import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from config import ConfigError

Array = jax.Array
Tree = Any  # nested dicts
Axis = str | tuple[str, ...]

# ---------------------------------------------------------------------------------------------
# The mesh
# ---------------------------------------------------------------------------------------------

PP = 'pp'  # pipeline stages
DP = 'dp'  # replicas
FSDP = 'fsdp'  # shards of the batch and of the parameters
EP = 'ep'  # shards of the batch and of the experts
CP = 'cp'  # shards of the sequence; replicas of the parameters
TP = 'tp'  # shards of heads, feed-forward and vocabulary; between matmuls, of the sequence
AXES = (PP, DP, FSDP, EP, CP, TP)
BATCH = (DP, FSDP, EP)  # the axes over which batch rows are spread
SEQUENCE = (CP, TP)  # those over which the positions of a row are spread


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with all six axes; an axis that `sizes` does not name has size 1.

    The axes are Auto: `shard_map` takes ordinary arrays only on such axes. On a torus, each axis
    lies along whole dimensions where possible; otherwise a dimension is split, as 8 over
    2 x 4 x 4. `device_grid` describes the order of devices of several slices.
    """
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if devices is None:
        devices = jax.devices()[: math.prod(shape)]
    return Mesh(device_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arranges the devices in the shape of the mesh, so that only dp crosses slices.

    The network between slices is slow; with dp alone across it, it carries one all-reduce of the
    gradients per step. GPUs connected by a switch count as a slice too; if dp cannot cross them,
    the devices keep their order. Raises ConfigError if the devices are not whole TPU slices, or dp
    is no multiple of their number.
    """
    slices = Counter(getattr(device, 'slice_index', 0) for device in devices)
    n, dp = len(slices), AXES.index(DP)
    fits = shape[dp] % n == 0 and len(set(slices.values())) == 1
    if n > 1 and not fits and devices[0].platform == 'tpu':
        raise ConfigError(
            f'the config cannot run: the mesh takes {dict(slices)} devices of {n} slices, which dp '
            f'has to cross, but mesh.dp={shape[dp]}; use all devices of each slice, and a dp that '
            f'is a multiple of {n}'
        )
    if n == 1 or not fits:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    within = tuple(size // n if i == dp else size for i, size in enumerate(shape))
    across = tuple(n if i == dp else 1 for i in range(len(shape)))
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------

# (key, shape) -> float32 values. Reshaping `shape` reshapes the values: their order stays the same.
Initializer = Callable[[Array, tuple[int, ...]], Array]


def normal(std: float) -> Initializer:
    """Returns an initializer that draws from a normal distribution with mean 0."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def zeros(_: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


def ones(_: Array, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter, declared once: arrays, shardings, counts and optimizer state follow from it.

    shape: the global shape.
    spec: the mesh axes that shard each dimension.
    init: draws the initial values.
    matrix: True for weights, which are decayed and cast to the compute type where they are used;
        False for gains.
    trainable: False for what the optimizer leaves unchanged.
    use: the fraction of it that one token meets; experts per token / experts for routed experts.
    linear: True if its only use is one `linear` per layer, so that it may be `Deferred`.
    wide: True if it is multiplied in the compute type, whatever model.matmul_type.
    kept_by: the name in config.REMAT_NAMES whose keeping spares the backward pass computing this
        weight's product again; '' if none does, dense.NEVER if no backward pass needs the product.
    work: numbers that the matmul multiplies per number of the weight; above 1 if it takes a larger
        matrix that contains the weight.
    inputs, outputs: how many of the last dimensions its input takes, and its output after them,
        where an optimizer may take it for a matrix, or for as many as the dimensions before them
        count; 0, 0 for gains, embedding, head and router. Of a side of two the first counts heads.
    """

    shape: tuple[int, ...]
    spec: P
    init: Initializer
    matrix: bool = True
    trainable: bool = True
    use: float = 1.0
    linear: bool = False
    wide: bool = False
    kept_by: str = ''
    work: float = 1.0
    inputs: int = 0
    outputs: int = 0

    @property
    def multiplied(self) -> bool:
        """True for what `linear` or the experts' kernels multiply, in model.matmul_type."""
        of_experts = self.inputs > 0 and EP in spec_axes(self.spec)
        return (self.linear or of_experts) and not self.wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A weight whose gradient is computed later, from the "gradient" of its `sink`.

    sink: zeros in the shapes of the input and the output of the weight's linear layer. The forward
        pass ignores them. In the backward pass their "gradients" are that input and the gradient
        of that output; the weight itself receives no gradient. Sinks are stacked, scanned and
        rematerialized like parameters, so that code between the pipeline stage and its linear
        layers needs no knowledge of them.
    seen: where `linear` stores the shapes of the sink while it is traced without one (sink=None).
    """

    array: Array
    sink: tuple[Array, Array] | None
    seen: 'Seen | None' = dataclasses.field(default=None, metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class Seen:
    """Shapes and types of a `Deferred`'s sink; None until its linear layer has been traced."""

    sink: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct] | None = None


def is_param(x: Any) -> bool:
    """Returns True for a `Param`: the leaves of a tree of declarations."""
    return isinstance(x, Param)


def map_params(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Maps f over a tree of `Param` and `rest`, trees of the same structure, as `jax.tree.map`."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_param)


def part(tree: Tree, declared: Tree, keep: Callable[[Param], bool]) -> Tree:
    """Returns the leaves of nested dicts whose `Param` is to be kept, without empty dicts."""
    found = {}
    for name, below in declared.items():
        if not is_param(below):
            inner = part(tree[name], below, keep)
            found |= {name: inner} if inner else {}
        elif keep(below):
            found[name] = tree[name]
    return found


def merged(a: Tree, b: Tree) -> Tree:
    """Returns nested dicts with the leaves of both, which have none in common."""
    both = {name: merged(a[name], b[name]) for name in a if name in b}
    return a | b | both


def stacked(tree: Tree, n: int, axis: str | None, chunks: int = 1) -> Tree:
    """Declares the parameters of `n` layers: one leading dimension n, sharded over `axis`.

    Where pipeline stages have several chunks, the leading dimensions are [chunks, n / chunks]:
    chunk c of stage s holds the layers of virtual stage c · stages + s, and layers lie in memory
    in their order. Layer i is drawn from its own key, so that its values do not depend on n.
    """
    front, axes = ((n,), (axis,)) if chunks == 1 else ((chunks, n // chunks), (None, axis))

    def stack(p: Param) -> Param:
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
            one = p.shape if len(shape) > 1 else (math.prod(p.shape),)
            return jax.vmap(lambda k: p.init(k, one))(keys).reshape(shape)

        return dataclasses.replace(p, shape=(*front, *p.shape), spec=P(*axes, *p.spec), init=init)

    return map_params(stack, tree)


def specs(tree: Tree) -> Tree:
    """Returns the PartitionSpec of each `Param`."""
    return map_params(lambda p: p.spec, tree)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Returns the NamedSharding of each `Param` on this mesh."""
    return map_params(lambda p: NamedSharding(mesh, p.spec), tree)


def count(tree: Tree, active: bool = False) -> int:
    """Counts the parameters of the tree; with `active` those that one token meets (`Param.use`)."""
    leaves = jax.tree.leaves(tree, is_leaf=is_param)
    return round(sum(math.prod(p.shape) * (p.use if active else 1) for p in leaves))


def init_params(key: Array, tree: Tree, mesh: Mesh) -> Tree:
    """Draws float32 arrays for a tree of `Param`, directly on their devices.

    Each parameter's key is folded in from its path, so its values depend neither on the mesh nor
    on the rest of the tree. Parameters that the mesh does not shard are drawn as one dimension,
    which XLA:CPU compiles four times faster.
    """

    def init(key: Array) -> Tree:
        def leaf(path: tuple, p: Param) -> Array:
            name = '/'.join(str(entry.key) for entry in path)
            sharded = any(mesh.shape[axis] > 1 for axis in spec_axes(p.spec))
            shape = p.shape if sharded else (math.prod(p.shape),)
            leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return p.init(leaf_key, shape).reshape(p.shape)

        return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_param)

    return jax.jit(init, out_shardings=shardings(tree, mesh))(key)


@functools.cache
def spec_axes(spec: P) -> tuple[str, ...]:
    """Returns the mesh axes that a spec names, in its order."""
    entries = [e if isinstance(e, tuple) else (e,) for e in spec if e is not None]
    return tuple(axis for entry in entries for axis in entry)


def free_axes(spec: P) -> tuple[str, ...]:
    """Returns the mesh axes that a spec does not name: those over which the array is replicated."""
    return tuple(axis for axis in AXES if axis not in spec_axes(spec))


def fsdp_dim(p: Param) -> int | None:
    """Returns the dimension that fsdp shards; None if it shards none."""
    for dim, entry in enumerate(p.spec):
        if entry is not None and FSDP in (entry if isinstance(entry, tuple) else (entry,)):
            return dim
    return None


# ---------------------------------------------------------------------------------------------
# Collectives, for use inside shard_map. n is the size of the axis; bytes are those that one
# device sends, with `size` the bytes of the larger of input and output.
#
# Over an axis of size 1 a verb returns its input: XLA:CPU would execute the collective all the
# same, and copy whole weights into the layout that the collective asks for. Input and output are
# varying in either case, so the types do not change.
# ---------------------------------------------------------------------------------------------


def named_by_axis(verb: Callable[..., Array]) -> Callable[..., Array]:
    """Wraps a verb so that profiles show its operations by verb and axis: all_gather_tp."""

    @functools.wraps(verb)
    def named(x: Array, axis: Axis, *args: Any) -> Array:
        axes = axis if isinstance(axis, str) else '_'.join(axis)
        with jax.named_scope(f'{verb.__name__}_{axes}'):
            return verb(x, axis, *args)

    return named


def varying(x: Array, axes: Axis) -> Array:
    """Marks a value that is the same on all devices of `axes` as one that may differ.

    Layout: unchanged. Forward: nothing moves. Backward: nothing moves, since the model's gradients
    are taken with respect to varying values (see `sum_gradients`).
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    return lax.pcast(x, axes, to='varying') if axes else x


@named_by_axis
def all_gather(x: Array, axis: Axis, dim: int) -> Array:
    """Gathers dim. Layout: dim/n -> dim, the same on all devices of the axis.

    Forward: all-gather, size·(n-1)/n bytes. Backward: reduce-scatter of the cotangents, as many.
    """
    return x if lax.axis_size(axis) == 1 else lax.all_gather(x, axis, axis=dim, tiled=True)


@named_by_axis
def reduce_scatter(x: Array, axis: Axis, dim: int) -> Array:
    """Sums, and splits dim. Layout: partial sums of the whole dim -> the sum, dim/n.

    Forward: reduce-scatter, size·(n-1)/n bytes. Backward: all-gather of the cotangents, as many.
    """
    if lax.axis_size(axis) == 1:
        return x
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


@named_by_axis
def all_to_all(x: Array, axis: Axis, dim: int, to: int | None = None) -> Array:
    """Exchanges parts. Layout: dim is n parts, one for each device of the axis -> one from each.

    They are joined along dimension `to`, by default the same: dim, to/n -> dim/n, to.
    Forward: all-to-all, size·(n-1)/n bytes. Backward: the all-to-all back of the cotangents.
    """
    if lax.axis_size(axis) == 1:
        return x
    to = dim if to is None else to
    return lax.all_to_all(x, axis, split_axis=dim, concat_axis=to, tiled=True)


def ragged_all_to_all(
    x: Array, rows: int, start: Array, sizes: Array, start_there: Array, received: Array, axis: str
) -> Array:
    """Exchanges rows. Layout: sorted by the device they go to -> [rows, ...], sorted by source.

    For each device p of the axis, int32 [n]: the `sizes[p]` rows from `start[p]` on go to its rows
    from `start_there[p]` on, and `received[p]` rows come from it. Rows that receive nothing are
    zero. Forward: all-to-all of the rows sent. Backward: the same in the other direction. Only on
    TPU and GPU.
    """
    out = jnp.zeros_like(x, shape=(rows, *x.shape[1:]))
    with jax.named_scope(f'ragged_all_to_all_{axis}'):
        return lax.ragged_all_to_all(x, out, start, sizes, start_there, received, axis_name=axis)


@named_by_axis
def psum(x: Array, axis: Axis) -> Array:
    """Sums. Layout: partial sums -> the sum, on every device of the axis.

    Forward: all-reduce, 2·size·(n-1)/n bytes. Backward: all-reduce of the cotangents, as many,
    since each device's share of the loss may depend on the sum differently.
    """
    return x if lax.axis_size(axis) == 1 else varying(lax.psum(x, axis), axis)


@named_by_axis
def pmax(x: Array, axis: Axis) -> Array:
    """Takes the elementwise maximum over the axis. Layout: unchanged. Not differentiable.

    Forward: all-reduce, 2·size·(n-1)/n bytes. Backward: none.
    """
    x = lax.stop_gradient(x)
    return x if lax.axis_size(axis) == 1 else varying(lax.pmax(x, axis), axis)


def broadcast(x: Array, axis: str, source: Array) -> Array:
    """Copies from one device. Layout: each device's own x -> that of device `source` on all.

    Forward: all-reduce, 2·size·(n-1)/n bytes. Not differentiated: decoding uses it to bring the
    layers of a pipeline stage to all stages.
    """
    if lax.axis_size(axis) == 1:
        return x
    return psum(jnp.where(lax.axis_index(axis) == source, x, 0), axis)


@named_by_axis
def shift(x: Array, axis: str, by: int) -> Array:
    """Sends x from device i to device i + by of the axis, around the ring. Layout: unchanged.

    Forward: collective permute, size bytes. Backward: one in the other direction, as many.
    """
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def pass_on(x: Array, axis: str, ragged: bool) -> Array:
    """Sends x to the next device of a ring, also where devices of other rings do not. Layout:
    unchanged.

    Sends size bytes. Not differentiated. A collective permute is one for all rings of the mesh, and
    waits for all its devices (XLA:CPU); within a pipeline's stage, which idle stages skip, only
    collectives of a ring's own devices can run: a ragged all-to-all with one row, to the next.
    Without one all is gathered, n - 1 times the bytes. `lax.platform_dependent` would hide either
    in a condition, which XLA:CPU does not keep in order with other collectives.
    """
    n, i = lax.axis_size(axis), lax.axis_index(axis)
    if lax.axis_size(PP) == 1:
        return shift(x, axis, 1)
    with jax.named_scope(f'pass_on_{axis}'):
        if not ragged:
            every = lax.all_gather(x, axis)
            return lax.dynamic_index_in_dim(every, (i - 1) % n, keepdims=False)
        devices = jnp.arange(n)
        to, source = ((devices == (i + by) % n).astype(jnp.int32) for by in (1, -1))
        none = jnp.zeros_like(to)
        return ragged_all_to_all(x[None], 1, none, to, none, source, axis)[0]


def local_slice(x: Array, axis: Axis, dim: int) -> Array:
    """Takes this device's part. Layout: dim, the same on all devices of the axis -> dim/n.

    Forward and backward: nothing moves.
    """
    size = x.shape[dim] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, dim)


def zigzag_parts(i: int | Array, n: int) -> tuple[int | Array, int | Array]:
    """Returns which of 2n equal parts of a sequence device i holds: an early and a late one."""
    return i, 2 * n - 1 - i


def zigzag(x: Array, axis: Axis, dim: int) -> Array:
    """Takes this device's two parts of a sequence. Layout: dim, the same on all devices -> dim/n.

    They are those of `zigzag_parts`, so that each device's queries see equally many keys. Forward
    and backward: nothing moves.
    """
    n, i = lax.axis_size(axis), lax.axis_index(axis)
    if n == 1:
        return x
    size = x.shape[dim] // (2 * n)
    parts = (lax.dynamic_slice_in_dim(x, p * size, size, dim) for p in zigzag_parts(i, n))
    return jnp.concatenate([*parts], dim)


def zigzag_order(T: int, n: int) -> np.ndarray:
    """Returns the positions that n devices hold by `zigzag`, one device after the other: int32."""
    if n == 1:
        return np.arange(T, dtype=np.int32)
    parts = np.arange(T, dtype=np.int32).reshape(2 * n, -1)
    return np.concatenate([parts[[*zigzag_parts(i, n)]].reshape(-1) for i in range(n)])


def gather_zigzag(x: Array, axis: Axis, dim: int) -> Array:
    """Undoes `zigzag`. Layout: dim/n, two parts of it -> dim in its order, on all devices.

    Forward: all-gather, size·(n-1)/n bytes. Backward: reduce-scatter of the cotangents, as many.
    """
    n = lax.axis_size(axis)
    if n == 1:
        return x
    dim %= x.ndim
    front, behind = x.shape[:dim], x.shape[dim + 1 :]
    x = all_gather(x, axis, dim).reshape(*front, n, 2, x.shape[dim] // 2, *behind)
    early, late = (lax.index_in_dim(x, k, dim + 1, keepdims=False) for k in (0, 1))
    return jnp.concatenate((early, jnp.flip(late, dim)), dim).reshape(*front, -1, *behind)


def own_positions(x: Array, dim: int) -> Array:
    """Takes this device's positions. Layout: dim, the same on all devices -> dim/(cp·tp).

    Over cp as in `zigzag`, over tp in order. Forward and backward: nothing moves.
    """
    return local_slice(zigzag(x, CP, dim), TP, dim)


# Its derivative is written by hand: the transpose of all_gather, by another collective.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_to_exchange(x: Array, axis: Axis, dim: int) -> Array:
    """Gathers dim, as `all_gather` does, with a backward that an all-to-all carries.

    Forward: all-gather, size·(n-1)/n bytes. Backward: `exchange_sum` of the cotangents, as many.
    """
    return all_gather(x, axis, dim)


gather_to_exchange.defvjp(
    lambda x, axis, dim: (all_gather(x, axis, dim), None),
    lambda axis, dim, _, d: (exchange_sum(d, axis, dim),),
)


@named_by_axis
def exchange_sum(x: Array, axis: Axis, dim: int) -> Array:
    """Sums, and splits dim, as `reduce_scatter` does. Layout: partial sums of the whole dim -> the
    sum, dim/n.

    Each device sends its part of the sum to the one that keeps it, which adds up n parts in
    float32: no partial sum is rounded on its way. Moves: all-to-all, size·(n-1)/n bytes, over n/4
    links each on average. Not differentiated. The TPU compiler runs an all-to-all beside compute,
    a reduce-scatter of v4 never, and makes an all-reduce of twice the bytes of one over all 32
    chips of a slice.
    """
    n = lax.axis_size(axis)
    if n == 1:
        return x
    # As few dimensions as can be: of many small ones, one would fill a part of a TPU's lanes.
    front, size, behind = math.prod(x.shape[:dim]), x.shape[dim] // n, math.prod(x.shape[dim + 1 :])
    parts = x.reshape(front, n, size, behind)
    parts = lax.all_to_all(parts, axis, split_axis=1, concat_axis=1)
    total = jnp.sum(parts.astype(jnp.float32), axis=1).astype(x.dtype)
    return total.reshape(*x.shape[:dim], size, *x.shape[dim + 1 :])


REDUCE_SCATTER, ALL_TO_ALL = 'reduce_scatter', 'all_to_all'  # config.fsdp_reduce
REDUCES = {REDUCE_SCATTER: reduce_scatter, ALL_TO_ALL: exchange_sum}


def unshard(
    params: Tree,
    declared: Tree,
    dtype: jnp.dtype,
    reduce: str = REDUCE_SCATTER,
    quantize: Callable[[Param, Array, int | None, str], Any] | None = None,
) -> Tree:
    """Casts one layer's weights to the compute type, then gathers them over fsdp.

    Layout: the dimension that fsdp shards, dim/n -> dim; tp and ep shard what they did. Weights
    that `gather_ahead` gathered are returned as they are. Gains stay float32. `quantize(p, x, dim,
    reduce)` gathers a layer's matrix in another type; dim is None where nothing is to be gathered.
    Forward: all-gather over fsdp in `dtype`, size·(n-1)/n bytes; in bfloat16, half of float32's.
    Backward: sums the gradients over fsdp in `dtype` by `reduce`, one of REDUCES, as many bytes.
    """
    gather = all_gather if reduce == REDUCE_SCATTER else gather_to_exchange

    def leaf(p: Param, x: Array | Deferred) -> Array | Deferred:
        if isinstance(x, Deferred):
            return dataclasses.replace(x, array=leaf(p, x.array))
        if p.matrix:
            x = x.astype(dtype)
        dim = fsdp_dim(p)
        whole = dim is None or x.shape[dim] == p.shape[dim]
        if quantize and p.multiplied:
            return quantize(p, x, None if whole else dim, reduce)
        return x if whole else gather(x, FSDP, dim)

    return map_params(leaf, declared, params)


def gather_ahead(params: Tree, declared: Tree, dtype: jnp.dtype) -> Tree:
    """Casts and gathers all weights that fsdp shards, once for all their uses in a step.

    Layout and bytes as in `unshard`, but once per step instead of twice per microbatch; in return,
    each device holds its layers' weights unsharded over fsdp, and their gradients in float32.
    """

    def leaf(p: Param, x: Array) -> Array:
        return x if fsdp_dim(p) is None else all_gather(x.astype(dtype), FSDP, fsdp_dim(p))

    return map_params(leaf, declared, params)


def scatter_gradients(grads: Tree, declared: Tree, reduce: str = REDUCE_SCATTER) -> Tree:
    """Sums the gradients of weights that `gather_ahead` gathered over fsdp, and shards them.

    Layout: partial sums of dim -> the sum, dim/n, for the dimension that fsdp shards.
    Moves: by `reduce` in float32 once per step, size·(n-1)/n bytes. Not differentiated.
    """

    def leaf(p: Param, g: Array) -> Array:
        return g if fsdp_dim(p) is None else REDUCES[reduce](g, FSDP, fsdp_dim(p))

    return map_params(leaf, declared, grads)


@jax.named_scope('sum_gradients')
def sum_gradients(grads: Tree, declared: Tree) -> Tree:
    """Sums each gradient over the axes that do not shard its parameter; once per step.

    Layout: each device's own -> the sum, the same on all devices of those axes.
    Moves: one all-reduce per leaf, 2·size·(n-1)/n bytes. Not differentiated.
    """
    return map_params(lambda p, g: lax.psum(g, free_axes(p.spec)), declared, grads)


@named_by_axis
def replicate(x: Array, axis: Axis, dim: int) -> Array:
    """Gathers dim for results of the step. Layout: dim/n -> dim, replicated over the axis.

    Moves: all-gather, size·(n-1)/n bytes. Not differentiated. Over an axis of size 1 too, as only
    the collective makes the result count as replicated.
    """
    return lax.all_gather(x, axis, axis=dim, tiled=True, to='invarying')


@jax.named_scope('global_sum')
def global_sum(x: Array) -> Array:
    """Sums over the whole mesh. Layout: each device's share -> the sum, replicated.

    Moves: all-reduce, 2·size·(n-1)/n bytes. Not differentiated: it is for results of the step.
    """
    return lax.psum(x, AXES)


def global_sum_of_squares(tree: Tree, declared: Tree) -> Array:
    """Sums the squares of a whole sharded tree: float32 scalar, replicated.

    Each device adds up its shards, divided by the number of their copies; one all-reduce of the
    resulting scalar moves 2·4·(n-1)/n bytes.
    """

    def leaf(p: Param, x: Array) -> Array:
        free = free_axes(p.spec)
        return varying(jnp.sum(jnp.square(x)) / lax.axis_size(free), free)

    return global_sum(sum(jax.tree.leaves(map_params(leaf, declared, tree))))


if __name__ == '__main__':
    from pipeline import schedules

    schedules.run_command()
