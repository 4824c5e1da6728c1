"""Runs a pipeline schedule inside shard_map: one scan over the ticks of a table of schedules.py.

Every device looks up what its stage does on a tick and does it under `lax.cond`, so that an idle
slot costs nothing. Collectives over tp, fsdp and ep may stand inside such a condition, since all
devices of a stage take the same branch. Those over pp may not: two `shift`s end every tick, and
whether the head runs depends on the tick alone.

A tick: file what arrived; F; the head, if a microbatch left the last stage; B; W; send. B keeps
nothing of F but the stage's input and runs the stage forward again, so that the whole costs 4/3 of
the useful FLOPs and the activations of one microbatch at a time exist (Huang et al. 2019, 2.3).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parallel import AXES, PP, Array, Tree, all_gather, reduce_scatter, shift, varying
from schedules import Schedule


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


class Sums(NamedTuple):
    """What adds up over the ticks, on each device its own. Gradients are updated in place."""

    shared: Tree
    blocks: Tree
    loss: Array
    stage: Tree  # statistics of `stage`: [chunks, ...]
    last: Tree  # statistics of `last`


class State(NamedTuple):
    """What a tick leaves to the next. A ring has its slots in front."""

    x_ring: Array
    g_ring: Array
    x_arriving: Array
    g_arriving: Array
    sums: Sums


@dataclasses.dataclass(frozen=True)
class Context:
    """What is the same on all ticks. Leaves of `blocks` are [chunks, blocks of a chunk, ...]."""

    schedule: Schedule
    functions: Functions
    shared: Tree
    blocks: Tree
    x: jax.ShapeDtypeStruct

    def chunk(self, unit: Array) -> Array | int:
        return unit // self.schedule.microbatches if self.schedule.chunks > 1 else 0

    def stage(self, blocks: Tree, x: Array, unit: Array) -> tuple[Array, Array, Tree]:
        virtual = self.chunk(unit) * self.schedule.stages + lax.axis_index(PP)
        return self.functions.stage(blocks, x, virtual, unit % self.schedule.microbatches)


def _zeros(shapes: Tree, *front: int) -> Tree:
    return jax.tree.map(lambda s: varying(jnp.zeros((*front, *s.shape), s.dtype), AXES), shapes)


def _at(tree: Tree, index: Array | int) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _add(sums: Tree, values: Tree) -> Tree:
    return jax.tree.map(lambda s, v: s + v.astype(s.dtype), sums, values)


def _add_at(sums: Tree, index: Array | int, values: Tree) -> Tree:
    return jax.tree.map(lambda s, v: s.at[index].add(v.astype(s.dtype)), sums, values)


def _file(ring: Array, slot: Array, value: Array) -> Array:
    """Writes to a slot of the ring; slot -1 writes nothing."""
    at = jnp.maximum(slot, 0)
    value = jnp.where(slot >= 0, value, _at(ring, at))
    return lax.dynamic_update_index_in_dim(ring, value, at, 0)


def _rows(schedule: Schedule) -> dict[str, Array]:
    """What the scan reads: this stage's columns of the tables, and the head's; [ticks] each.

    f, b, w, head: units and microbatches. The rest are ring slots, -1 where nothing is done: those
    that F and B read x and g from, and those that x and g are filed in when they arrive.
    """
    stages = np.arange(schedule.stages)

    def slots(ring: str, units: np.ndarray) -> np.ndarray:
        slot = getattr(schedule, f'{ring}_slot')[stages, np.maximum(units, 0)]
        return np.where(units >= 0, slot, -1)

    head = schedule.head[:, None]
    leaving = np.where(head >= 0, head + schedule.units - schedule.microbatches, -1)
    entering = (schedule.f < schedule.microbatches) & (stages == 0)
    tables = {
        'f': schedule.f, 'b': schedule.b, 'w': schedule.w,
        'f_x': slots('x', schedule.f), 'b_x': slots('x', schedule.b),
        'b_g': slots('g', schedule.b),
        'x_in': slots('x', schedule.x_arrival), 'g_in': slots('g', schedule.g_arrival),
        'x_first': np.where(entering, slots('x', schedule.f), -1),
        'g_head': np.where(stages == schedule.stages - 1, slots('g', leaving), -1),
    }  # fmt: skip
    stage, others = lax.axis_index(PP), tuple(axis for axis in AXES if axis != PP)
    rows = {k: varying(jnp.asarray(v, jnp.int32)[:, stage], others) for k, v in tables.items()}
    return rows | {'head': jnp.asarray(schedule.head, jnp.int32)}


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


def _backward(ctx: Context, state: State, row: dict[str, Array]) -> tuple[State, Array]:
    """B: gradients of the stage's input and parameters; on the first, those of the embedding."""
    unit = row['b']

    def run(sums: Sums) -> tuple[Sums, Array]:
        chunk = ctx.chunk(unit)

        def stage(blocks: Tree, x: Array) -> tuple[tuple[Array, Array], Tree]:
            y, loss, statistics = ctx.stage(blocks, x, unit)
            return (y, loss), (loss, statistics)

        inputs = (_at(ctx.blocks, chunk), _at(state.x_ring, row['b_x']))
        (_, loss), pull, (_, statistics) = jax.vjp(stage, *inputs, has_aux=True)
        d_blocks, dx = pull((_at(state.g_ring, row['b_g']), jnp.ones_like(loss)))
        sums = sums._replace(
            blocks=_add_at(sums.blocks, chunk, d_blocks),
            loss=sums.loss + loss,
            stage=_add_at(sums.stage, chunk, statistics),
        )
        return sums, dx

    def embed(sums: Sums) -> Sums:
        _, pull = jax.vjp(lambda shared: ctx.functions.first(shared, unit), ctx.shared)
        return sums._replace(shared=_add(sums.shared, pull(dx)[0]))

    sums, dx = lax.cond(unit >= 0, run, lambda sums: (sums, _zeros(ctx.x)), state.sums)
    leaves = (unit >= 0) & (unit < ctx.schedule.microbatches) & (lax.axis_index(PP) == 0)
    return state._replace(sums=lax.cond(leaves, embed, lambda sums: sums, sums)), dx


