"""Estimates the cost of Muon's update on one device, for each shape of matrices.

What `optimizer.at_home` does, counted: matrices of one shape and layout travel together, each to
one device, its home, where Newton-Schulz runs; the updates travel back.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from config import MuonConfig, OptimizerConfig
from optimizer import Matrices, is_muons, muon_groups
from parallel import Param, Tree, is_param, part


@dataclasses.dataclass(frozen=True)
class Shape:
    """Matrices of one shape and layout, rows <= columns, and their cost on one device in a step."""

    rows: int
    columns: int
    axes: tuple[str, ...]  # over which the parts of one matrix are spread
    matrices: int  # of this device's stage and experts: those that its homes share
    homes: int
    per_home: int  # matrices on each, with the padding
    alike: int  # devices that compute the same as this one, itself included
    flops: float  # of Newton-Schulz, with the padding
    bytes: float  # read and written in the device's memory
    temporary: float  # bytes of the largest arrays at once
    sent: tuple[tuple[str, float], ...]  # bytes along each axis

    @property
    def padding(self) -> float:
        """The part of Newton-Schulz' work that is done on zeros."""
        return 1 - self.matrices / (self.homes * self.per_home)


def shapes(declared: Tree, cfg: OptimizerConfig, mesh: dict[str, int]) -> list[Shape]:
    """Returns all shapes that Muon updates, the costliest first; none for another optimizer."""
    if cfg.name != 'muon':
        return []
    of_muon = part(declared, declared, is_muons)
    leaves = jax.tree.leaves(of_muon, is_leaf=is_param)
    groups = muon_groups(of_muon, cfg.muon.split_heads)
    found = [
        shape(group, [leaves[i] for i, _ in members], cfg.muon, mesh)
        for group, members in groups.items()
    ]
    return sorted(found, key=lambda s: -s.flops)


def shape(group: Matrices, members: list[Param], cfg: MuonConfig, mesh: dict[str, int]) -> Shape:
    """Returns the cost of the matrices of one group.

    FLOPs as `optimizer.newton_schulz` counts them. Memory: a step's matmuls read their operands and
    write their results once, the sums are fused into them; before and after, each all-to-all reads
    and writes what it moves.
    """
    size = functools.partial(sizes_of, mesh)
    width, float32 = (jnp.dtype(dtype).itemsize for dtype in (cfg.dtype, 'float32'))
    copies = group.replicas if cfg.replicas == 'split' else ()
    matrix = group.rows * group.columns
    n = sum(math.prod(p.shape) for p in members) // matrix // size(group.front)
    homes = size(group.axes) * size(copies)
    per_home = -(-n // homes)
    at_home, grams = per_home * matrix, per_home * group.rows**2  # numbers; those of x xᵀ
    sent = [(axis, 2 * (1 - 1 / mesh[axis]) * at_home * width) for axis in group.axes]
    gathered = at_home * width
    for axis in reversed(copies):
        sent.append((axis, (mesh[axis] - 1) * gathered))
        gathered *= mesh[axis]
    moves = 2 * sum(mesh[axis] > 1 for axis in group.axes)
    local = n * matrix / size(group.axes)
    moved = width * (2 * local + 2 * moves * at_home + 3 * at_home)
    moved += width * cfg.steps * (4 * at_home + 5 * grams)
    return Shape(
        rows=group.rows,
        columns=group.columns,
        axes=group.axes,
        matrices=n,
        homes=homes,
        per_home=per_home,
        alike=size(group.replicas) // size(copies),
        flops=cfg.steps * (4.0 * group.rows * at_home + 2.0 * group.rows * grams),
        bytes=moved,
        # As they come, and in float32 for their norm; in a step x, the result, what it is made of,
        # and two of x xᵀ. At most: the compilers for TPU and GPU fuse some of it.
        temporary=max((width + 2 * float32) * at_home, width * (3 * at_home + 2 * grams)),
        sent=tuple((axis, n) for axis, n in sent if n),
    )


def sizes_of(mesh: dict[str, int], axes: tuple[str, ...]) -> int:
    """Returns the number of devices of these axes."""
    return math.prod(mesh[axis] for axis in axes)
