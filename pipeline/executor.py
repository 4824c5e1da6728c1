"""Runs a pipeline schedule inside shard_map, as one scan over the ticks of its tables.

Every device looks up what its stage does on a tick and does it under `lax.cond`, so that idle
ticks cost nothing. Collectives over tp, fsdp and ep may stand inside such a condition, since all
devices of a stage take the same branch. Those over pp may not: two `shift`s end every tick, and
the condition under which the head runs depends on the tick alone.

A tick: file what arrived; F; the head, if a microbatch left the last stage; B; W; send. From F, B
has only the stage's input and runs the stage forward again: the step takes 4/3 of the useful FLOPs,
and the activations of one microbatch exist at a time (Huang et al. 2019, 2.3). If the schedule
splits the backward (Qi et al. 2023), B leaves weight gradients to W by `parallel.Deferred`.
pipeline/tables.py explains the terms.
"""

import dataclasses
import functools
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
from pipeline.tables import Schedule


@dataclasses.dataclass(frozen=True)
class Functions:
    """The computation of the stages, by the two conventions of parallel.py.

    `shared` are the parameters that every stage holds, `blocks` those of one chunk of a stage. A
    microbatch is an index; the functions hold the data. The sum of all loss shares is the loss.
    Statistics are trees of arrays; they are added up over microbatches and not differentiated.
    """

    # (shared, microbatch) -> x_BtD, the input of the first virtual stage
    first: Callable[[Tree, Array], Array]
    # (blocks, x_BtD, virtual stage, microbatch) -> x_BtD of the next, loss share, statistics
    stage: Callable[[Tree, Array, Array, Array], tuple[Array, Array, Tree]]
    # (shared, x_tD: this stage's 1/stages of the last output, microbatch) -> loss share, statistics
    last: Callable[[Tree, Array, Array], tuple[Array, Tree]]
    # (declared, weight, input and output gradient of its linear layer) -> gradient of the weight
    weight_gradient: Callable[[Param, Array, Array, Array], Array]


class Sums(NamedTuple):
    """Sums over the ticks, each device's own. Gradients are updated in place."""

    shared: Tree  # gradients
    blocks: list[Array]  # gradients, by leaf
    loss: Array
    stage: Tree  # statistics of `stage`: [chunks, ...]
    last: Tree  # statistics of `last`


class State(NamedTuple):
    """The values that a tick passes on to the next. A ring's first dimension is its slots."""

    x_ring: Array  # inputs of this stage
    g_ring: Array  # gradients of its outputs
    s_ring: Tree  # for each deferred weight the inputs and the output gradients of its layers
    x_arriving: Array  # from the stage before
    g_arriving: Array  # from the stage after
    sums: Sums


@dataclasses.dataclass(frozen=True)
class Context:
    """The values that are the same on all ticks."""

    schedule: Schedule
    functions: Functions
    shared: Tree
    blocks: list[Array]  # leaves [chunks, blocks of a chunk, ...]
    declared: list[Param]  # of a block, one for each leaf
    structure: jax.tree_util.PyTreeDef  # of a block

    @property
    def deferred(self) -> list[int]:
        """Indices of the leaves whose gradients W computes."""
        if not self.schedule.split:
            return []
        return [i for i, p in enumerate(self.declared) if p.linear]

    @property
    def x(self) -> jax.ShapeDtypeStruct:
        """Shape and type of x_BtD, which all stages take and return."""
        return jax.eval_shape(self.functions.first, self.shared, 0)

    def chunk(self, unit: Array) -> Array | int:
        """Returns the chunk of a unit."""
        return unit // self.schedule.microbatches if self.schedule.chunks > 1 else 0

    def stage(
        self, leaves: list[Array | Deferred], x_BtD: Array, unit: Array
    ) -> tuple[Array, Array, Tree]:
        """Runs the blocks with these leaves on the input of a unit, as `Functions.stage`."""
        virtual = self.chunk(unit) * self.schedule.stages + lax.axis_index(PP)
        blocks = jax.tree.unflatten(self.structure, leaves)
        return self.functions.stage(blocks, x_BtD, virtual, unit % self.schedule.microbatches)

    def shapes(self) -> tuple[Tree, tuple[Tree, Tree, Tree]]:
        """Returns the shapes of the deferred weights' sinks, and of the results of `stage`.

        Raises ValueError if a parameter that is declared with linear=True is in no linear layer.
        """
        seen = {i: Seen() for i in self.deferred}

        def trace(leaves: list[Array]) -> tuple[Array, Array, Tree]:
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
                f'layer uses them: {[self.declared[i].shape for i in unused]}; declare them '
                f'without it'
            )
        return {i: seen[i].sink for i in seen}, results


def _zeros(shapes: Tree, *front: int) -> Tree:
    """Returns zeros of these shapes, after the dimensions `front`; varying over all axes."""
    return jax.tree.map(lambda s: varying(jnp.zeros((*front, *s.shape), s.dtype), AXES), shapes)


