"""The experts' SwiGLU on rows that are grouped by expert, and the kernels that compute it.

EXPERT_KERNELS lists them. On CPU a loop over each expert's blocks of rows, which works on any
platform, since there a `lax.ragged_dot` is 14 times slower; on TPU `lax.ragged_dot`, or jax's
Megablox; on GPU two matmuls in Pallas (Triton). On GPU `ragged_dot` has no kernel: XLA copies the
rows once per expert, with zeros in place of the others', and multiplies them all, E times the
matmuls.

Matrices are one device's: w_gate and w_up [E/ep, D, F/tp], w_down [E/ep, F/tp, D]. With
model.expert_bias each has a bias, b_gate, b_up [E/ep, F/tp] and b_down [E/ep, D], in float32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from config import HIDDEN
from layers import float8
from layers.dense import gated
from layers.float8 import Quantized
from layers.kernels import Kernel, never
from parallel import Array, Tree

BIASES = ('b_gate', 'b_up', 'b_down')
BLOCK = 288  # the most rows of a block of the loop; rows of no expert that follow the grouped ones


def block_behind(_: int) -> int:
    """Returns BLOCK: room for a last block that is not full."""
    return BLOCK


class Grouped(NamedTuple):
    """The two passes of a kernel, and the rows of no group that it wants behind so many.

    forward: (x_XD, w, sizes_e, limit) -> y_XD, gate_Xf, up_Xf; `limit` as `dense.gated` takes it.
    backward: (x_XD, w, sizes_e, gate_Xf, up_Xf, dy_XD, limit) -> dx_XD, dw.
    """

    forward: Callable[..., tuple[Array, Array, Array]]
    backward: Callable[..., tuple[Array, Tree]]
    behind: Callable[[int], int] = block_behind


# Its derivative is the kernel's own backward: change both. tests/test_derivatives.py compares those
# of 'blocks' with autodiff, tests/test_moe.py those of the other kernels with 'blocks'.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_swiglu(x_XD: Array, w: Tree, sizes_e: Array, kernel: str, limit: float = 0.0) -> Array:
    """Runs each row through the SwiGLU of its group: [X, D] -> the same, a partial sum over tp.

    The first sizes[0] rows meet w_gate[0], w_up[0] and w_down[0], and so on, and their biases if
    there are any. x_XD ends with the kernel's `behind` rows of no group; results there are
    undefined.
    """
    return _grouped_forward(x_XD, w, sizes_e, kernel, limit)[0]


def _grouped_forward(x_XD: Array, w: Tree, sizes_e: Array, kernel: str, limit: float):
    y_XD, gate_Xf, up_Xf = EXPERT_KERNELS[kernel].compute.forward(x_XD, w, sizes_e, limit)
    gate_Xf, up_Xf = checkpoint_name((gate_Xf, up_Xf), HIDDEN)
    return y_XD, (x_XD, w, sizes_e, gate_Xf, up_Xf)


def _grouped_backward(kernel: str, limit: float, saved: tuple, dy_XD: Array):
    dx_XD, dw = EXPERT_KERNELS[kernel].compute.backward(*saved, dy_XD, limit)
    return dx_XD, float8.gradients(saved[1], dw), None


grouped_swiglu.defvjp(_grouped_forward, _grouped_backward)

# ---------------------------------------------------------------------------------------------
# By a loop over blocks of rows
# ---------------------------------------------------------------------------------------------

# As many blocks as each expert has: the arrays between the matmuls stay in the cache, and each
# expert's matrices are fetched once.


def _block_rows(rows: int, groups: int) -> int:
    """Returns the rows of a block: an eighth more than an average group has, or than an even part
    of that, so that groups near the average take no further block for their last few rows."""
    if _few(rows, groups):
        return 8
    roomy = max(rows * 9 // (groups * 8), 32)
    parts = -(-roomy // BLOCK)
    return min(BLOCK, -(-roomy // (parts * 16)) * 16)


def _few(rows: int, groups: int) -> bool:
    """Returns whether most groups have no row or one, as in decoding."""
    return rows <= 4 * groups


def _blocks_of(size: Array, rows: int) -> Array:
    return -(-size // rows)


def _rows_at(arrays: Tree, start: Array, rows: int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows), arrays)


def _put_rows(arrays: Tree, start: Array, values: Tree) -> Tree:
    """Writes rows from `start` on. A last block that is not full spills into the rows of the next
    group, which are written later."""

    def put(x: Array, v: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, v, start, 0)

    return jax.tree.map(put, arrays, values)


def _plus(y: Array, w: Tree, name: str) -> Array:
    """Adds a bias, if there is one, in float32."""
    return (y + w[name]).astype(y.dtype) if name in w else y


def _roundings(w: Tree) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Returns how the rows that meet these matrices are rounded, and the gradients of rows.

    The loop multiplies the rounded numbers in the compute type, which holds them exactly.
    """
    if float8.is_quantized(w['w_down']):
        return float8.as_e4m3, float8.as_e5m2
    return float8.unchanged, float8.unchanged


