"""Matmuls of rows that are grouped by expert: jax's `ragged_dot` for TPU, and kernels for GPU.

On GPU `ragged_dot` has no kernel: XLA copies the rows once for each expert, with zeros in place of
the others', and multiplies them all, E times the matmuls. The two here, in Pallas (Triton), do what
there is to do, in tiles of rows of one group (MegaBlocks, Gale et al. 2023). A tile starts where
its group does, not at a multiple of its size, so groups need no padding; the last tile of a group
does not write the rows of the next.

Dimensions as in layers/moe.py: G rows grouped by expert, E experts, D inputs, F outputs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from config import HIDDEN
from layers.dense import gated
from parallel import Array, Tree

EXPERT_KERNELS = ('blocks', 'ragged_dot', 'pallas')


ROWS, COLUMNS = 128, 128  # of a tile


WARPS, STAGES = 8, 3  # by ptxas for sm_90a: 98 registers a thread, none spilled; 96 KiB shared


def choose_expert_kernel(name: str, platform: str, check_vma: bool) -> str:
    """What model.expert_kernel means on devices of this platform.

    'auto' is ragged_dot on TPU, pallas on GPU, and layers/moe.py's loop over blocks of rows on CPU, and on
    GPU where shard_map checks replication types, which the kernels do not carry. 'pallas' on
    another platform than GPU is interpreted: exact and slow, for tests.
    """
    if name == 'auto':
        name = {'tpu': 'ragged_dot', 'gpu': 'blocks' if check_vma else 'pallas'}.get(
            platform, 'blocks'
        )
    return 'pallas_interpreted' if name == 'pallas' and platform != 'gpu' else name


def grouped_matmuls(kernel: str) -> tuple[Callable, Callable]:
    """The functions `grouped_matmul` and `grouped_gradient` of a kernel."""
    if kernel == 'ragged_dot':
        return _ragged_matmul, _ragged_gradient
    interpret = {'interpret': kernel == 'pallas_interpreted'}
    return (
        functools.partial(grouped_matmul, **interpret),
        functools.partial(grouped_gradient, **interpret),
    )


def _ragged_matmul(x_GD: Array, w_EDF: Array, sizes_E: Array, transposed: bool = False) -> Array:
    return lax.ragged_dot(x_GD, w_EDF.swapaxes(1, 2) if transposed else w_EDF, sizes_E)


def _ragged_gradient(x_GD: Array, d_GF: Array, sizes_E: Array) -> Array:
    groups = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(x_GD, d_GF, sizes_E, groups)


def grouped_matmul(
    x_GD: Array, w_EDF: Array, sizes_E: Array, transposed: bool = False, interpret: bool = False
) -> Array:
    """Each row times the matrix of its group, in float32, rounded to the rows' type: [G, F]; or
    times its transpose, [G, F] -> [G, D]. Rows beyond the groups, of which there must be ROWS, are
    not written."""
    from jax.experimental import pallas as pl

    G, E = len(x_GD), len(sizes_E)
    F = w_EDF.shape[1 if transposed else 2]
    tiles_E = -(-sizes_E // ROWS)
    tile_ends_E, group_ends_E = jnp.cumsum(tiles_E), jnp.cumsum(sizes_E)
    tile_V = jnp.arange(-(-G // ROWS) + E)  # the most there can be; the last ones have no rows
    expert_V = jnp.searchsorted(tile_ends_E, tile_V, side='right', method='compare_all')
    expert_V = jnp.minimum(expert_V, E - 1).astype(jnp.int32)
    number_V = tile_V - (tile_ends_E - tiles_E)[expert_V]
    start_V = (group_ends_E - sizes_E)[expert_V] + number_V * ROWS
    kernel = functools.partial(_matmul_kernel, transposed=transposed, depth=_depth(x_GD))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((G, F), x_GD.dtype),
        grid=(len(tile_V), pl.cdiv(F, COLUMNS)),
        name='grouped_matmul',
        interpret=interpret,
        **_options(interpret),
    )(expert_V, start_V, group_ends_E[expert_V], x_GD, w_EDF)


def grouped_gradient(x_GD: Array, d_GF: Array, sizes_E: Array, interpret: bool = False) -> Array:
    """Of each group Σ xᵀ d over its rows, in float32, rounded to the rows' type: [E, D, F]."""
    from jax.experimental import pallas as pl

    D, F, E = x_GD.shape[1], d_GF.shape[1], len(sizes_E)
    ends_E = jnp.cumsum(sizes_E)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, depth=_depth(x_GD)),
        out_shape=jax.ShapeDtypeStruct((E, D, F), x_GD.dtype),
        grid=(E, pl.cdiv(D, ROWS), pl.cdiv(F, COLUMNS)),
        name='grouped_gradient',
        interpret=interpret,
        **_options(interpret),
    )(ends_E - sizes_E, ends_E, x_GD, d_GF)