def _at(tree: Tree, index: Array | int) -> Tree:
    """Returns each leaf's entry at this index of its first dimension."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _add(sums: Tree, values: Tree) -> Tree:
    """Adds values to sums, in the types of the sums."""
    return jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, values)


def _add_at(sums: Tree, index: Array | int, values: Tree) -> Tree:
    """Adds values to sums at this index of their first dimension."""
    return jax.tree.map(lambda s, v: s.at[index].add(v.astype(s.dtype)), sums, values)


def _put(ring: Tree, slot: Array, value: Tree) -> Tree:
    """Writes a value to a slot of a ring, leaf by leaf."""
    return jax.tree.map(lambda r, v: lax.dynamic_update_index_in_dim(r, v, slot, 0), ring, value)


def _file(ring: Array, slot: Array, value: Array) -> Array:
    """Writes a value to a slot of the ring; slot -1 writes nothing."""
    at = jnp.maximum(slot, 0)
    value = jnp.where(slot >= 0, value, _at(ring, at))
    return _put(ring, at, value)


def _after(x: Array, done: Tree, row: dict[str, Array]) -> Array:
    """Returns x once all of `done` is computed, so that collectives keep their order.

    XLA:CPU runs independent operations in any order, among them a collective and a condition that
    contains others: two devices of a group could wait for each other in different collectives for
    ever. The select depends on x and on `done`; the compiler cannot know that no tick is negative.
    It drops an optimization barrier before it emits code, so that would not help.
    """
    first = [jnp.ravel(leaf)[0].astype(jnp.float32) for leaf in jax.tree.leaves(done)]
    return jnp.where(row['tick'] < 0, sum(first).astype(x.dtype), x)


def _rows(schedule: Schedule) -> dict[str, Array]:
    """Returns the inputs of the scan: this stage's columns of the tables, int32 [ticks] each.

    tick: from 0. f, b, w: units; head: microbatches. The others are ring slots: those that F, B and
    W read and write, and those in which arriving x and g are filed. -1: nothing to do.
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
    """Does F: files the embedding on the first virtual stage, then runs the stage.

    Returns its output x_BtD, zeros if it is idle.
    """
    x_BtD = lax.cond(
        row['x_first'] >= 0,
        lambda: ctx.functions.first(ctx.shared, row['f']),
        lambda: _zeros(ctx.x),
    )
    x_ring = _file(state.x_ring, row['x_first'], x_BtD)

    def run() -> Array:
        blocks = _at(ctx.blocks, ctx.chunk(row['f']))
        return ctx.stage(blocks, _at(x_ring, row['f_x']), row['f'])[0]

    return state._replace(x_ring=x_ring), lax.cond(row['f'] >= 0, run, lambda: _zeros(ctx.x))


@jax.named_scope('head')
def _head(ctx: Context, state: State, row: dict[str, Array], y_BtD: Array) -> State:
    """Computes head and loss of the microbatch that leaves the last virtual stage.

    Layout: y on the last stage -> T/stages of its tokens on each, and their gradients back to the
    last stage's ring. Moves: a reduce-scatter and an all-gather over pp, size·(n-1)/n bytes each.
    """
    is_last = lax.axis_index(PP) == ctx.schedule.stages - 1

    def last(shared: Tree, x_tD: Array) -> tuple[Array, Tree]:
        return ctx.functions.last(shared, x_tD, row['head'])

    def run(sums: Sums) -> tuple[Sums, Array]:
        y_TD = jnp.where(is_last, y_BtD, 0).reshape(-1, y_BtD.shape[-1])
        y_tD = reduce_scatter(y_TD, PP, 0)
        if not ctx.schedule.trains:
            loss, statistics = last(ctx.shared, y_tD)
            g_TD = y_TD  # not read
        else:
            loss, pull, statistics = jax.vjp(last, ctx.shared, y_tD, has_aux=True)
            d_shared, g_tD = pull(jnp.ones_like(loss))
            sums = sums._replace(shared=_add(sums.shared, d_shared))
            g_TD = all_gather(g_tD, PP, 0)
        sums = sums._replace(loss=sums.loss + loss, last=_add(sums.last, statistics))
        return sums, g_TD.reshape(y_BtD.shape)

    sums, g_BtD = lax.cond(row['head'] >= 0, run, lambda sums: (sums, _zeros(ctx.x)), state.sums)
    return state._replace(g_ring=_file(state.g_ring, row['g_head'], g_BtD), sums=sums)


