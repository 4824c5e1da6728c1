"""One device's part of a config: the sizes that all estimates are made of.

Many layouts of one config have the same microbatch on a device, or the same mesh. So what follows
from less than a whole part is kept by less: a layer's arrays and FLOPs by the `Microbatch`, sizes
of parameters by their `Group` and the mesh, times of a schedule by the `Pipeline`.
"""

import dataclasses
import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from config import COMPUTE, ModelConfig, OptimizerConfig, in_phase, largest_phase, of_layer
from layers.attention import Sizes, attention_sizes
from model import flops_per_token, keys_seen, layer_params, model_for, model_params
from optimizer import optimizer_for, slots_of
from parallel import AXES, BATCH, CP, EP, FSDP, PP, TP, Param, Tree, count, is_param, spec_axes
from pipeline.schedules import ideal, lock_step, make_schedule
from pipeline.zero_bubble import SLACK, least_time
from planning.muon import Shape, shapes
from train_step import pipeline_costs

Mesh = tuple[tuple[str, int], ...]  # axes and their sizes, as a key
ZERO_BUBBLE = 'zero_bubble'

# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Parameters that are counted together. A key of what is kept, equal to itself alone."""

    params: tuple[Param, ...]

    @functools.cached_property
    def by_axes(self) -> list[tuple[tuple[str, ...], bool, int]]:
        """The numbers of all parameters that the same axes shard: (axes, are matrices, numbers)."""
        found = Counter()
        for p in self.params:
            axes = tuple(axis for axis in AXES if axis in spec_axes(p.spec))
            found[axes, p.matrix] += math.prod(p.shape)
        return [(*key, n) for key, n in found.items()]

    @functools.cached_property
    def multiplied(self) -> 'Group':
        """The matrices whose matmuls have the type model.matmul_type."""
        return Group(tuple(p for p in self.params if p.multiplied))


def group(tree: Tree) -> Group:
    """Returns the declarations in a tree as a group."""
    return Group(tuple(jax.tree.leaves(tree, is_leaf=is_param)))


@functools.cache
def shards(params: Group, mesh: Mesh, whole: str | None = None, every: bool = True) -> int:
    """Counts the numbers of a group on one device; `whole`: after a gather over that axis; else
    `every`: of matrices."""
    sizes = dict(mesh)
    return sum(
        n // math.prod(sizes[axis] for axis in axes if axis != whole)
        for axes, matrices, n in params.by_axes
        if every or matrices
    )


def gathered(params: Group, mesh: Mesh, width: int, matmul_type: str = COMPUTE) -> int:
    """Returns the bytes of a group's matrices in matmuls: whole over fsdp, in a type of so many
    bytes, and with matmul_type='fp8' one byte a number where that is the type."""
    wide = shards(params, mesh, FSDP, every=False) * width
    if matmul_type == COMPUTE:
        return wide
    return wide - shards(params.multiplied, mesh, FSDP, every=False) * (width - 1)


@functools.cache
def gathered_within(params: Group, mesh: Mesh) -> int:
    """Counts the numbers on one device of matrices that fsdp cuts in another dimension than their
    first."""
    sizes = dict(mesh)
    return sum(
        math.prod(p.shape) // math.prod(sizes[axis] for axis in spec_axes(p.spec))
        for p in params.params
        if p.matrix and FSDP in spec_axes(P(*p.spec[1:]))
    )