def _matmul_kernel(
    expert_V, start_V, end_V, x_GD, w_EDF, y_GF, *, transposed: bool, depth: int
) -> None:
    """One tile: ROWS rows of a group times COLUMNS columns of its matrix."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    v, column = pl.program_id(0), pl.program_id(1) * COLUMNS
    e, start, end = expert_V[v], start_V[v], end_V[v]
    D, F = x_GD.shape[1], y_GF.shape[1]
    in_F = (column + jnp.arange(COLUMNS)) < F

    @pl.when(start < end)
    def _():
        def step(i: Array, sum_RC: Array) -> Array:
            at = i * depth
            in_D = (at + jnp.arange(depth)) < D
            x_RK = triton.load(
                x_GD.at[pl.ds(start, ROWS), pl.ds(at, depth)], mask=in_D[None], other=0
            )
            if transposed:
                place, mask = (e, pl.ds(column, COLUMNS), pl.ds(at, depth)), in_F[:, None] & in_D
            else:
                place, mask = (e, pl.ds(at, depth), pl.ds(column, COLUMNS)), in_D[:, None] & in_F
            w = triton.load(w_EDF.at[place], mask=mask, other=0)
            return sum_RC + triton.dot(x_RK, w.T if transposed else w)

        sum_RC = lax.fori_loop(0, pl.cdiv(D, depth), step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
        of_group = (start + jnp.arange(ROWS)) < end
        triton.store(
            y_GF.at[pl.ds(start, ROWS), pl.ds(column, COLUMNS)],
            sum_RC.astype(y_GF.dtype),
            mask=of_group[:, None] & in_F,
        )


def _gradient_kernel(start_E, end_E, x_GD, d_GF, w_EDF, *, depth: int) -> None:
    """One tile of one expert's gradient, a sum over the rows of its group."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    e = pl.program_id(0)
    row, column = pl.program_id(1) * ROWS, pl.program_id(2) * COLUMNS
    start, end = start_E[e], end_E[e]
    in_D = (row + jnp.arange(ROWS)) < x_GD.shape[1]
    in_F = (column + jnp.arange(COLUMNS)) < d_GF.shape[1]

    def step(i: Array, sum_RC: Array) -> Array:
        at = start + i * depth
        of_group = ((at + jnp.arange(depth)) < end)[:, None]
        x = triton.load(x_GD.at[pl.ds(at, depth), pl.ds(row, ROWS)], mask=of_group & in_D, other=0)
        d = triton.load(
            d_GF.at[pl.ds(at, depth), pl.ds(column, COLUMNS)], mask=of_group & in_F, other=0
        )
        return sum_RC + triton.dot(x.T, d)

    steps = lax.div(end - start + (depth - 1), depth)
    sum_RC = lax.fori_loop(0, steps, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    place = (e, pl.ds(row, ROWS), pl.ds(column, COLUMNS))
    triton.store(w_EDF.at[place], sum_RC.astype(w_EDF.dtype), mask=in_D[:, None] & in_F)


def _depth(x: Array) -> int:
    """Of what is multiplied at once: 128 bytes of a row, what a memory transaction brings."""
    return 128 // x.dtype.itemsize


def _options(interpret: bool) -> dict:
    if interpret:
        return {}
    from jax.experimental.pallas import triton

    return {'compiler_params': triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)}


BLOCK = 288  # the most rows that a block of the loop has; the padding of grouped rows


# ---------------------------------------------------------------------------------------------
# Experts: rows grouped by expert, each group through the SwiGLU of its own
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_swiglu(x_GD: Array, w: Tree, sizes_E: Array, kernel: str) -> Array:
    """Each row through the SwiGLU of its group: the first sizes[0] rows through that of
    w_gate[0], w_up[0], w_down[0], and so on. [G, D] -> the same.

    x_GD ends with at least BLOCK rows of no group; results there are undefined. By expert_kernels'
    matmuls, or on CPU, where a `lax.ragged_dot` is 14 times slower, by a loop over each expert's
    blocks of rows, as many as it has, so that what lies between the matmuls stays in the cache and
    each expert's matrices are fetched once.
    """
    return _grouped_forward(x_GD, w, sizes_E, kernel)[0]


def _grouped_forward(x_GD: Array, w: Tree, sizes_E: Array, kernel: str):
    if kernel == 'blocks':
        y_GD, gate_GF, up_GF = _blocked_forward(x_GD, w, sizes_E)
    else:
        matmul, _ = grouped_matmuls(kernel)
        gate_GF, up_GF = (matmul(x_GD, w[name], sizes_E) for name in ('w_gate', 'w_up'))
        y_GD = matmul(gated(gate_GF, up_GF), w['w_down'], sizes_E)
    gate_GF, up_GF = checkpoint_name((gate_GF, up_GF), HIDDEN)
    return y_GD, (x_GD, w, sizes_E, gate_GF, up_GF)


