"""Matmuls of rows that are grouped by expert: jax's `ragged_dot` for TPU, and kernels for GPU.

On GPU `ragged_dot` has no kernel: XLA copies the rows once for each expert, with zeros in place of
the others', and multiplies them all, E times the matmuls. The two here, in Pallas (Triton), do what
there is to do, in tiles of rows of one group (MegaBlocks, Gale et al. 2023). A tile starts where
its group does, not at a multiple of its size, so groups need no padding; the last tile of a group
does not write the rows of the next.

Dimensions as in moe.py: G rows grouped by expert, E experts, D inputs, F outputs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from parallel import Array

EXPERT_KERNELS = ('blocks', 'ragged_dot', 'pallas')
ROWS, COLUMNS = 128, 128  # of a tile
WARPS, STAGES = 8, 3  # by ptxas for sm_90a: 98 registers a thread, none spilled; 96 KiB shared


def choose_expert_kernel(name: str, platform: str, check_vma: bool) -> str:
    """What model.expert_kernel means on devices of this platform.

    'auto' is ragged_dot on TPU, pallas on GPU, and moe.py's loop over blocks of rows on CPU, and on
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
