"""Searches the layouts of a config: meshes, microbatches, pipeline schedules, rematerialization.

All layouts are estimated, in the order of their meshes, as parts of one device: a `ConfigDict` is
made of those alone that are returned. To lay out a zero-bubble schedule can take a second, so it is
done only where a bound of what any layout of it reaches says that it may be the best (branch and
bound): the answer is that of trying all.
"""

import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from config import ConfigError, ModelConfig, model_config
from layers.context_parallel import STYLES
from machine.chips import Chip
from parallel import AXES, BATCH, CP, EP, PP, TP
from pipeline.schedules import CLOCKS, EQUAL_COSTS, check_settings
from planning.footprint import memory
from planning.part import ZERO_BUBBLE, Part, Pipeline, least_zero_bubble, part_of, pipeline
from planning.roofline import Estimate, estimate_part
from runtime.config_checks import is_routed, mesh_errors, stage_errors, validate

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


def can_pipeline(name: str, stages: int, microbatches: int, chunks: int) -> bool:
    """Returns whether there is a schedule of these settings."""
    try:
        check_settings(name, stages, microbatches, chunks, EQUAL_COSTS, CLOCKS[0])
    except ConfigError:
        return False
    return True


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


def layouts(share: Part, clock: str) -> Iterator[list[Part]]:
    """Yields every number of microbatches and schedule that can run on a mesh, with each of
    REMAT_CHOICES; a zero-bubble schedule is the bound of all.

    share: as `shares` yields it. clock: config.pipeline.clock.
    """
    stages, blocks = share.mesh[PP], share.cfg.n_blocks
    models = [with_remat(share.cfg, *choice) for choice in REMAT_CHOICES]
    for microbatches in factors(share.rows):
        if stages > 1 and microbatches > 8 * stages:
            continue  # the bubble is small by then
        rows, tokens = share.rows // microbatches, share.local // microbatches
        for name, chunks in schedules(blocks, stages):
            if stages > 1 and any(stage_errors(blocks, tokens, stages, chunks)):
                continue
            if not can_pipeline(name, stages, microbatches, chunks):
                continue
            yield [
                dataclasses.replace(
                    share,
                    cfg=cfg,
                    rows=rows,
                    microbatches=microbatches,
                    chunks=chunks,
                    declared=share.declared.cut(chunks),
                    schedule=schedule(name, stages, microbatches, chunks, cfg.remat, clock),
                )
                for cfg in models
            ]


def schedule(
    name: str, stages: int, microbatches: int, chunks: int, remat: str, clock: str
) -> Pipeline | None:
    """Returns the times of a schedule, None without stages; of zero_bubble the bound."""
    if stages == 1:
        return None
    if name == ZERO_BUBBLE:
        return least_zero_bubble(stages, microbatches, remat)
    return pipeline(name, stages, microbatches, chunks, remat, clock)


def laid_out(part: Part, clock: str) -> Part:
    """Returns a part whose zero-bubble schedule is laid out."""
    settings = part.mesh[PP], part.microbatches, part.chunks, part.cfg.remat, clock
    return dataclasses.replace(part, schedule=pipeline(ZERO_BUBBLE, *settings))


def with_layout(config: ConfigDict, s: Part) -> ConfigDict:
    """Returns the config in the layout of a part."""
    c = config.copy_and_resolve_references()
    c.mesh.update(s.mesh)
    c.update(cp_style=s.cfg.cp_style, microbatches=s.microbatches)
    c.pipeline.update(schedule=s.schedule.name if s.schedule else '1f1b', chunks=s.chunks)
    c.model.update(remat=s.cfg.remat, remat_keep=s.cfg.remat_keep, remat_offload=())
    return c


# ---------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------

# The seconds by which a layout is compared, its number, its part, and its estimate: None if the
# seconds are those of a bound.
Candidate = tuple[float, int, Part, Estimate | None]
Found = list[tuple[ConfigDict, Estimate]]


def check_base(config: ConfigDict) -> None:
    """Raises ConfigError for what is wrong with a config in any layout: then none can run."""
    validate(on_one_device(config), 1, needs_data=False)


def search(
    config: ConfigDict,
    devices: int,
    chip: Chip,
    room: float = 0.9,
    progress: Callable[[int, int], None] | None = None,
    best: int | None = None,
) -> tuple[Found, int]:
    """Returns the fastest layout of each mesh, the fastest mesh first, and how many were compared.

    Leaves out layouts that take more than `room` of the chip's memory. Compares by `expected`. With
    `best`, returns so many meshes, and after them the first without cp if that cuts all of them. Calls progress(layouts compared, meshes with one that fits). Raises ConfigError if the
    config is wrong in any layout, or no layout divides it.
    """
    check_base(config)
    clock, limit = config.pipeline.clock, room * chip.memory
    queue: list[Candidate] = []
    compared, fit = 0, set()
    for share in shares(config, devices, chip.platform):
        candidates = []
        for parts in layouts(share, clock):
            candidates += fitting(parts, chip, limit, compared)
            compared += len(parts)
            if progress:
                progress(compared, len(fit) + bool(candidates))
        # What one of the same mesh surpasses without a bound is not looked at again.
        least = min((c[:2] for c in candidates if c[3]), default=(math.inf, 0))
        queue += [c for c in candidates if c[:2] <= least]
        fit.update([share.sizes] if candidates else [])
    if not compared:
        raise ConfigError(
            f'no layout of {devices} devices divides the config; use another number of devices, '
            f'or sizes of the model and a batch_size ({config.batch_size}) with more divisors'
        )
    found = list(itertools.islice(in_order(queue, chip, limit, clock), best))
    if found and all(s.mesh[CP] > 1 for s, _ in found):
        whole = [c for c in queue if c[2].mesh[CP] == 1]
        found += itertools.islice(in_order(whole, chip, limit, clock), 1)
    return [(with_layout(config, s), e) for s, e in found], compared


def fitting(parts: list[Part], chip: Chip, limit: float, number: int) -> Iterator[Candidate]:
    """Yields those of a layout's rematerializations that fit, numbered from `number` on."""
    for i, s in enumerate(parts):
        used = memory(s)
        if used.peak > limit:
            return  # the next choices keep more
        e = estimate_part(s, chip, used)
        bound = s.schedule is not None and s.schedule.name == ZERO_BUBBLE
        yield expected(e), number + i, s, None if bound else e


def in_order(
    queue: list[Candidate], chip: Chip, limit: float, clock: str
) -> Iterator[tuple[Part, Estimate]]:
    """Yields the fastest layout of each mesh, the fastest mesh first.

    A bound that comes first is replaced by what it bounds, and that takes its place in the order.
    """
    queue, meshes = sorted(queue), set()
    while queue:
        _, number, s, e = heapq.heappop(queue)
        if s.sizes in meshes:
            continue
        if e is not None:
            meshes.add(s.sizes)
            yield s, e
            continue
        s = laid_out(s, clock)
        e = estimate_part(s, chip)
        if e.memory.peak <= limit:
            heapq.heappush(queue, (expected(e), number, s, e))


def expected(e: Estimate) -> float:
    """Returns the seconds of a step by which layouts are compared: the mean of both bounds, since
    compilers hide some of the collectives behind compute."""
    return (e.seconds + e.overlapped_seconds) / 2
