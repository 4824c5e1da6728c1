"""Searches the layouts of a config: meshes, microbatches, pipeline schedules, rematerialization."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from config import ConfigError, ModelConfig
from layers.context_parallel import STYLES
from machine.chips import Chip
from parallel import AXES
from planning.expected import expected_seconds
from planning.footprint import part_of
from planning.roofline import Estimate, estimate_part
from runtime.config_checks import is_routed, validate

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


def schedules(config: ConfigDict, stages: int) -> Iterator[tuple[str, int]]:
    """Yields the pipeline schedules to try with this many stages, as (schedule, chunks)."""
    yield '1f1b', 1
    if stages > 1:
        yield 'zero_bubble', 1
        m = config.model
        blocks = (m.n_layers - m.first_dense) // len(m.block)
        for chunks in (2, 4):
            if blocks % (stages * chunks) == 0:
                yield 'interleaved', chunks


def can_run(config: ConfigDict, devices: int) -> bool:
    """Returns whether `validate` accepts the config on this many devices; data are not needed."""
    try:
        validate(config, devices, needs_data=False)
    except ConfigError:
        return False
    return True


def candidates(config: ConfigDict, devices: int) -> Iterator[ConfigDict]:
    """Yields the config with every mesh, number of microbatches and pipeline schedule that can run;
    the batch size stays as it is."""
    m = config.model
    blocks = (m.n_layers - m.first_dense) // len(m.block)
    for mesh in meshes(devices):
        if mesh['ep'] > 1 and not is_routed(config):
            continue  # without experts, ep is fsdp without its shards
        if blocks % mesh['pp']:
            continue  # seen before a schedule is made, which takes long for many stages
        if mesh['cp'] > 1 and config.seq_len < LONG:
            continue  # rows are cut more cheaply between devices
        shards = mesh['dp'] * mesh['fsdp'] * mesh['ep']
        if config.batch_size % shards or m.n_heads % mesh['tp'] or mesh['tp'] > m.n_heads:
            continue
        rows = config.batch_size // shards
        for microbatches in factors(rows):
            if mesh['pp'] > 1 and microbatches > 8 * mesh['pp']:
                continue  # the bubble is small by then
            for schedule, chunks in schedules(config, mesh['pp']):
                c = config.copy_and_resolve_references()
                c.mesh.update(mesh)
                c.microbatches = microbatches
                c.pipeline.update(schedule=schedule, chunks=chunks)
                for style in STYLES if mesh['cp'] > 1 else (config.cp_style,):
                    c = c.copy_and_resolve_references()
                    c.cp_style = style
                    if can_run(c, devices):
                        yield c


def check_base(config: ConfigDict) -> None:
    """Raises ConfigError for what is wrong with a config in any layout: then none can run."""
    c = config.copy_and_resolve_references()
    c.mesh.update(dict.fromkeys(AXES, 1))
    c.microbatches = 1
    c.pipeline.update(schedule='1f1b', chunks=1)
    validate(c, 1, needs_data=False)


def search(
    config: ConfigDict,
    devices: int,
    chip: Chip,
    room: float = 0.9,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[tuple[ConfigDict, Estimate]], int]:
    """Returns the fastest layout of each mesh, the fastest mesh first, and how many were tried.

    Leaves out layouts that take more than `room` of the chip's memory. Compares by `expected`.
    Calls progress(layouts tried, meshes with one that fits). Raises ConfigError if the config is
    wrong in any layout, or no layout divides it.
    """
    check_base(config)
    best: dict[tuple[int, ...], tuple[ConfigDict, Estimate]] = {}
    models: dict[ModelConfig, ModelConfig] = {}  # one object of each, which is found by identity
    tried = 0
    for c in candidates(config, devices):
        s, key = part_of(c, chip.platform), tuple(c.mesh[axis] for axis in AXES)
        for remat, keep in REMAT_CHOICES:
            cfg = dataclasses.replace(s.cfg, remat=remat, remat_keep=keep, remat_offload=())
            cfg = models.setdefault(cfg, cfg)
            e = estimate_part(dataclasses.replace(s, cfg=cfg), chip)
            tried += 1
            if progress:
                progress(tried, len(best))
            if e.memory.peak > room * chip.memory:
                break  # the next choices keep more
            if key not in best or expected(e) < expected(best[key][1]):
                found = c.copy_and_resolve_references()
                found.model.update(remat=remat, remat_keep=keep, remat_offload=())
                best[key] = (found, e)
    if not tried:
        raise ConfigError(
            f'no layout of {devices} devices divides the config; use another number of devices, '
            f'or sizes of the model and a batch_size ({config.batch_size}) with more divisors'
        )
    return sorted(best.values(), key=lambda found: expected(found[1])), tried


def expected(e: Estimate) -> float:
    """Returns the seconds of a step by which layouts are compared: those that it is expected to
    take (planning/expected.py)."""
    return expected_seconds(e)