def _grouped_backward(kernel: str, saved: tuple, dy_GD: Array):
    if kernel == 'blocks':
        return *_blocked_backward(*saved, dy_GD), None
    x_GD, w, sizes_E, gate_GF, up_GF = saved
    matmul, gradient = grouped_matmuls(kernel)
    h_GF, pull = jax.vjp(gated, gate_GF, up_GF)
    dgate_GF, dup_GF = pull(matmul(dy_GD, w['w_down'], sizes_E, transposed=True))
    dx_GD = matmul(dgate_GF, w['w_gate'], sizes_E, transposed=True)
    dx_GD += matmul(dup_GF, w['w_up'], sizes_E, transposed=True)
    dw = {
        'w_gate': gradient(x_GD, dgate_GF, sizes_E),
        'w_up': gradient(x_GD, dup_GF, sizes_E),
        'w_down': gradient(h_GF, dy_GD, sizes_E),
    }
    return dx_GD, dw, None


grouped_swiglu.defvjp(_grouped_forward, _grouped_backward)


def _block_rows(rows: int, groups: int) -> int:
    """Rows of a block: an eighth more than those of an average group, or than an even part of it,
    so that groups near the average do not take one more block for their last few rows."""
    if _few(rows, groups):
        return 8
    roomy = max(rows * 9 // (groups * 8), 32)
    parts = -(-roomy // BLOCK)
    return min(BLOCK, -(-roomy // (parts * 16)) * 16)


def _few(rows: int, groups: int) -> bool:
    """As in decoding: most groups have no row or one."""
    return rows <= 4 * groups


def _blocks_of(size: Array, rows: int) -> Array:
    return -(-size // rows)


def _rows_at(arrays: Tree, start: Array, rows: int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows), arrays)


def _put_rows(arrays: Tree, start: Array, values: Tree) -> Tree:
    """A last block that is not full spills into the next group's rows, which are written later."""
    put = lambda x, v: lax.dynamic_update_slice_in_dim(x, v, start, 0)  # noqa: E731
    return jax.tree.map(put, arrays, values)


def _blocked_forward(x_GD: Array, w: Tree, sizes_E: Array) -> tuple[Array, Array, Array]:
    n_rows, n_groups = x_GD.shape[0] - BLOCK, len(sizes_E)
    rows, few = _block_rows(n_rows, n_groups), _few(n_rows, n_groups)

    def expert(out: Tree, scanned: tuple):
        w_e, start, size = scanned

        def block(i: Array, out: Tree) -> Tree:
            # a copy either way: of what is used, or once a group
            m = jax.tree.map(lambda x: x[w_e], w) if few else w_e
            x = _rows_at(x_GD, start + i * rows, rows)
            gate, up = x @ m['w_gate'], x @ m['w_up']
            y = gated(gate, up) @ m['w_down']
            return _put_rows(out, start + i * rows, (y, gate, up))

        return lax.fori_loop(0, _blocks_of(size, rows), block, out), None

    empty = [jnp.zeros_like(x_GD, shape=(x_GD.shape[0], w['w_gate'].shape[2])) for _ in range(2)]
    scanned = (jnp.arange(n_groups) if few else w, jnp.cumsum(sizes_E) - sizes_E, sizes_E)
    return lax.scan(expert, (jnp.zeros_like(x_GD), *empty), scanned)[0]


def _blocked_backward(
    x_GD: Array, w: Tree, sizes_E: Array, gate_GF: Array, up_GF: Array, dy_GD: Array
) -> tuple[Array, Tree]:
    rows = _block_rows(x_GD.shape[0] - BLOCK, len(sizes_E))
    gradient = functools.partial(
        jnp.einsum, 'gi,go->io', preferred_element_type=jnp.float32
    )  # added up over blocks in float32

    def expert(dx_GD: Array, scanned: tuple):
        m, start, size = scanned

        def block(i: Array | int, dx_GD: Array) -> tuple[Array, Tree]:
            row = start + i * rows
            x, gate, up, dy = _rows_at((x_GD, gate_GF, up_GF, dy_GD), row, rows)
            dy = jnp.where(i * rows + jnp.arange(rows)[:, None] < size, dy, 0)
            h, pull = jax.vjp(gated, gate, up)
            dgate, dup = pull(dy @ m['w_down'].T)
            dx = dgate @ m['w_gate'].T + dup @ m['w_up'].T
            dw = {'w_gate': gradient(x, dgate), 'w_up': gradient(x, dup)}
            return _put_rows(dx_GD, row, dx), dw | {'w_down': gradient(h, dy)}

        def add_block(i: Array, carry: tuple[Array, Tree]) -> tuple[Array, Tree]:
            dx_GD, dw = block(i, carry[0])
            return dx_GD, jax.tree.map(jnp.add, carry[1], dw)

        # The first block, of a group without rows too, spares zeros to add to.
        carry = lax.fori_loop(1, _blocks_of(size, rows), add_block, block(0, dx_GD))
        return carry[0], jax.tree.map(lambda g, x: g.astype(x.dtype), carry[1], m)

    scanned = (w, jnp.cumsum(sizes_E) - sizes_E, sizes_E)
    return lax.scan(expert, jnp.zeros_like(x_GD), scanned)
