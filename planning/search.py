"""Searches the layouts of a config: meshes, microbatches, pipeline schedules, rematerialization.

Layouts are compared as parts of one device: a `ConfigDict` is made of those alone that are
returned. Each number of microbatches on a mesh has a bound of what any schedule and
rematerialization can reach, and only those that may be the best are estimated one by one (branch
and bound). To lay out a zero-bubble schedule can take a second, so that too is done only where its
bound is the best. The answer is that of an estimate of every layout (tests/test_search.py).
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from config import ConfigError, ModelConfig, model_config
from layers.context_parallel import STYLES
from machine.chips import Chip, check_matmul_type
from parallel import AXES, BATCH, CP, EP, PP, TP
from pipeline.schedules import CLOCKS, EQUAL_COSTS, check_settings
from planning.expected import expected_seconds
from planning.footprint import memory
from planning.part import ZERO_BUBBLE, Part, Pipeline, least_zero_bubble, part_of, pipeline
from planning.roofline import Estimate, all_work, estimate_part
from runtime.config_checks import GATHERS, is_routed, mesh_errors, stage_errors, validate

# (model.remat, model.remat_keep), from the least memory to the most.
REMAT_CHOICES = (
    ('full', ()), ('full', ('attention',)), ('full', ('attention', 'residual')),
    ('full', ('attention', 'residual', 'hidden')), ('none', ()),
)  # fmt: skip
LONG = 8192  # positions from which on cp is tried


def factors(n: int) -> list[int]:
    """Returns all divisors of n, the smallest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def meshes(devices: int) -> Iterator[dict[str, int]]:
    """Yields every mesh of this many devices: all ways to write the number as a product of the
    axes' sizes."""

    def factor(n: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: n}
            return
        for size in factors(n):
            for rest in factor(n // size, axes[1:]):
                yield {axes[0]: size} | rest

    return factor(devices, AXES)


def schedules(blocks: int, stages: int) -> Iterator[tuple[str, int]]:
    """Yields the pipeline schedules to try with this many stages, as (schedule, chunks)."""
    yield '1f1b', 1
    if stages > 1:
        yield ZERO_BUBBLE, 1
        for chunks in (2, 4):
            if blocks % (stages * chunks) == 0:
                yield 'interleaved', chunks


def on_one_device(config: ConfigDict) -> ConfigDict:
    """Returns a copy of the config in the plainest layout."""
    c = config.copy_and_resolve_references()
    c.mesh.update(dict.fromkeys(AXES, 1))
    c.microbatches = 1
    c.pipeline.update(schedule='1f1b', chunks=1)
    return c


# ---------------------------------------------------------------------------------------------
# The layouts of a config
# ---------------------------------------------------------------------------------------------


def shares(config: ConfigDict, devices: int, platform: str) -> Iterator[Part]:
    """Yields one device's part for every mesh of this many devices, and style of cp, that can run:
    all of its rows as one microbatch, without a pipeline's schedule."""
    c, routed = on_one_device(config), is_routed(config)
    rows, heads, blocks = c.batch_size, c.model.n_heads, model_config(c).n_blocks
    for mesh in meshes(devices):
        if mesh[EP] > 1 and not routed:
            continue  # without experts, ep is fsdp without its shards
        if mesh[CP] > 1 and c.seq_len < LONG:
            continue  # rows are cut more cheaply between devices
        if blocks % mesh[PP] or heads % mesh[TP] or rows % math.prod(mesh[x] for x in BATCH):
            continue
        c.mesh.update(mesh)
        for style in STYLES if mesh[CP] > 1 else (config.cp_style,):
            c.cp_style = style
            if not any(mesh_errors(c)):
                yield part_of(c, platform)


@functools.cache
def with_remat(cfg: ModelConfig, remat: str, keep: tuple[str, ...]) -> ModelConfig:
    """Returns the model with another rematerialization, one object of each: much is kept by it."""
    return dataclasses.replace(cfg, remat=remat, remat_keep=keep, remat_offload=())


def in_microbatches(share: Part, microbatches: int) -> Part:
    """Returns a part of `shares` whose rows are cut into microbatches."""
    return dataclasses.replace(share, microbatches=microbatches, rows=share.rows // microbatches)


def microbatches_of(share: Part) -> list[int]:
    """Lists the numbers of microbatches to try."""
    stages, numbers = share.mesh[PP], factors(share.rows)
    return [m for m in numbers if stages == 1 or m <= 8 * stages]  # the bubble is small by then


def schedules_of(s: Part) -> list[tuple[str, int]]:
    """Lists the pipeline schedules that can run a part, as (schedule, chunks)."""
    found = schedules(s.cfg.n_blocks, s.mesh[PP])
    return [(name, chunks) for name, chunks in found if can_pipeline(s, name, chunks)]


def can_pipeline(s: Part, name: str, chunks: int) -> bool:
    """Returns whether a part runs by this schedule."""
    stages = s.mesh[PP]
    if stages == 1:
        return True
    try:
        check_settings(name, stages, s.microbatches, chunks, EQUAL_COSTS, CLOCKS[0])
    except ConfigError:
        return False
    return not any(stage_errors(s.cfg.n_blocks, s.local, stages, chunks))


def with_schedule(s: Part, name: str, chunks: int, clock: str, exact: bool = True) -> Part:
    """Returns a part with a schedule; of zero_bubble with a bound of it, unless `exact`."""
    stages, remat = s.mesh[PP], s.cfg.remat
    if stages == 1:
        return s
    times = (pipeline if exact else times_of)(name, stages, s.microbatches, chunks, remat, clock)
    declared = s.declared.cut(chunks)
    return dataclasses.replace(s, chunks=chunks, declared=declared, schedule=times)


def times_of(
    name: str, stages: int, microbatches: int, chunks: int, remat: str, clock: str
) -> Pipeline:
    """Returns what planning reads off a schedule; of zero_bubble a bound, soon made."""
    if name == ZERO_BUBBLE:
        return least_zero_bubble(stages, microbatches, remat)
    return pipeline(name, stages, microbatches, chunks, remat, clock)


def with_layout(config: ConfigDict, s: Part) -> ConfigDict:
    """Returns the config in the layout of a part."""
    c = config.copy_and_resolve_references()
    c.mesh.update(s.mesh)
    c.update(cp_style=s.cfg.cp_style, microbatches=s.microbatches, fsdp_gather=s.gather)
    c.pipeline.chunks = s.chunks
    if s.schedule:
        c.pipeline.schedule = s.schedule.name
    c.model.update(remat=s.cfg.remat, remat_keep=s.cfg.remat_keep, remat_offload=())
    return c


# ---------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------

Found = list[tuple[ConfigDict, Estimate]]


class Node(NamedTuple):
    """Layouts, and the least seconds that any of them may take; compared by both first fields.

    Without an estimate it is a number of microbatches on a mesh, with its schedules, or one layout
    with the bound of a zero-bubble schedule.
    """

    seconds: float
    number: tuple[int, int]
    part: Part
    schedules: list[tuple[str, int]]
    estimate: Estimate | None = None


def same_mesh(s: Part) -> Hashable:
    """Returns what two layouts of one mesh have alike."""
    return s.sizes


def same_remat(s: Part) -> Hashable:
    """Returns what two layouts of one mesh and rematerialization have alike."""
    return s.sizes, s.cfg.remat, s.cfg.remat_keep


def check_base(config: ConfigDict, chip: Chip) -> None:
    """Raises ConfigError for what is wrong with a config in any layout: then none can run."""
    validate(on_one_device(config), 1, needs_data=False)
    check_matmul_type(config, chip)


def search(
    config: ConfigDict,
    devices: int,
    chip: Chip,
    room: float = 0.9,
    progress: Callable[[int], None] | None = None,
    best: int | None = None,
    same: Callable[[Part], Hashable] = same_mesh,
) -> tuple[Found, int]:
    """Returns the fastest layout of each mesh, the fastest mesh first, and how many were compared.

    Leaves out layouts that take more than `room` of the chip's memory. Compares by `expected`. With
    `best`, returns so many meshes, and after them the first without cp if that cuts all of them.
    With `same_remat` in place of `same_mesh`, returns the fastest of each mesh and
    rematerialization. Calls progress(layouts compared). Raises ConfigError if the config is wrong
    in any layout, or no layout divides it.
    """
    check_base(config, chip)
    clock, limit = config.pipeline.clock, room * chip.memory
    nodes: list[Node] = []
    compared = 0
    for share in shares(config, devices, chip.platform):
        used = memory(share)
        fits = used.state + used.in_update <= limit  # for any microbatches
        for microbatches in microbatches_of(share):
            s = in_microbatches(share, microbatches)
            names = schedules_of(s)
            least = bound(s, names, clock, chip, limit) if names and fits else None
            if least:
                nodes.append(Node(expected(least), (len(nodes), -1), s, names))
            compared += len(names) * len(REMAT_CHOICES)
        if progress:
            progress(compared)
    if not compared:
        raise ConfigError(
            f'no layout of {devices} devices divides the config; use another number of devices, '
            f'or sizes of the model and a batch_size ({config.batch_size}) with more divisors'
        )
    found = list(itertools.islice(in_order(nodes, chip, limit, clock, same), best))
    if found and all(s.mesh[CP] > 1 for s, _ in found):
        whole = [node for node in nodes if node.part.mesh[CP] == 1]
        found += itertools.islice(in_order(whole, chip, limit, clock), 1)
    return [(with_layout(config, s), e) for s, e in found], compared


def faster(
    config: ConfigDict, e: Estimate, room: float = 0.9, least: float = 0.05
) -> tuple[ConfigDict, Estimate] | None:
    """Returns a config that `validate` accepts, estimated as `e`, with the best microbatches,
    rematerialization and fsdp_gather, and its estimate; None if it gains less than `least` of the
    seconds of one that fits."""
    clock, limit, chip = config.pipeline.clock, room * e.chip.memory, e.chip
    names = [(config.pipeline.schedule, config.pipeline.chunks)]
    c = config.copy_and_resolve_references()
    c.microbatches = 1
    c.pipeline.update(schedule='1f1b', chunks=1)
    nodes = []
    for gather in GATHERS:
        share = dataclasses.replace(part_of(c, chip.platform), gather=gather)
        for microbatches in microbatches_of(share):
            s = in_microbatches(share, microbatches)
            if can_pipeline(s, *names[0]) and (found := bound(s, names, clock, chip, limit)):
                nodes.append(Node(expected(found), (len(nodes), -1), s, names))
    s, found = next(in_order(nodes, chip, limit, clock), (None, e))
    enough = not e.fits or expected(found) <= (1 - least) * expected(e)
    return (with_layout(config, s), found) if s and enough else None


def in_order(
    nodes: list[Node],
    chip: Chip,
    limit: float,
    clock: str,
    same: Callable[[Part], Hashable] = same_mesh,
) -> Iterator[tuple[Part, Estimate]]:
    """Yields the fastest of all layouts that are the `same`, the fastest first: branch and bound.

    The node that comes first is a layout, which then is the fastest of those, or it is replaced by
    the layouts in it, each at its own place in the order.
    """
    queue, done = sorted(nodes), set()
    while queue:
        node = heapq.heappop(queue)
        # All layouts of a node have its mesh, and each its own rematerialization.
        if (node.estimate is not None or same is same_mesh) and same(node.part) in done:
            continue
        if node.estimate is not None:
            done.add(same(node.part))
            yield node.part, node.estimate
        for inner in inside(node, chip, limit, clock):
            heapq.heappush(queue, inner)


def inside(node: Node, chip: Chip, limit: float, clock: str) -> Iterator[Node]:
    """Yields the layouts of a node that fit, with a bound where the schedule takes long to make."""
    if node.estimate is not None:
        return
    s, (first, place) = node.part, node.number
    if place >= 0:
        exact = with_schedule(s, ZERO_BUBBLE, 1, clock)
        e = estimate_part(exact, chip)
        if e.memory.peak <= limit:
            yield Node(expected(e), node.number, exact, node.schedules, e)
        return
    for name, chunks in node.schedules:
        for choice in REMAT_CHOICES:
            place += 1
            inner = dataclasses.replace(s, cfg=with_remat(s.cfg, *choice))
            inner = with_schedule(inner, name, chunks, clock, exact=False)
            used = memory(inner)
            if used.peak > limit:
                continue
            e = estimate_part(inner, chip, used)
            known = None if name == ZERO_BUBBLE else e
            yield Node(expected(e), (first, place), inner, node.schedules, known)


def bound(
    s: Part, names: list[tuple[str, int]], clock: str, chip: Chip, limit: float
) -> Estimate | None:
    """Returns an estimate that no schedule and no rematerialization of a part falls below, None if
    none of them fits.

    Without rematerialization nothing is computed or sent again, and with all of it the least is
    kept, read and written; the more chunks, the fewer layers at a time. So `expected` must not fall
    where work, a transfer or the bubble grows.
    """
    times, chunks = None, max(chunks for _, chunks in names)
    if s.mesh[PP] > 1:
        times = least_pipeline(tuple(names), s.mesh[PP], s.microbatches, clock)
    all_again, none_again = (
        dataclasses.replace(s, cfg=with_remat(s.cfg, *choice), schedule=times, chunks=chunks)
        for choice in (REMAT_CHOICES[0], REMAT_CHOICES[-1])
    )
    used = memory(all_again)
    if used.peak > limit:
        return None
    e = estimate_part(none_again, chip, used)
    work = [
        dataclasses.replace(a, bytes=min(a.bytes, b.bytes), stacked=min(a.stacked, b.stacked))
        for a, b in zip(e.work, all_work(all_again), strict=True)
    ]
    return dataclasses.replace(e, work=work)


@functools.cache
def least_pipeline(
    names: tuple[tuple[str, int], ...], stages: int, microbatches: int, clock: str
) -> Pipeline:
    """Returns the least ticks and bubble of these schedules, for any rematerialization."""
    found = [
        times_of(name, stages, microbatches, chunks, remat, clock)
        for name, chunks in names
        for remat in {remat for remat, _ in REMAT_CHOICES}
    ]
    ticks, idle = min(x.ticks for x in found), min(x.bubble for x in found)
    return Pipeline('the least', ticks, 1, 1, 1, False, idle)


def expected(e: Estimate) -> float:
    """Returns the seconds of a step by which layouts are compared: those that it is expected to
    take (planning/expected.py).

    More work, more bytes sent or a larger bubble must not make it less: `bound` relies on that.
    """
    return expected_seconds(e)