def _tick(ctx: Context, state: State, row: dict[str, Array]) -> State:
    x_ring = _file(state.x_ring, row['x_in'], state.x_arriving)
    g_ring = _file(state.g_ring, row['g_in'], state.g_arriving)
    state = state._replace(x_ring=x_ring, g_ring=g_ring)
    state, y = _forward(ctx, state, row)
    if not ctx.schedule.trains:
        return _head(ctx, state, row, y)._replace(x_arriving=shift(y, PP, 1))
    if ctx.schedule.head_before_b:
        state = _head(ctx, state, row, y)
    state, dx = _backward(ctx, state, row)
    if not ctx.schedule.head_before_b:
        state = _head(ctx, state, row, y)
    return state._replace(x_arriving=shift(y, PP, 1), g_arriving=shift(dx, PP, -1))


def run_pipeline(schedule: Schedule, functions: Functions, params: Tree) -> tuple[Tree, Sums]:
    """One step's microbatches through the stages of `pp`: gradients, and what adds up besides.

    params: {'blocks': leaves [chunks, blocks of a chunk, ...], and others, shared}, varying over
    all axes. The gradients have the parameters' structure, float32, and are this device's own: as
    without a pipeline, they are to be summed over the axes that do not shard the parameter. The
    same holds for the loss and the statistics. Raises ValueError if the mesh or the rows of a
    microbatch do not fit the schedule.
    """
    shared = {k: v for k, v in params.items() if k != 'blocks'}
    blocks = params['blocks']
    if lax.axis_size(PP) != schedule.stages:
        raise ValueError(
            f'the schedule has {schedule.stages} stages and the mesh pp={lax.axis_size(PP)}; '
            f'make the schedule for the mesh'
        )
    x = jax.eval_shape(functions.first, shared, 0)
    ctx = Context(schedule, functions, shared, blocks, jax.ShapeDtypeStruct(x.shape, x.dtype))
    rows = math.prod(x.shape[:-1])
    if rows % schedule.stages:
        raise ValueError(
            f'a microbatch has {rows} tokens on a device, which is not divisible by the '
            f'{schedule.stages} stages that share the head; use a multiple'
        )
    share = jax.ShapeDtypeStruct((rows // schedule.stages, x.shape[-1]), x.dtype)
    _, loss, stage = jax.eval_shape(ctx.stage, _at(blocks, 0), x, 0)
    _, last = jax.eval_shape(functions.last, shared, share, 0)
    float32 = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), tree
    )
    sums = Sums(
        _zeros(float32(shared)), _zeros(float32(blocks)), _zeros(loss),
        _zeros(stage, schedule.chunks), _zeros(last),
    )  # fmt: skip
    state = State(
        _zeros(ctx.x, schedule.x_depth), _zeros(ctx.x, schedule.g_depth), _zeros(ctx.x),
        _zeros(ctx.x), sums,
    )  # fmt: skip
    step = lambda state, row: (_tick(ctx, state, row), None)  # noqa: E731
    state, _ = lax.scan(step, state, _rows(schedule))
    return state.sums.shared | {'blocks': state.sums.blocks}, state.sums