@jax.named_scope('backward')
def _backward(ctx: Context, state: State, row: dict[str, Array]) -> tuple[State, Array]:
    """Does B: gradients of the parameters that are not deferred, and the inputs of W.

    On the first virtual stage, gradients of the embedding as well. Returns the gradient of the
    stage's input, zeros if it is idle.
    """
    unit = row['b']

    def run(sums: Sums, s_ring: Tree) -> tuple[Sums, Tree, Array]:
        chunk = ctx.chunk(unit)
        weights = dict(enumerate(_at(ctx.blocks, chunk)))
        plain = {i: w for i, w in weights.items() if i not in s_ring}
        sinks = jax.tree.map(lambda ring: jnp.zeros_like(ring[0]), s_ring)

        def stage(plain: dict, sinks: dict, x_BtD: Array) -> tuple[tuple[Array, Array], Tree]:
            later = {i: Deferred(weights[i], sink) for i, sink in sinks.items()}
            leaves = [(plain | later)[i] for i in weights]
            y_BtD, loss, statistics = ctx.stage(leaves, x_BtD, unit)
            return (y_BtD, loss), statistics

        x_BtD, g_BtD = _at(state.x_ring, row['b_x']), _at(state.g_ring, row['b_g'])
        (_, loss), pull, statistics = jax.vjp(stage, plain, sinks, x_BtD, has_aux=True)
        d_plain, saved, dx_BtD = pull((g_BtD, jnp.ones_like(loss)))
        blocks = [
            _add_at(total, chunk, d_plain[i]) if i in d_plain else total
            for i, total in enumerate(sums.blocks)
        ]
        statistics = _add_at(sums.stage, chunk, statistics)
        sums = sums._replace(blocks=blocks, loss=sums.loss + loss, stage=statistics)
        return sums, _put(s_ring, row['b_s'], saved), dx_BtD

    def skip(sums: Sums, s_ring: Tree) -> tuple[Sums, Tree, Array]:
        return sums, s_ring, _zeros(ctx.x)

    sums, s_ring, dx_BtD = lax.cond(unit >= 0, run, skip, state.sums, state.s_ring)

    def embed(sums: Sums) -> Sums:
        _, pull = jax.vjp(lambda shared: ctx.functions.first(shared, unit), ctx.shared)
        return sums._replace(shared=_add(sums.shared, pull(dx_BtD)[0]))

    on_first = (unit >= 0) & (unit < ctx.schedule.microbatches) & (lax.axis_index(PP) == 0)
    sums = lax.cond(on_first, embed, lambda sums: sums, sums)
    return state._replace(s_ring=s_ring, sums=sums), dx_BtD


@jax.named_scope('weight_gradients')
def _weights(ctx: Context, state: State, row: dict[str, Array]) -> State:
    """Does W: adds the gradients of the deferred weights to the sums in place, block by block."""

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


def _tick(ctx: Context, state: State, row: dict[str, Array]) -> tuple[State, None]:
    """Does one tick; `row` is its row of the tables. The body of the scan."""
    x_ring = _file(state.x_ring, row['x_in'], state.x_arriving)
    g_ring = _file(state.g_ring, row['g_in'], state.g_arriving)
    state, y_BtD = _forward(ctx, state._replace(x_ring=x_ring, g_ring=g_ring), row)
    if ctx.schedule.trains:
        if ctx.schedule.head_before_b:
            state = _head(ctx, state, row, y_BtD)
        else:
            row = row | {'b': _after(row['b'], y_BtD, row)}
        state, dx_BtD = _backward(ctx, state, row)
        if ctx.schedule.split:
            row = row | {'w': _after(row['w'], state.sums.shared, row)}
            state = _weights(ctx, state, row)
        y_BtD = _after(y_BtD, (state.sums.shared, state.sums.blocks), row)
    if not ctx.schedule.trains or not ctx.schedule.head_before_b:
        state = _head(ctx, state, row, y_BtD)
        y_BtD = _after(y_BtD, (state.g_ring, state.sums.last), row)
    x_arriving = shift(y_BtD, PP, 1)
    if not ctx.schedule.trains:
        return state._replace(x_arriving=x_arriving), None
    g_arriving = shift(_after(dx_BtD, x_arriving, row), PP, -1)
    return state._replace(x_arriving=x_arriving, g_arriving=g_arriving), None


def _start(ctx: Context) -> State:
    """Returns empty rings and zero sums.

    Raises ValueError if a microbatch's tokens on a device do not divide among the stages.
    """
    stages, x = ctx.schedule.stages, ctx.x
    T, D = math.prod(x.shape[:-1]), x.shape[-1]
    if T % stages:
        raise ValueError(
            f'a microbatch has {T} tokens on a device, which the {stages} stages that share the '
            f'head do not divide; use a multiple of {stages}'
        )
    sinks, (_, loss, statistics) = ctx.shapes()
    x_tD = jax.ShapeDtypeStruct((T // stages, D), x.dtype)
    last = jax.eval_shape(lambda p: ctx.functions.last(p, _zeros(x_tD), 0)[1], ctx.shared)

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
    """Runs one step's microbatches through the stages of pp; returns gradients, and all sums.

    params: {'blocks': leaves [chunks, blocks of a chunk, ...], and others, which all stages share},
    varying over all axes. block: declares the parameters of one block.
    The gradients have the parameters' structure and are float32. They are this device's own: as
    without a pipeline, they have to be summed over the axes that do not shard the parameter. The
    same holds for the loss and the statistics.
    Raises ValueError if the mesh or the tokens of a microbatch do not fit the schedule.
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
    state, _ = lax.scan(functools.partial(_tick, ctx), _start(ctx), _rows(schedule))
    sums = state.sums
    return sums.shared | {'blocks': jax.tree.unflatten(structure, sums.blocks)}, sums