def _blocked_forward(
    x_XD: Array, w: Tree, sizes_e: Array, limit: float
) -> tuple[Array, Array, Array]:
    """Runs each expert over its blocks of rows: the result, and both factors of the product."""
    low = _roundings(w)[0]
    w = {name: float8.gathered(x) for name, x in w.items()}
    n_rows, n_groups = x_XD.shape[0] - BLOCK, len(sizes_e)
    rows, few = _block_rows(n_rows, n_groups), _few(n_rows, n_groups)

    def expert(out: Tree, scanned: tuple):
        w_e, start, size = scanned

        def block(i: Array, out: Tree) -> Tree:
            # a copy either way: of what is used, or once per group
            m = jax.tree.map(lambda x: x[w_e], w) if few else w_e
            x = low(_rows_at(x_XD, start + i * rows, rows))
            gate, up = (_plus(x @ m[f'w_{name}'], m, f'b_{name}') for name in ('gate', 'up'))
            y = _plus(low(gated(gate, up, limit)) @ m['w_down'], m, 'b_down')
            return _put_rows(out, start + i * rows, (y, gate, up))

        return lax.fori_loop(0, _blocks_of(size, rows), block, out), None

    empty = [jnp.zeros_like(x_XD, shape=(x_XD.shape[0], w['w_gate'].shape[2])) for _ in range(2)]
    scanned = (jnp.arange(n_groups) if few else w, jnp.cumsum(sizes_e) - sizes_e, sizes_e)
    return lax.scan(expert, (jnp.zeros_like(x_XD), *empty), scanned)[0]


