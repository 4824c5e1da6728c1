"""Runs a pipeline schedule inside shard_map: one scan over the ticks of a table of pipeline/schedules.py.

Every device looks up what its stage does on a tick and does it under `lax.cond`, so that an idle
slot costs nothing. Collectives over tp, fsdp and ep may stand inside such a condition, since all
devices of a stage take the same branch. Those over pp may not: two `shift`s end every tick, and
whether the head runs depends on the tick alone.

A tick: file what arrived; F; the head, if a microbatch left the last stage; B; W; send. B keeps
nothing of F but the stage's input and runs the stage forward again, so that the whole costs 4/3 of
the useful FLOPs and the activations of one microbatch at a time exist (Huang et al. 2019, 2.3).
Where a schedule splits the backward (Qi et al. 2023), B leaves weight gradients to W: see
`parallel.Deferred`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parallel import (
    AXES,
    PP,
    Array,
    Deferred,
    Param,
    Seen,
    Tree,
    all_gather,
    is_param,
    reduce_scatter,
    shift,
    varying,
)
from pipeline.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Functions:
    """What the stages compute, by the two conventions of parallel.py.

    `shared` are the parameters that every stage holds, `blocks` those of one chunk of a stage. A
    microbatch is an index: data are captured. Loss shares count with weight 1. Statistics are
    trees of arrays; they are added up over microbatches and are not differentiated.
    """

    # (shared, microbatch) -> x [..., D], the input of the first virtual stage
    first: Callable[[Tree, Array], Array]
    # (blocks, x, virtual stage, microbatch) -> x of the next, loss share, statistics
    stage: Callable[[Tree, Array, Array, Array], tuple[Array, Array, Tree]]
    # (shared, this stage's share of x [rows / stages, D], microbatch) -> loss share, statistics
    last: Callable[[Tree, Array, Array], tuple[Array, Tree]]
    # (declared, weight, input and output gradient of its linear layer) -> gradient of the weight
    weight_gradient: Callable[[Param, Array, Array, Array], Array]


class Sums(NamedTuple):
    """What adds up over the ticks, on each device its own. Gradients are updated in place."""

    shared: Tree
    blocks: list[Array]  # the leaves
    loss: Array
    stage: Tree  # statistics of `stage`: [chunks, ...]
    last: Tree  # statistics of `last`


class State(NamedTuple):
    """What a tick leaves to the next. A ring has its slots in front."""

    x_ring: Array
    g_ring: Array
    s_ring: Tree  # for each deferred weight the inputs and the output gradients of its layers
    x_arriving: Array
    g_arriving: Array
    sums: Sums


@dataclasses.dataclass(frozen=True)
class Context:
    """What is the same on all ticks."""

    schedule: Schedule
    functions: Functions
    shared: Tree
    blocks: list[Array]  # leaves [chunks, blocks of a chunk, ...]
    declared: list[Param]  # of a block, one for each of the leaves
    structure: jax.tree_util.PyTreeDef  # of a block

    @property
    def deferred(self) -> list[int]:
        """The leaves whose gradients are left to W."""
        if not self.schedule.split:
            return []
        return [i for i, p in enumerate(self.declared) if p.linear]

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(self.functions.first, self.shared, 0)

    def chunk(self, unit: Array) -> Array | int:
        return unit // self.schedule.microbatches if self.schedule.chunks > 1 else 0

    def stage(self, leaves: list[Array | Deferred], x: Array, unit: Array):
        virtual = self.chunk(unit) * self.schedule.stages + lax.axis_index(PP)
        blocks = jax.tree.unflatten(self.structure, leaves)
        return self.functions.stage(blocks, x, virtual, unit % self.schedule.microbatches)

    def shapes(self) -> tuple[Tree, tuple]:
        """Of the sinks of the deferred weights, and of what `stage` returns."""
        seen = {i: Seen() for i in self.deferred}

        def trace(leaves: list[Array]):
            leaves = [
                Deferred(leaf, None, seen[i]) if i in seen else leaf
                for i, leaf in enumerate(leaves)
            ]
            return self.stage(leaves, _zeros(self.x), 0)

        results = jax.eval_shape(trace, _at(self.blocks, 0))
        unused = [i for i in seen if seen[i].sink is None]
        if unused:
            raise ValueError(
                f'parameters {unused} of a block are declared with linear=True, but no linear '
                f'layer uses them: {[self.declared[i].shape for i in unused]}; leave it out'
            )
        return {i: seen[i].sink for i in seen}, results


def _zeros(shapes: Tree, *front: int) -> Tree:
    return jax.tree.map(lambda s: varying(jnp.zeros((*front, *s.shape), s.dtype), AXES), shapes)


def _at(tree: Tree, index: Array | int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _add(sums: Tree, values: Tree) -> Tree:
    return jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, values)


def _add_at(sums: Tree, index: Array | int, values: Tree) -> Tree:
    return jax.tree.map(lambda s, v: s.at[index].add(v.astype(s.dtype)), sums, values)


def _put(ring: Tree, slot: Array, value: Tree) -> Tree:
    put = lambda r, v: lax.dynamic_update_index_in_dim(r, v, slot, 0)  # noqa: E731
    return jax.tree.map(put, ring, value)


def _file(ring: Array, slot: Array, value: Array) -> Array:
    """Writes to a slot of the ring; slot -1 writes nothing."""
    at = jnp.maximum(slot, 0)
    value = jnp.where(slot >= 0, value, _at(ring, at))
    return _put(ring, at, value)


def _after(x: Array, done: Tree, row: dict[str, Array]) -> Array:
    """x, but not before all of `done` is computed: so that collectives keep their order.

    XLA:CPU runs what is independent in any order, also a collective and a condition that holds
    others; two devices of a group could then wait for each other in different ones for ever. The
    select depends on both, and only we know that no tick is negative. A barrier would not do: the
    compiler drops it before it emits code.
    """
    first = [jnp.ravel(leaf)[0].astype(jnp.float32) for leaf in jax.tree.leaves(done)]
    return jnp.where(row['tick'] < 0, sum(first).astype(x.dtype), x)


def _rows(schedule: Schedule) -> dict[str, Array]:
    """What the scan reads: this stage's columns of the tables, and the head's; [ticks] each.

    tick: from 0. f, b, w, head: units and microbatches. The rest are ring slots, -1 where nothing
    is done: those that F, B and W use, and those that x and g are filed in when they arrive.
    """
    stages = np.arange(schedule.stages)

    def slots(ring: str, units: np.ndarray) -> np.ndarray:
        slot = getattr(schedule, f'{ring}_slot')[stages, np.maximum(units, 0)]
        return np.where(units >= 0, slot, -1)

    head = schedule.head[:, None]
    leaving = np.where(head >= 0, head + schedule.units - schedule.microbatches, -1)
    entering = (schedule.f < schedule.microbatches) & (stages == 0)
    tables = {
        'tick': np.arange(schedule.ticks)[:, None] + 0 * stages,
        'f': schedule.f, 'b': schedule.b, 'w': schedule.w,
        'f_x': slots('x', schedule.f), 'b_x': slots('x', schedule.b),
        'b_g': slots('g', schedule.b), 'b_s': slots('s', schedule.b), 'w_s': slots('s', schedule.w),
        'x_in': slots('x', schedule.x_arrival), 'g_in': slots('g', schedule.g_arrival),
        'x_first': np.where(entering, slots('x', schedule.f), -1),
        'g_head': np.where(stages == schedule.stages - 1, slots('g', leaving), -1),
    }  # fmt: skip
    stage, others = lax.axis_index(PP), tuple(axis for axis in AXES if axis != PP)
    rows = {k: varying(jnp.asarray(v, jnp.int32)[:, stage], others) for k, v in tables.items()}
    return rows | {'head': jnp.asarray(schedule.head, jnp.int32)}


@jax.named_scope('forward')
def _forward(ctx: Context, state: State, row: dict[str, Array]) -> tuple[State, Array]:
    """F: files the embedding on the first virtual stage, then runs the stage."""
    x = lax.cond(
        row['x_first'] >= 0,
        lambda: ctx.functions.first(ctx.shared, row['f']),
        lambda: _zeros(ctx.x),
    )
    x_ring = _file(state.x_ring, row['x_first'], x)

    def run() -> Array:
        blocks = _at(ctx.blocks, ctx.chunk(row['f']))
        return ctx.stage(blocks, _at(x_ring, row['f_x']), row['f'])[0]

    return state._replace(x_ring=x_ring), lax.cond(row['f'] >= 0, run, lambda: _zeros(ctx.x))


@jax.named_scope('head')
def _head(ctx: Context, state: State, row: dict[str, Array], y: Array) -> State:
    """Head and loss of the microbatch that leaves the last virtual stage, a share on each stage.

    Layout: y on the last stage -> rows/stages of it on each, and the gradient back. Moves: a
    reduce-scatter and an all-gather over pp, size·(n-1)/n bytes each.
    """
    stages = ctx.schedule.stages
    is_last = lax.axis_index(PP) == stages - 1

    def run(sums: Sums) -> tuple[Sums, Array]:
        rows = jnp.where(is_last, y, 0).reshape(-1, y.shape[-1])
        share = reduce_scatter(rows, PP, 0)
        last = lambda shared, x: ctx.functions.last(shared, x, row['head'])  # noqa: E731
        if not ctx.schedule.trains:
            loss, statistics = last(ctx.shared, share)
            d_rows = rows
        else:
            loss, pull, statistics = jax.vjp(last, ctx.shared, share, has_aux=True)
            d_shared, d_share = pull(jnp.ones_like(loss))
            sums = sums._replace(shared=_add(sums.shared, d_shared))
            d_rows = all_gather(d_share, PP, 0)
        sums = sums._replace(loss=sums.loss + loss, last=_add(sums.last, statistics))
        return sums, d_rows.reshape(y.shape)

    sums, g = lax.cond(row['head'] >= 0, run, lambda sums: (sums, _zeros(ctx.x)), state.sums)
    return state._replace(g_ring=_file(state.g_ring, row['g_head'], g), sums=sums)


@jax.named_scope('backward')
def _backward(ctx: Context, state: State, row: dict[str, Array]) -> tuple[State, Array]:
    """B: gradients of the stage's input and of the parameters that are not deferred, and what W
    takes; on the first virtual stage, those of the embedding as well."""
    unit = row['b']

    def run(sums: Sums, s_ring: Tree) -> tuple[Sums, Tree, Array]:
        chunk = ctx.chunk(unit)
        weights = dict(enumerate(_at(ctx.blocks, chunk)))
        plain = {i: w for i, w in weights.items() if i not in s_ring}
        sinks = jax.tree.map(lambda ring: jnp.zeros_like(ring[0]), s_ring)

        def stage(plain: dict, sinks: dict, x: Array) -> tuple[tuple[Array, Array], Tree]:
            later = {i: Deferred(weights[i], sink) for i, sink in sinks.items()}
            leaves = [(plain | later)[i] for i in weights]
            y, loss, statistics = ctx.stage(leaves, x, unit)
            return (y, loss), statistics

        x, g = _at(state.x_ring, row['b_x']), _at(state.g_ring, row['b_g'])
        (_, loss), pull, statistics = jax.vjp(stage, plain, sinks, x, has_aux=True)
        d_plain, saved, dx = pull((g, jnp.ones_like(loss)))
        blocks = [
            _add_at(total, chunk, d_plain[i]) if i in d_plain else total
            for i, total in enumerate(sums.blocks)
        ]
        statistics = _add_at(sums.stage, chunk, statistics)
        sums = sums._replace(blocks=blocks, loss=sums.loss + loss, stage=statistics)
        return sums, _put(s_ring, row['b_s'], saved), dx

    def embed(sums: Sums) -> Sums:
        _, pull = jax.vjp(lambda shared: ctx.functions.first(shared, unit), ctx.shared)
        return sums._replace(shared=_add(sums.shared, pull(dx)[0]))

    skip = lambda sums, s_ring: (sums, s_ring, _zeros(ctx.x))  # noqa: E731
    sums, s_ring, dx = lax.cond(unit >= 0, run, skip, state.sums, state.s_ring)
    leaves = (unit >= 0) & (unit < ctx.schedule.microbatches) & (lax.axis_index(PP) == 0)
    sums = lax.cond(leaves, embed, lambda sums: sums, sums)
    return state._replace(s_ring=s_ring, sums=sums), dx


@jax.named_scope('weight_gradients')
def _weights(ctx: Context, state: State, row: dict[str, Array]) -> State:
    """W: the gradients of the deferred weights, block by block; they add up in place."""

    def run(totals: dict[int, Array]) -> dict[int, Array]:
        chunk, saved = ctx.chunk(row['w']), _at(state.s_ring, row['w_s'])

        def add(block: Array, totals: dict[int, Array]) -> dict[int, Array]:
            for i, (x, dy) in saved.items():
                gradient = ctx.functions.weight_gradient(
                    ctx.declared[i], ctx.blocks[i][chunk, block], x[block], dy[block]
                )
                totals[i] = totals[i].at[chunk, block].add(gradient)
            return totals

        return lax.fori_loop(0, ctx.blocks[0].shape[1], add, totals)

    totals = {i: state.sums.blocks[i] for i in state.s_ring}
    totals = lax.cond(row['w'] >= 0, run, lambda totals: totals, totals)
    blocks = [totals.get(i, total) for i, total in enumerate(state.sums.blocks)]
    return state._replace(sums=state.sums._replace(blocks=blocks))


def _tick(ctx: Context, state: State, row: dict[str, Array]) -> State:
    x_ring = _file(state.x_ring, row['x_in'], state.x_arriving)
    g_ring = _file(state.g_ring, row['g_in'], state.g_arriving)
    state, y = _forward(ctx, state._replace(x_ring=x_ring, g_ring=g_ring), row)
    if ctx.schedule.trains:
        if ctx.schedule.head_before_b:
            state = _head(ctx, state, row, y)
        else:
            row['b'] = _after(row['b'], y, row)
        state, dx = _backward(ctx, state, row)
        if ctx.schedule.split:
            row['w'] = _after(row['w'], state.sums.shared, row)
            state = _weights(ctx, state, row)
        y = _after(y, (state.sums.shared, state.sums.blocks), row)
    if not ctx.schedule.trains or not ctx.schedule.head_before_b:
        state = _head(ctx, state, row, y)
        y = _after(y, (state.g_ring, state.sums.last), row)
    x_arriving = shift(y, PP, 1)
    if not ctx.schedule.trains:
        return state._replace(x_arriving=x_arriving)
    g_arriving = shift(_after(dx, x_arriving, row), PP, -1)
    return state._replace(x_arriving=x_arriving, g_arriving=g_arriving)


def _start(ctx: Context) -> State:
    """Empty rings and zero sums. Raises ValueError if the rows do not divide among the stages."""
    stages, x = ctx.schedule.stages, ctx.x
    rows = math.prod(x.shape[:-1])
    if rows % stages:
        raise ValueError(
            f'a microbatch has {rows} tokens on a device, which the {stages} stages that share the '
            f'head do not divide; use a multiple of {stages}'
        )
    sinks, (_, loss, statistics) = ctx.shapes()
    share = jax.ShapeDtypeStruct((rows // stages, x.shape[-1]), x.dtype)
    last = jax.eval_shape(lambda p: ctx.functions.last(p, _zeros(share), 0)[1], ctx.shared)

    def gradients(tree: Tree) -> Tree:
        return _zeros(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), tree))

    n_blocks, depth = ctx.blocks[0].shape[1], ctx.schedule.s_depth
    return State(
        x_ring=_zeros(x, ctx.schedule.x_depth),
        g_ring=_zeros(x, ctx.schedule.g_depth),
        s_ring=_zeros(sinks, depth, n_blocks),
        x_arriving=_zeros(x),
        g_arriving=_zeros(x),
        sums=Sums(
            shared=gradients(ctx.shared),
            blocks=gradients(ctx.blocks),
            loss=_zeros(loss),
            stage=_zeros(statistics, ctx.schedule.chunks),
            last=_zeros(last),
        ),
    )


def run_pipeline(
    schedule: Schedule, functions: Functions, params: Tree, block: Tree
) -> tuple[Tree, Sums]:
    """One step's microbatches through the stages of `pp`: gradients, and what adds up besides.

    params: {'blocks': leaves [chunks, blocks of a chunk, ...], and others, shared}, varying over
    all axes; `block` declares the parameters of one block. The gradients have the parameters'
    structure, float32, and are this device's own: as without a pipeline, they are to be summed over
    the axes that do not shard the parameter. The same holds for the loss and the statistics.
    Raises ValueError if the mesh or the rows of a microbatch do not fit the schedule.
    """
    if lax.axis_size(PP) != schedule.stages:
        raise ValueError(
            f'the schedule has {schedule.stages} stages and the mesh pp={lax.axis_size(PP)}; '
            f'make the schedule for the mesh'
        )
    shared = {k: v for k, v in params.items() if k != 'blocks'}
    leaves, structure = jax.tree.flatten(params['blocks'])
    declared = jax.tree.leaves(block, is_leaf=is_param)
    ctx = Context(schedule, functions, shared, leaves, declared, structure)
    step = lambda state, row: (_tick(ctx, state, row), None)  # noqa: E731
    state, _ = lax.scan(step, _start(ctx), _rows(schedule))
    sums = state.sums
    return sums.shared | {'blocks': jax.tree.unflatten(structure, sums.blocks)}, sums