class Declared:
    """All parameters of a model whose stages have `chunks` parts, and the optimizer's slots."""

    def __init__(self, cfg: ModelConfig, chunks: int, optimizer: OptimizerConfig) -> None:
        self._cfg, self._tree, self._optimizer = cfg, model_params(cfg, chunks), optimizer
        self.all = group(self._tree)
        self.slots = group(slots_of(self._tree, optimizer))
        self.parameters = count(self._tree)
        self.active = count(self._tree, active=True)  # that a token meets
        self._of: dict[str, Group] = {}
        self._muon: dict[Mesh, tuple[Shape, ...]] = {}

    def of(self, within: str) -> Group:
        """Returns the parameters of one group of the tree: 'embed', 'blocks', 'first'."""
        if within not in self._of:
            self._of[within] = group(self._tree.get(within, {}))
        return self._of[within]

    def cut(self, chunks: int) -> 'Declared':
        """Returns the parameters with stages of so many parts."""
        return declared(self._cfg, chunks, self._optimizer)

    def layer(self, kind: str) -> Group:
        """Returns the parameters of a layer of this kind."""
        return layer(self._cfg, kind)

    def of_muon(self, mesh: Mesh) -> tuple[Shape, ...]:
        """Returns the shapes of matrices that Muon updates, the costliest first."""
        if mesh not in self._muon:
            self._muon[mesh] = tuple(shapes(self._tree, self._optimizer, dict(mesh)))
        return self._muon[mesh]


declared = functools.cache(Declared)
useful_flops = functools.cache(flops_per_token)


@functools.cache
def layer(cfg: ModelConfig, kind: str) -> Group:
    """Returns the parameters of a layer of this kind."""
    return group(layer_params(cfg, kind))


# ---------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The numbers that planning reads off a schedule (pipeline.tables.Schedule)."""

    name: str
    ticks: int
    x_depth: int
    g_depth: int
    s_depth: int
    split: bool
    bubble: float  # the part of the blocks' time that a stage idles, the ticks being in lock step


@functools.cache
def pipeline(
    name: str, stages: int, microbatches: int, chunks: int, remat: str, clock: str
) -> Pipeline:
    """Returns what planning reads off the schedule of that name, laid out for a rematerialization.

    Raises ConfigError as `make_schedule`.
    """
    costs = pipeline_costs(remat)
    s = make_schedule(name, stages, microbatches, chunks, costs, clock)
    bubble = 1 - ideal(s, costs) / lock_step(s, costs)
    return Pipeline(name, s.ticks, s.x_depth, s.g_depth, s.s_depth, s.split, bubble)


@functools.cache
def least_zero_bubble(stages: int, microbatches: int, remat: str) -> Pipeline:
    """Returns what no zero-bubble layout goes below, without one: to make one can take a second."""
    costs = pipeline_costs(remat)
    time = least_time(stages, microbatches, costs)
    bubble = max(0.0, 1 - microbatches * sum(costs) / time - SLACK)
    # A microbatch reaches the last stage after as many ticks as there are stages before it, and
    # comes back after as many.
    ticks = microbatches + 2 * (stages - 1)
    return Pipeline(ZERO_BUBBLE, ticks, 1, 1, 1, True, bubble)


# ---------------------------------------------------------------------------------------------
# The part
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatch:
    """A microbatch on one device, and the axes that cut its layers.

    A key of what is kept, equal to itself alone: `microbatch` makes one of each.
    """

    cfg: ModelConfig
    mesh: dict[str, int]  # ep, cp and tp; all axes in a Part
    T: int  # positions of a sequence, over all devices of cp
    rows: int  # sequences of a microbatch on a device

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of a microbatch, all positions of a cp device: for heads and feed-forward."""
        return self.rows * self.T // self.mesh[CP]

    @functools.cached_property
    def local(self) -> int:
        """Tokens of a microbatch at the positions of this tp device: in the residual stream."""
        return self.tokens // self.mesh[TP]

    @functools.cached_property
    def width(self) -> int:
        """Bytes per number in the compute type."""
        return jnp.dtype(self.cfg.compute_dtype).itemsize

    @functools.cached_property
    def assignments(self) -> int:
        """Rows that a device's experts take: choices, and the room for an uneven spread."""
        cfg, ep = self.cfg, self.mesh[EP]
        rows = self.tokens * cfg.experts_per_token
        full = not cfg.buffer_factor or cfg.buffer_factor >= ep
        slots = rows if full else math.ceil(cfg.buffer_factor * rows / ep)
        return rows if ep == 1 else ep * slots

    @property
    def in_ring(self) -> bool:
        """True where keys and values go from device to device."""
        return self.mesh[CP] > 1 and self.cfg.cp_style == 'ring'

    def of_layer(self, kind: str) -> Sizes:
        """The numbers per position of the attention of a layer of this kind."""
        return attention_sizes(of_layer(self.cfg, kind))

    def keys_seen(self, kind: str) -> float:
        """Keys that a query of a layer of this kind sees, on average."""
        return keys_seen(of_layer(self.cfg, kind), self.T)

    def is_linear(self, kind: str) -> bool:
        """True for a layer with a state in place of keys."""
        return self.of_layer(kind).state > 0

    def state_numbers(self, kind: str) -> int:
        """Numbers of a linear layer's state on a device, for all rows of a microbatch."""
        return self.rows * self.of_layer(kind).state // self.mesh[TP]

    def travels(self, kind: str) -> int:
        """Numbers of a cp device's positions that travel, for a layer and microbatch."""
        sizes = self.of_layer(kind)
        return self.tokens * sizes.travels // (self.mesh[TP] if sizes.travels_cut else 1)