def _blocked_backward(
    x_XD: Array, w: Tree, sizes_e: Array, gate_Xf: Array, up_Xf: Array, dy_XD: Array, limit: float
) -> tuple[Array, Tree]:
    low, low_d = _roundings(w)
    w = {name: float8.gathered(x) for name, x in w.items()}
    rows = _block_rows(x_XD.shape[0] - BLOCK, len(sizes_e))
    gradient = functools.partial(
        jnp.einsum, 'xi,xo->io', preferred_element_type=jnp.float32
    )  # added up over blocks in float32

    def expert(dx_XD: Array, scanned: tuple):
        m, start, size = scanned

        def block(i: Array | int, dx_XD: Array) -> tuple[Array, Tree]:
            row = start + i * rows
            x, gate, up, dy = _rows_at((x_XD, gate_Xf, up_Xf, dy_XD), row, rows)
            dy = jnp.where(i * rows + jnp.arange(rows)[:, None] < size, dy, 0)
            h, pull = jax.vjp(lambda gate, up: gated(gate, up, limit), gate, up)
            sides = {'b_down': dy}
            dy = low_d(dy)
            sides['b_gate'], sides['b_up'] = dgate, dup = pull(dy @ m['w_down'].T)
            x, h, dgate, dup = low(x), low(h), low_d(dgate), low_d(dup)
            dx = dgate @ m['w_gate'].T + dup @ m['w_up'].T
            dw = {'w_gate': gradient(x, dgate), 'w_up': gradient(x, dup), 'w_down': gradient(h, dy)}
            db = {n: jnp.sum(sides[n], axis=0, dtype=jnp.float32) for n in BIASES if n in m}
            return _put_rows(dx_XD, row, dx), dw | db

        def add_block(i: Array, carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
            dx_XD, dw = block(i, carry[0])
            return dx_XD, jax.tree.map(jnp.add, carry[1], dw)

        # The first block, of a group without rows too, spares zeros to add to.
        carry = lax.fori_loop(1, _blocks_of(size, rows), add_block, block(0, dx_XD))
        return carry[0], jax.tree.map(lambda g, x: g.astype(x.dtype), carry[1], m)

    scanned = (w, jnp.cumsum(sizes_e) - sizes_e, sizes_e)
    return lax.scan(expert, jnp.zeros_like(x_XD), scanned)


# ---------------------------------------------------------------------------------------------
# By grouped matmuls
# ---------------------------------------------------------------------------------------------


def by_matmuls(
    multiply: Callable[..., Array],
    sum_rows: Callable[..., Array],
    behind: Callable[[int], int] = block_behind,
) -> Grouped:
    """Returns both passes, made of (rows, matrices, sizes, transposed, dtype) and (rows, d, sizes,
    dtype), whose results are of the type `dtype`."""

    def matmul(x_XI: Array, w: Array | Quantized, sizes_e: Array) -> Array:
        if float8.is_quantized(w):
            groups_X = _groups(x_XI, sizes_e)
            return float8.grouped(multiply, x_XI, w, sizes_e, groups_X, float8.E4M3)
        return multiply(x_XI, w, sizes_e, False, x_XI.dtype)

    def back(d_XO: Array, w: Array | Quantized, sizes_e: Array) -> Array:
        if float8.is_quantized(w):
            groups_X = _groups(d_XO, sizes_e)
            return float8.grouped(multiply, d_XO, w, sizes_e, groups_X, float8.E5M2, True)
        return multiply(d_XO, w, sizes_e, True, d_XO.dtype)

    def gradient(x_XI: Array, d_XO: Array, sizes_e: Array, w: Array | Quantized) -> Array:
        if float8.is_quantized(w):
            return float8.grouped_gradient(sum_rows, x_XI, d_XO, sizes_e)
        return sum_rows(x_XI, d_XO, sizes_e, x_XI.dtype)

    def forward(x_XD: Array, w: Tree, sizes_e: Array, limit: float) -> tuple[Array, Array, Array]:
        b_X = {name: b[_groups(x_XD, sizes_e)] for name, b in w.items() if name in BIASES}
        gate_Xf, up_Xf = (
            _plus(matmul(x_XD, w[f'w_{name}'], sizes_e), b_X, f'b_{name}')
            for name in ('gate', 'up')
        )
        y_XD = matmul(gated(gate_Xf, up_Xf, limit), w['w_down'], sizes_e)
        return _plus(y_XD, b_X, 'b_down'), gate_Xf, up_Xf

    def backward(
        x_XD: Array,
        w: Tree,
        sizes_e: Array,
        gate_Xf: Array,
        up_Xf: Array,
        dy_XD: Array,
        limit: float,
    ) -> tuple[Array, Tree]:
        h_Xf, pull = jax.vjp(lambda gate, up: gated(gate, up, limit), gate_Xf, up_Xf)
        dgate_Xf, dup_Xf = pull(back(dy_XD, w['w_down'], sizes_e))
        dx_XD = back(dgate_Xf, w['w_gate'], sizes_e) + back(dup_Xf, w['w_up'], sizes_e)
        dw = {
            'w_gate': gradient(x_XD, dgate_Xf, sizes_e, w['w_gate']),
            'w_up': gradient(x_XD, dup_Xf, sizes_e, w['w_up']),
            'w_down': gradient(h_Xf, dy_XD, sizes_e, w['w_down']),
        }
        sides = dict(zip(BIASES, (dgate_Xf, dup_Xf, dy_XD), strict=True))
        ones_X1 = jnp.ones_like(x_XD[:, :1])  # a bias is a matrix for one number, which is 1
        db = {
            name: sum_rows(ones_X1, d, sizes_e, x_XD.dtype)[:, 0]
            for name, d in sides.items()
            if name in w
        }
        return dx_XD, dw | {name: g.astype(w[name].dtype) for name, g in db.items()}

    return Grouped(forward, backward, behind)


def _groups(x_X: Array, sizes_e: Array) -> Array:
    """Returns the group of each row, int32 [X]; the number of groups for rows of none."""
    ends_e, rows = jnp.cumsum(sizes_e), jnp.arange(len(x_X))
    return jnp.searchsorted(ends_e, rows, side='right', method='compare_all')


def _ragged_matmul(
    x_XD: Array, w_eDf: Array, sizes_e: Array, transposed: bool, dtype: jnp.dtype
) -> Array:
    w_eDf = w_eDf.swapaxes(1, 2) if transposed else w_eDf
    return lax.ragged_dot(x_XD, w_eDf, sizes_e, preferred_element_type=dtype)


def _ragged_gradient(x_XD: Array, d_Xf: Array, sizes_e: Array, dtype: jnp.dtype) -> Array:
    groups = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(x_XD, d_Xf, sizes_e, groups, preferred_element_type=dtype)


# ---------------------------------------------------------------------------------------------
# Megablox, on TPU
# ---------------------------------------------------------------------------------------------

# jax's grouped matmuls in Pallas. Beside those that XLA makes of `ragged_dot`, they write the type
# of the rows and not float32, and read matrices transposed without a copy; and every libtpu has
# them, where 0.0.52 multiplies all rows by all matrices on v5e, v6e and TPU7x.

MEGABLOX_ROWS, MEGABLOX_SIDE = 256, 1024  # of a tile; sides of matrices, or whole ones


def megablox_behind(rows: int) -> int:
    """Returns how many rows fill up the last tile."""
    return -rows % MEGABLOX_ROWS


def _tiles(*sides: int) -> tuple[int, int, int]:
    first, second = (min(side, MEGABLOX_SIDE) for side in sides)
    return MEGABLOX_ROWS, first, second


def _in_bfloat16(x: Array) -> Array:
    """Returns numbers of 8 bits, which Megablox does not multiply, in bfloat16: exact."""
    return x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x


def megablox_matmul(
    x_XD: Array,
    w_eDf: Array,
    sizes_e: Array,
    transposed: bool,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> Array:
    """Computes what `grouped_matmul` does, below."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    x_XD, w_eDf = _in_bfloat16(x_XD), _in_bfloat16(w_eDf)
    sides = w_eDf.shape[:0:-1] if transposed else w_eDf.shape[1:]
    return gmm(
        x_XD, w_eDf, sizes_e, dtype, _tiles(*sides), transpose_rhs=transposed, interpret=interpret
    )


def megablox_gradient(
    x_XD: Array, d_Xf: Array, sizes_e: Array, dtype: jnp.dtype, interpret: bool = False
) -> Array:
    """Computes what `grouped_gradient` does, below."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_XD, d_Xf = _in_bfloat16(x_XD), _in_bfloat16(d_Xf)
    tiles = _tiles(x_XD.shape[1], d_Xf.shape[1])
    return tgmm(x_XD.swapaxes(0, 1), d_Xf, sizes_e, dtype, tiles, interpret=interpret)


# ---------------------------------------------------------------------------------------------
# Grouped matmuls in Pallas
# ---------------------------------------------------------------------------------------------

# By tiles of rows of one group (MegaBlocks, Gale et al. 2023). A tile starts where its group does,
# not at a multiple of its size, so groups need no padding; the last tile of a group does not write
# the rows of the next.

ROWS, COLUMNS = 128, 128  # of a tile
WARPS, STAGES = 8, 3  # by ptxas for sm_90a: 98 registers per thread, none spilled; 96 KiB shared


def grouped_matmul(
    x_XD: Array,
    w_eDf: Array,
    sizes_e: Array,
    transposed: bool,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> Array:
    """Multiplies each row by the matrix of its group, in float32, rounded to `dtype`: [X, D]
    -> [X, F/tp]; or by its transpose, [X, F/tp] -> [X, D].

    Does not write the rows beyond the groups, of which there must be ROWS.
    """
    from jax.experimental import pallas as pl

    X, e = len(x_XD), len(sizes_e)
    f = w_eDf.shape[1 if transposed else 2]
    tiles_e = -(-sizes_e // ROWS)
    tile_ends_e, group_ends_e = jnp.cumsum(tiles_e), jnp.cumsum(sizes_e)
    tiles = jnp.arange(-(-X // ROWS) + e)  # the most there can be; the last ones have no rows
    expert_of_tile = jnp.searchsorted(tile_ends_e, tiles, side='right', method='compare_all')
    expert_of_tile = jnp.minimum(expert_of_tile, e - 1).astype(jnp.int32)
    number = tiles - (tile_ends_e - tiles_e)[expert_of_tile]
    start_of_tile = (group_ends_e - sizes_e)[expert_of_tile] + number * ROWS
    kernel = functools.partial(_matmul_kernel, transposed=transposed, depth=_depth(x_XD))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((X, f), dtype),
        grid=(len(tiles), pl.cdiv(f, COLUMNS)),
        name='grouped_matmul',
        interpret=interpret,
        **_options(interpret),
    )(expert_of_tile, start_of_tile, group_ends_e[expert_of_tile], x_XD, w_eDf)


def grouped_gradient(
    x_XD: Array, d_Xf: Array, sizes_e: Array, dtype: jnp.dtype, interpret: bool = False
) -> Array:
    """Sums xᵀ d over each group's rows, in float32, rounded to `dtype`: [E/ep, D, F/tp]."""
    from jax.experimental import pallas as pl

    D, f, e = x_XD.shape[1], d_Xf.shape[1], len(sizes_e)
    ends_e = jnp.cumsum(sizes_e)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, depth=_depth(x_XD)),
        out_shape=jax.ShapeDtypeStruct((e, D, f), dtype),
        grid=(e, pl.cdiv(D, ROWS), pl.cdiv(f, COLUMNS)),
        name='grouped_gradient',
        interpret=interpret,
        **_options(interpret),
    )(ends_e - sizes_e, ends_e, x_XD, d_Xf)


def _matmul_kernel(
    expert_of_tile, start_of_tile, end_of_tile, x_XD, w_eDf, y_Xf, *, transposed: bool, depth: int
) -> None:
    """Multiplies one tile: ROWS rows of a group by COLUMNS columns of its matrix."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    v, column = pl.program_id(0), pl.program_id(1) * COLUMNS
    expert, start, end = expert_of_tile[v], start_of_tile[v], end_of_tile[v]
    D, f = x_XD.shape[1], y_Xf.shape[1]
    in_f = (column + jnp.arange(COLUMNS)) < f

    @pl.when(start < end)
    def _():
        def step(i: Array, total: Array) -> Array:
            at = i * depth
            in_D = (at + jnp.arange(depth)) < D
            x_tile = triton.load(
                x_XD.at[pl.ds(start, ROWS), pl.ds(at, depth)], mask=in_D[None], other=0.0
            )
            if transposed:
                place, mask = (
                    (expert, pl.ds(column, COLUMNS), pl.ds(at, depth)),
                    in_f[:, None] & in_D,
                )
            else:
                place, mask = (
                    (expert, pl.ds(at, depth), pl.ds(column, COLUMNS)),
                    in_D[:, None] & in_f,
                )
            w = triton.load(w_eDf.at[place], mask=mask, other=0.0)
            return total + triton.dot(*_alike(x_tile, w.T if transposed else w))

        total = lax.fori_loop(0, pl.cdiv(D, depth), step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
        of_group = (start + jnp.arange(ROWS)) < end
        triton.store(
            y_Xf.at[pl.ds(start, ROWS), pl.ds(column, COLUMNS)],
            total.astype(y_Xf.dtype),
            mask=of_group[:, None] & in_f,
        )


def _gradient_kernel(start_e, end_e, x_XD, d_Xf, w_eDf, *, depth: int) -> None:
    """Computes one tile of one expert's gradient, a sum over the rows of its group."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    e = pl.program_id(0)
    row, column = pl.program_id(1) * ROWS, pl.program_id(2) * COLUMNS
    start, end = start_e[e], end_e[e]
    in_D = (row + jnp.arange(ROWS)) < x_XD.shape[1]
    in_f = (column + jnp.arange(COLUMNS)) < d_Xf.shape[1]

    def step(i: Array, total: Array) -> Array:
        at = start + i * depth
        of_group = ((at + jnp.arange(depth)) < end)[:, None]
        x = triton.load(
            x_XD.at[pl.ds(at, depth), pl.ds(row, ROWS)], mask=of_group & in_D, other=0.0
        )
        d = triton.load(
            d_Xf.at[pl.ds(at, depth), pl.ds(column, COLUMNS)], mask=of_group & in_f, other=0.0
        )
        return total + triton.dot(*_alike(x.T, d))

    steps = lax.div(end - start + (depth - 1), depth)
    total = lax.fori_loop(0, steps, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    place = (e, pl.ds(row, ROWS), pl.ds(column, COLUMNS))
    triton.store(w_eDf.at[place], total.astype(w_eDf.dtype), mask=in_D[:, None] & in_f)


def _alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns both tiles in one type, which Triton's matmul asks for: bfloat16, which holds both,
    where one is e4m3 and the other e5m2, so for gradients."""
    if a.dtype == b.dtype:
        return a, b
    return a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)


def _depth(x: Array) -> int:
    """Returns how many numbers are multiplied at once: 128 bytes of a row, a memory transaction."""
    return 128 // x.dtype.itemsize


def _options(interpret: bool) -> dict:
    if interpret:
        return {}
    from jax.experimental.pallas import triton

    return {'compiler_params': triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)}


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------

EXPERT_KERNELS: dict[str, Kernel] = {
    'ragged_dot': Kernel(by_matmuls(_ragged_matmul, _ragged_gradient), ('tpu',)),
    'megablox': Kernel(
        by_matmuls(megablox_matmul, megablox_gradient, megablox_behind), ('tpu',), checked=False,
        chosen=never, elsewhere='megablox_interpreted',
    ),
    'megablox_interpreted': Kernel(  # exact and slow, for tests
        by_matmuls(
            functools.partial(megablox_matmul, interpret=True),
            functools.partial(megablox_gradient, interpret=True),
            megablox_behind,
        ),
        (), checked=False,
    ),
    'pallas': Kernel(
        by_matmuls(grouped_matmul, grouped_gradient), ('gpu',), checked=False,
        elsewhere='pallas_interpreted',
    ),
    'pallas_interpreted': Kernel(  # exact and slow, for tests
        by_matmuls(
            functools.partial(grouped_matmul, interpret=True),
            functools.partial(grouped_gradient, interpret=True),
        ),
        (), checked=False,
    ),
    'blocks': Kernel(Grouped(_blocked_forward, _blocked_backward)),
}  # fmt: skip
