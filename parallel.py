"""Mesh axes, parameter declarations, and every collective that the model uses.

    python parallel.py --schedule=zero_bubble --stages=4 --microbatches=8   # prints its diagram

All of the model runs inside one `jax.shard_map`. Two conventions make its gradients right:

1.  Inside, every value counts as *varying* over every mesh axis. Parameters are made so once per
    step (`varying`), and each verb below returns a varying value again.
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

PP = 'pp'  # pipeline stages


DP = 'dp'  # replicas


FSDP = 'fsdp'  # shards of the batch and of the parameters


EP = 'ep'  # shards of the batch and of the experts


TP = 'tp'  # shards of heads, feed-forward and vocabulary; between them, of the sequence


AXES = (PP, DP, FSDP, EP, TP)


BATCH = (DP, FSDP, EP)  # the axes that batch rows are spread over

Array = jax.Array


Tree = Any  # nested dicts


Axis = str | tuple[str, ...]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all five axes; an axis that `sizes` does not name has size 1.

    The axes are Auto: `shard_map` takes ordinary arrays on those only. On a torus, each is laid
    along whole dimensions where that is possible; else one is split, as 8 over 2 x 4 x 4. Of
    several slices, see `device_grid`.
    """
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if devices is None:
        devices = jax.devices()[: math.prod(shape)]
    return Mesh(device_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the shape of the mesh. Between slices, whose network is slow, lies dp alone:
    all that crosses it is one all-reduce of the gradients a step.

    GPUs that a switch connects count as slices, too; if dp cannot cross them, they are taken in
    their order. Raises ValueError if TPU slices are not whole, or do not divide dp.
    """
    slices = Counter(getattr(device, 'slice_index', 0) for device in devices)
    n, dp = len(slices), AXES.index(DP)
    fits = shape[dp] % n == 0 and len(set(slices.values())) == 1
    if n > 1 and not fits and devices[0].platform == 'tpu':
        raise ValueError(
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

# (key, shape) -> float32 values, whose order in memory does not depend on how the shape is cut.
Initializer = Callable[[Array, tuple[int, ...]], Array]


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def zeros(_: Array, shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


def ones(_: Array, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter, declared once: arrays, shardings, counts and optimizer state follow from it.

    `shape` is the global shape, `spec` says which mesh axes shard which dimension. `matrix` tells
    weights from gains: weights are decayed, and cast to the compute type where they are used.
    `trainable=False`: the optimizer leaves it alone. `use` is the share of it that a token meets,
    experts per token / experts for a routed expert. `linear` says that nothing but one
    `layers.linear` a layer uses it, so that it may be `Deferred`.
    """

    shape: tuple[int, ...]
    spec: P
    init: Initializer
    matrix: bool = True
    trainable: bool = True
    use: float = 1.0
    linear: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A weight whose gradient is computed later, from what its `linear` leaves in `sink`.

    The forward pass ignores the sink: zeros, shaped like the input and the output of the linear
    layer. In the backward pass, the "gradient" of the sink is that input and the gradient of that
    output; the weight itself receives none. Sinks are stacked, scanned and rematerialized like
    parameters, so that no code between the stage and its linear layers knows of them. Without a
    sink, `linear` notes in `seen` what it would have to be.
    """

    array: Array
    sink: tuple[Array, Array] | None
    seen: 'Seen | None' = dataclasses.field(default=None, metadata={'static': True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class Seen:
    """Shapes and types of the sink of a `Deferred`, once its linear layer has been traced."""

    sink: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct] | None = None


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def map_params(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` over a tree of `Param`; `rest` are trees of the same structure."""
    return jax.tree.map(f, tree, *rest, is_leaf=is_param)


def stacked(tree: Tree, n: int, axis: str | None, chunks: int = 1) -> Tree:
    """`n` layers' parameters in one tree: a leading dimension, sharded over `axis`.

    Where pipeline stages have several chunks, [chunks, n / chunks]: chunk c of stage s then holds
    the layers of virtual stage c · stages + s, and the layers' order in memory stays their order.
    Layer i is drawn from a key of its own, so its values do not depend on the number of layers.
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
    return map_params(lambda p: p.spec, tree)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    return map_params(lambda p: NamedSharding(mesh, p.spec), tree)


def count(tree: Tree, active: bool = False) -> int:
    """Number of parameters in the tree, or of those that one token meets."""
    leaves = jax.tree.leaves(tree, is_leaf=is_param)
    return round(sum(math.prod(p.shape) * (p.use if active else 1) for p in leaves))


def init_params(key: Array, tree: Tree, mesh: Mesh) -> Tree:
    """Float32 arrays for a tree of `Param`, made in place on their devices.

    The key of each is folded in from its path, so the values depend neither on the mesh nor on
    what else the tree holds. What the mesh does not cut is drawn flat: XLA:CPU compiles that four
    times faster.
    """

    def init(key: Array) -> Tree:
        def leaf(path: tuple, p: Param) -> Array:
            name = '/'.join(str(entry.key) for entry in path)
            cut = any(mesh.shape[axis] > 1 for axis in spec_axes(p.spec))
            shape = p.shape if cut else (math.prod(p.shape),)
            leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return p.init(leaf_key, shape).reshape(p.shape)

        return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_param)

    return jax.jit(init, out_shardings=shardings(tree, mesh))(key)


@functools.cache
def spec_axes(spec: P) -> tuple[str, ...]:
    """The mesh axes that a spec names, in its order."""
    entries = [e if isinstance(e, tuple) else (e,) for e in spec if e is not None]
    return tuple(axis for entry in entries for axis in entry)


def free_axes(spec: P) -> tuple[str, ...]:
    """The mesh axes that a spec does not name: over these the array is replicated."""
    return tuple(axis for axis in AXES if axis not in spec_axes(spec))


# ---------------------------------------------------------------------------------------------
# Collectives, for use inside shard_map. n is the size of the axis; bytes are those that one
# device sends, with `size` the bytes of the larger of input and output.
#
# Over axes of size 1 they are the identity, and say so: XLA:CPU would carry out the collective, and
# copy whole weights into the layout that it asks for. Since what goes in and what comes out is
# varying in any case, leaving it out changes no type.
# ---------------------------------------------------------------------------------------------


def named_by_axis(verb: Callable[..., Array]) -> Callable[..., Array]:
    """The verb, whose operations a profile then shows under its name and axis: all_gather_tp."""

    @functools.wraps(verb)
    def named(x: Array, axis: Axis, *args: Any) -> Array:
        axes = axis if isinstance(axis, str) else '_'.join(axis)
        with jax.named_scope(f'{verb.__name__}_{axes}'):
            return verb(x, axis, *args)

    return named


def varying(x: Array, axes: Axis) -> Array:
    """Lets a value that is alike on all devices of `axes` be used as if it differed.

    Layout: unchanged. Forward: nothing moves. Backward: nothing moves, since the model's own
    gradients are taken *with respect to* varying values (see `sum_gradients`).
    """
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    return lax.pcast(x, axes, to='varying') if axes else x


@named_by_axis
def all_gather(x: Array, axis: Axis, dim: int) -> Array:
    """Layout: dim/n -> dim, the same on all devices of the axis.

    Forward: all-gather, size·(n-1)/n bytes. Backward: reduce-scatter of the cotangents, as many.
    """
    return x if lax.axis_size(axis) == 1 else lax.all_gather(x, axis, axis=dim, tiled=True)


@named_by_axis
def reduce_scatter(x: Array, axis: Axis, dim: int) -> Array:
    """Layout: partial sums of dim -> the sum, dim/n.

    Forward: reduce-scatter, size·(n-1)/n bytes. Backward: all-gather of the cotangents, as many.
    """
    if lax.axis_size(axis) == 1:
        return x
    return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)


@named_by_axis
def all_to_all(x: Array, axis: Axis, dim: int) -> Array:
    """Layout: dim is n parts, one for each device of the axis -> n parts, one from each.

    Forward: all-to-all, size·(n-1)/n bytes. Backward: the same all-to-all of the cotangents.
    """
    if lax.axis_size(axis) == 1:
        return x
    return lax.all_to_all(x, axis, split_axis=dim, concat_axis=dim, tiled=True)


def ragged_all_to_all(
    x: Array, rows: int, start: Array, sizes: Array, start_there: Array, received: Array, axis: str
) -> Array:
    """Layout: rows sorted by the device that they are for -> [rows, ...], each device's together.

    The `sizes[p]` rows from `start[p]` go to device p, to its rows from `start_there[p]`;
    `received[p]` rows come from it; int32 [n] each. Rows that nobody sends are zero.
    Forward: an all-to-all of the real rows only. Backward: the same, the other way. TPU and GPU.
    """
    out = jnp.zeros_like(x, shape=(rows, *x.shape[1:]))
    with jax.named_scope(f'ragged_all_to_all_{axis}'):
        return lax.ragged_all_to_all(x, out, start, sizes, start_there, received, axis_name=axis)


@named_by_axis
def psum(x: Array, axis: Axis) -> Array:
    """Layout: partial sums -> the sum, on every device of the axis.

    Forward: all-reduce, 2·size·(n-1)/n bytes. Backward: all-reduce of the cotangents, as many:
    each device's share of the loss may depend on the sum in its own way.
    """
    return x if lax.axis_size(axis) == 1 else varying(lax.psum(x, axis), axis)


@named_by_axis
def pmax(x: Array, axis: Axis) -> Array:
    """Layout: unchanged; the elementwise maximum over the axis. Not differentiable.

    Forward: all-reduce, 2·size·(n-1)/n bytes. Backward: none.
    """
    return varying(lax.pmax(lax.stop_gradient(x), axis), axis)


def broadcast(x: Array, axis: str, source: Array) -> Array:
    """Layout: each device's own -> that of device `source` of the axis, on all of them.

    Forward: all-reduce, 2·size·(n-1)/n bytes. Not differentiated: layers of a pipeline come this
    way to where tokens are generated.
    """
    if lax.axis_size(axis) == 1:
        return x
    return psum(jnp.where(lax.axis_index(axis) == source, x, 0), axis)


@named_by_axis
def shift(x: Array, axis: str, by: int) -> Array:
    """Layout: unchanged; device i's x goes to device i + by of the axis, around its ring.

    Forward: a collective permute, size bytes. Backward: one the other way, as many.
    """
    n = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(i, (i + by) % n) for i in range(n)])


def local_slice(x: Array, axis: Axis, dim: int) -> Array:
    """Layout: dim, the same on all devices of the axis -> dim/n. Nothing moves."""
    size = x.shape[dim] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axis) * size, size, dim)


def fsdp_dim(p: Param) -> int | None:
    """The dimension that fsdp shards."""
    for dim, entry in enumerate(p.spec):
        if entry is not None and FSDP in (entry if isinstance(entry, tuple) else (entry,)):
            return dim
    return None


def unshard(params: Tree, declared: Tree, dtype: jnp.dtype) -> Tree:
    """One layer's weights, ready for use: cast to the compute type, *then* gathered over `fsdp`.

    Layout: the dimension that `fsdp` shards, D/fsdp -> D; shards over `tp` and `ep` stay. Weights
    that come whole, from `gather_ahead`, stay as they are.
    Forward: all-gather over fsdp in `dtype`, size·(n-1)/n bytes, half of what float32 takes.
    Backward: reduce-scatter of the gradients in `dtype`, as many. Gains stay float32.
    """

    def leaf(p: Param, x: Array | Deferred) -> Array | Deferred:
        if isinstance(x, Deferred):
            return dataclasses.replace(x, array=leaf(p, x.array))
        if p.matrix:
            x = x.astype(dtype)
        dim = fsdp_dim(p)
        whole = dim is None or x.shape[dim] == p.shape[dim]
        return x if whole else all_gather(x, FSDP, dim)

    return map_params(leaf, declared, params)


def gather_ahead(params: Tree, declared: Tree, dtype: jnp.dtype) -> Tree:
    """All weights that fsdp shards, whole and in the compute type, for all uses of a step.

    Layout and bytes as in `unshard`, but once a step instead of twice a microbatch; the price is
    that the device holds its layers' weights whole, and their gradients in float32.
    """

    def leaf(p: Param, x: Array) -> Array:
        return x if fsdp_dim(p) is None else all_gather(x.astype(dtype), FSDP, fsdp_dim(p))

    return map_params(leaf, declared, params)


def scatter_gradients(grads: Tree, declared: Tree) -> Tree:
    """The gradients of weights that `gather_ahead` gathered, summed over fsdp, each its shard.

    Moves: a reduce-scatter in float32 once a step, size·(n-1)/n bytes. Not differentiated.
    """

    def leaf(p: Param, g: Array) -> Array:
        return g if fsdp_dim(p) is None else reduce_scatter(g, FSDP, fsdp_dim(p))

    return map_params(leaf, declared, grads)


@jax.named_scope('sum_gradients')
def sum_gradients(grads: Tree, declared: Tree) -> Tree:
    """Sums each gradient over the axes that do not shard its parameter; once per step.

    Layout: each device's own -> the sum, alike on all devices of those axes.
    Moves: one all-reduce a leaf, 2·size·(n-1)/n bytes. Not differentiated.
    """
    return map_params(lambda p, g: lax.psum(g, free_axes(p.spec)), declared, grads)


@named_by_axis
def replicate(x: Array, axis: Axis, dim: int) -> Array:
    """Layout: dim/n -> dim, alike on all devices of the axis, for results that leave the step.

    Moves: an all-reduce, 2·size bytes, since that is what makes values count as replicated. Not
    differentiated.
    """
    size, n = x.shape[dim], lax.axis_size(axis)
    whole = jnp.zeros_like(x, shape=(*x.shape[:dim], n * size, *x.shape[dim + 1 :]))
    start = lax.axis_index(axis) * size
    return lax.psum(lax.dynamic_update_slice_in_dim(whole, x, start, dim), axis)


@jax.named_scope('global_sum')
def global_sum(x: Array) -> Array:
    """Layout: each device's share -> the sum of all devices', alike on all of them.

    Moves: an all-reduce over the mesh, 2·size bytes. Not differentiated: it ends the step.
    """
    return lax.psum(x, AXES)


def global_sum_of_squares(tree: Tree, declared: Tree) -> Array:
    """The sum of squares over a whole sharded tree: float32 scalar, alike on all devices.

    Each device adds its shards, a replicated leaf at 1/copies, so that one all-reduce of a single
    number does.
    """

    def leaf(p: Param, x: Array) -> Array:
        free = free_axes(p.spec)
        return varying(jnp.sum(jnp.square(x)) / lax.axis_size(free), free)

    return global_sum(sum(jax.tree.leaves(map_params(leaf, declared, tree))))


if __name__ == '__main__':
    from pipeline import schedules

    schedules.run_command()