@functools.cache
def microbatch(cfg: ModelConfig, ep: int, cp: int, tp: int, T: int, rows: int) -> Microbatch:
    """Makes a microbatch, one object of each."""
    return Microbatch(cfg, {EP: ep, CP: cp, TP: tp}, T, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Part(Microbatch):
    """One device's part of a config: its mesh, and the sizes of its part of a microbatch."""

    platform: str  # of jax
    microbatches: int
    chunks: int  # virtual stages of a pipeline stage
    gather: str  # config.fsdp_gather
    declared: Declared
    schedule: Pipeline | None  # None: no pipeline

    @functools.cached_property
    def micro(self) -> Microbatch:
        """The part without all but its microbatch, by which what layers cost is kept."""
        ep, cp, tp = (self.mesh[axis] for axis in (EP, CP, TP))
        return microbatch(self.cfg, ep, cp, tp, self.T, self.rows)

    @functools.cached_property
    def sizes(self) -> Mesh:
        """The mesh as a key."""
        return tuple(self.mesh.items())

    @property
    def of_muon(self) -> tuple[Shape, ...]:
        """The shapes of matrices that Muon updates, the costliest first."""
        return self.declared.of_muon(self.sizes)

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all devices."""
        shards = math.prod(self.mesh[axis] for axis in (*BATCH, CP))
        return self.tokens * self.microbatches * shards

    @property
    def layers(self) -> dict[str, int]:
        """The kinds of layers of a device, and how many it has of each."""
        found = Counter(self.cfg.block * self.blocks)
        if self.cfg.first_dense:
            found[self.cfg.first_kind] += self.cfg.first_dense
        return dict(found)

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks of layers on a device."""
        return self.cfg.n_blocks // self.mesh[PP]

    @functools.cached_property
    def head_tokens(self) -> int:
        """Tokens of a microbatch whose loss this device computes, as stages share the head."""
        return self.local // self.mesh[PP]

    @functools.cached_property
    def loss_tokens(self) -> int:
        """Tokens whose logits exist at a time, as `cross_entropy` cuts them."""
        n = -(-self.head_tokens // self.cfg.loss_chunk)
        while self.head_tokens % n:
            n += 1
        return self.head_tokens // n * self.mesh[TP]


def part_of(config: ConfigDict, platform: str) -> Part:
    """Returns one device's part of a config on devices of this jax platform.

    With config.schedule, of the phase with the largest steps.
    """
    config = in_phase(config, largest_phase(config))
    mesh, p = {axis: config.mesh[axis] for axis in AXES}, config.pipeline
    over = config.microbatches * math.prod(mesh[axis] for axis in BATCH)
    cfg, stages = model_for(config, platform), mesh[PP]
    schedule = None
    if stages > 1:
        schedule = pipeline(p.schedule, stages, config.microbatches, p.chunks, cfg.remat, p.clock)
    return Part(
        cfg=cfg,
        mesh=mesh,
        T=config.seq_len,
        rows=config.batch_size // over,
        platform=platform,
        microbatches=config.microbatches,
        chunks=p.chunks,
        gather=config.fsdp_gather,
        declared=declared(cfg, p.chunks, optimizer_for(config, platform)),
        schedule=schedule,
    )
