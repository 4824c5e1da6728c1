"""Muon's update compiled for TPUs that need not be there, beside optax's cut by the partitioner.

    python benchmarks/muon_collectives.py            # minutes; takes requirements/tpu.txt
    python benchmarks/muon_collectives.py --step     # also compiles the whole step
    python benchmarks/muon_collectives.py --programs=llama3_8b@v5p:4x4x4 --nooptax
    python benchmarks/muon_collectives.py --cpu_devices=8 --layers=1    # counts alone, in seconds

A row is one update: of parameters, gradients and slots in float32, sharded as the config's mesh
says. `ours` is optimizer.OPTIMIZERS['muon'] inside shard_map, with Newton-Schulz in bfloat16;
`optax` is optax.contrib.muon on the same arrays in the same shardings and of the same matrices,
with AdamW for the rest, where XLA's partitioner puts the collectives. It has no type of its own for
Newton-Schulz, which runs in float32 (whose matmuls TPUs round to bfloat16).

What ours sends follows from optimizer.at_home (planning/muon.py counts it). Matrices of one shape
and layout form a group: n of them are padded to n', a multiple of the devices that hold parts of
one; they travel to their homes and back. A device sends, in bytes of optimizer.muon.dtype, 2 · Σ of
all groups' n' · rows/r · columns/c · bytes · ((1 - 1/r) + (1 - 1/c)), where r and c are the sizes
of the mesh axes that shard rows and columns; `deviation_%` is the compiled program's from it.

`in_newton_schulz` are the collectives in that named scope; of optax, those of its matmuls and sums,
which are in Newton-Schulz alone. `per_group` is the largest number of all-to-alls for one group,
each way. The times are the compiler's (planning/compiled.py): compute, and the network that is
waited for. `peak_%` is the part of the chip's peak that Newton-Schulz reaches by them. `step_%` is
the update's part of a step whose other work takes what `rest_by` says: with --step the whole step
of ours, compiled, without its update; otherwise the roofline (planning/roofline.py), which no
program reaches, so that the update looks larger than it is.
"""

import collections
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import common
import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from config import ConfigError
from machine.chips import CHIPS, Chip
from machine.config_flag import load_config
from optimizer import OPTIMIZERS, is_muons
from parallel import P, Param, Tree, is_param, make_mesh, map_params, specs
from planning.compiled import Walk, compile_step
from planning.hlo import Instruction, array_bytes, parse
from planning.muon import Shape, shapes
from planning.prices import Cost, gpu_price, tpu_price
from planning.roofline import estimate
from planning.topology import topology_devices
from runtime.config_checks import validate
from train_step import Setup, abstract_state, compiler_options, setup

FLAGS = flags.FLAGS
ALL_TO_ALL = ('all-to-all', 'all-to-all-done')  # with the result alone as their shape
PROGRAMS = ['llama3_8b@v5p:4x4x4', 'tpu_v4_best@v4:2x4x4']
_OP_NAME = re.compile(r'op_name="([^"]*)"')


# ---------------------------------------------------------------------------------------------
# The two updates
# ---------------------------------------------------------------------------------------------


def lower_ours(s: Setup) -> jax.stages.Lowered:
    """Lowers the update of the config's optimizer; parameters and slots are donated."""

    def update(params: Tree, grads: Tree, slots: Tree, lr: Any, updates: Any) -> tuple[Tree, Tree]:
        f = OPTIMIZERS[s.optimizer.name].update
        return f(params, grads, slots, lr, updates, s.declared, s.optimizer)

    params, slots = specs(s.declared), specs(s.slots)
    sharded = jax.shard_map(
        update, mesh=s.mesh, in_specs=(params, params, slots, P(), P()), out_specs=(params, slots)
    )
    numbers = (jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.float32, jnp.int32))
    state = abstract_state(s)
    x = state['params']
    options = compiler_options(s.config.compiler_options, s.platform)
    f = jax.jit(sharded, donate_argnums=(0, 2), compiler_options=options)
    return f.lower(x, x, state['moments'], *numbers)


def lower_optax(s: Setup) -> jax.stages.Lowered:
    """Lowers the update of optax.contrib.muon, with the constants of the config."""
    common.need('optax')
    import optax
    from optax.contrib import MuonDimensionNumbers, muon

    def dimension_numbers(p: Param) -> MuonDimensionNumbers | None:
        dims = range(len(p.shape) - p.inputs - p.outputs, len(p.shape))
        if not is_muons(p):
            return None
        return MuonDimensionNumbers(tuple(dims[: p.inputs]), tuple(dims[p.inputs :]))

    o, u = s.optimizer, s.optimizer.muon
    optimizer = muon(
        o.peak_lr, ns_steps=u.steps, beta=u.momentum, nesterov=u.nesterov, adam_b1=o.b1,
        adam_b2=o.b2, weight_decay=o.weight_decay, adam_weight_decay=o.weight_decay,
        consistent_rms=0.2 if u.scale == 'rms' else None,
        muon_weight_dimension_numbers=map_params(dimension_numbers, s.declared),
    )  # fmt: skip

    def update(params: Tree, grads: Tree, state: Tree) -> tuple[Tree, Tree]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def like_its_parameter(path: tuple, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        below = s.declared
        for key in [k.key for k in path if isinstance(k, jax.tree_util.DictKey)][1:]:
            below = below[key]
        spec = below.spec if is_param(below) else P()
        return x.update(sharding=NamedSharding(s.mesh, spec))

    params = abstract_state(s)['params']
    state = jax.eval_shape(optimizer.init, params)
    state = jax.tree_util.tree_map_with_path(like_its_parameter, state)
    given = jax.tree.map(lambda x: x.sharding, (params, params, state))
    f = jax.jit(
        update, donate_argnums=(0, 2), in_shardings=given, out_shardings=(given[0], given[2]),
        compiler_options=compiler_options(s.config.compiler_options, s.platform),
    )  # fmt: skip
    return f.lower(params, params, state)


# ---------------------------------------------------------------------------------------------
# What the compiled programs do
# ---------------------------------------------------------------------------------------------


class ScopedWalk(Walk):
    """A walk over a program that counts only what operations with a name that `keep` accepts became
    in it."""

    def __init__(self, whole: Walk, keep: Callable[[str], bool]):
        super().__init__(whole.program, whole.mesh, whole.chip, whole.price)
        self.whole, self.keep = whole, keep

    def kept(self, i: Instruction) -> bool:
        found = _OP_NAME.search(i.text)
        return bool(found) and self.keep(found[1])

    def work(self, i: Instruction) -> Cost:
        if self.kept(i):
            return self.whole.work(i)
        return super().work(i) if i.op in ('while', 'conditional', 'call') else Cost()

    def transfer(self, kind: str, i: Instruction, shape: str, hidden: float) -> Cost:
        return super().transfer(kind, i, shape, hidden) if self.kept(i) else Cost()


def is_newton_schulz(op_name: str) -> bool:
    """Returns True for operations of ours in its named scope."""
    return 'newton_schulz' in op_name.split('/')


def is_matmul_or_sum(op_name: str) -> bool:
    """Returns True for matmuls and sums: of optax's update, what only Newton-Schulz contains."""
    return op_name.rpartition('/')[2] in ('dot_general', 'reduce_sum')


@dataclasses.dataclass(frozen=True)
class Update:
    """A compiled update: its cost on a device, and that of Newton-Schulz alone."""

    cost: Cost
    inside: Cost
    all_to_alls: list[float]  # bytes of the result of each
    temporary: float  # bytes

    @property
    def seconds(self) -> float:
        return self.cost.seconds + self.cost.total().exposed

    def per_group(self, sizes: list[float]) -> float:
        """Returns the largest number of all-to-alls for one group, each way, of groups that hold so
        many bytes on a device.

        What travels for a group has the same size each time. Of a size that is no group's, as if
        an all-to-all had been cut into several, all are taken for those of one group.
        """
        groups, found = collections.Counter(sizes), collections.Counter(self.all_to_alls)
        return max((n / 2 / max(groups[size], 1) for size, n in found.items()), default=0.0)


def compiled(
    lowered: jax.stages.Lowered, keep: Callable[[str], bool], mesh: Mesh, chip: Chip
) -> Update:
    """Compiles an update and reads its cost, and that of the operations that `keep` accepts."""
    f = lowered.compile()
    program = parse(f.as_text())
    walk = Walk(program, mesh, chip, gpu_price if chip.platform == 'gpu' else tpu_price)
    everything = (i for found in program.computations.values() for i in found)
    return Update(
        cost=walk.cost(program.entry),
        inside=ScopedWalk(walk, keep).cost(program.entry),
        all_to_alls=[array_bytes(i.shape) for i in everything if i.op in ALL_TO_ALL],
        temporary=f.memory_analysis().temp_size_in_bytes,
    )


def rest_of_step(s: Setup, topology: str, chip: Chip, ours: Update) -> tuple[float, str]:
    """Returns the seconds of a step without its update, and what they are by."""
    if FLAGS.step:
        say(f'{s.config.model.n_layers} layers on {topology}: compiling the whole step')
        cost = compile_step(s.config, topology, chip).cost
        if cost is not None:
            return cost.seconds + cost.total().exposed - ours.seconds, 'compiler'
    config = s.config.copy_and_resolve_references()
    config.optimizer.name = 'adamw'
    e = estimate(config, chip)
    return e.seconds - sum(w.seconds(chip) for w in e.work if w.part == 'optimizer'), 'roofline'


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def programs() -> Iterator[tuple[str, str, ConfigDict]]:
    """Yields name, topology and config of what the flags ask for."""
    if FLAGS.cpu_devices:
        n = FLAGS.cpu_devices
        tp = 2 if n % 2 == 0 else 1
        yield from [('tiny', f'cpu:{n}', configure('tiny', {'fsdp': n // tp, 'tp': tp}))]
        return
    for program in FLAGS.programs:
        name, _, topology = program.partition('@')
        if topology.partition(':')[0] not in CHIPS:
            raise ConfigError(
                f'--programs={program} names no topology; use CONFIG@TOPOLOGY, as {PROGRAMS[0]}'
            )
        yield name, topology, configure(name, {})


def configure(name: str, mesh: dict[str, int]) -> ConfigDict:
    """Returns the config of that name with Muon, and the depth that the flags ask for."""
    _, config = load_config(name)
    config.mesh.update(mesh)
    config.optimizer.name = 'muon'
    config.model.n_layers = FLAGS.layers or config.model.n_layers
    return config


def rows(name: str, topology: str, config: ConfigDict) -> Iterator[common.Figures]:
    """Yields the figures of ours, and of optax's."""
    chip = CHIPS.get(topology.partition(':')[0])
    devices = topology_devices(topology) if chip else jax.devices()
    validate(config, len(devices), needs_data=False)
    s = setup(config, make_mesh(config.mesh, devices))
    lowered = {'ours': (lower_ours, is_newton_schulz), 'optax': (lower_optax, is_matmul_or_sum)}
    if not FLAGS.optax:
        del lowered['optax']
    updates: dict[str, Update] = {}
    for update, (lower, keep) in lowered.items():
        say(f'{name} on {topology}: compiling the update, {update}')
        updates[update] = compiled(lower(s), keep, s.mesh, chip or CHIPS['v4'])
    ours, found = updates['ours'], shapes(s.declared, s.optimizer, dict(s.mesh.shape))
    rest = rest_of_step(s, topology, chip, ours) if chip else (0.0, '')
    for update, u in updates.items():
        row = {'config': name, 'devices': topology, 'update': update}
        row |= counts(u, found, s)
        if chip:
            row |= times(u, ours, *rest)
            flops = sum(shape.flops for shape in found)
            row['peak_%'] = 100 * flops / chip.flops / u.inside.seconds
        yield row | {'temporary_mb': u.temporary / 1e6, 'kinds': kinds(u.cost)}


def counts(u: Update, found: list[Shape], s: Setup) -> common.Figures:
    """Returns the numbers of collectives and bytes of an update, beside those of the formula."""
    width, total = jnp.dtype(s.optimizer.muon.dtype).itemsize, u.cost.total()
    sizes = [width * float(shape.per_home * shape.rows * shape.columns) for shape in found]
    formula = sum(n for shape in found for _, n in shape.sent)
    return {
        'collectives': round(total.count),
        'in_newton_schulz': round(u.inside.total().count),
        'groups': len(found),
        'per_group': u.per_group(sizes),
        'sent_mb': total.bytes / 1e6,
        'formula_mb': formula / 1e6,
        'deviation_%': 100 * (total.bytes / formula - 1) if formula else 0.0,
    }


def times(u: Update, ours: Update, rest: float, rest_by: str) -> common.Figures:
    """Returns the milliseconds of an update, beside ours and the rest of the step."""
    return {
        'compute_ms': 1e3 * u.cost.seconds,
        'network_ms': 1e3 * u.cost.total().exposed,
        'update_ms': 1e3 * u.seconds,
        'over_ours': u.seconds / ours.seconds,
        'step_%': 100 * u.seconds / (rest + u.seconds),
        'rest_ms': 1e3 * rest,
        'rest_by': rest_by,
    }


def kinds(cost: Cost) -> str:
    """Returns the number of collectives of each kind over each axis, as text."""
    found = sorted(cost.traffic.items(), key=lambda item: -item[1].bytes)
    return ', '.join(f'{t.count:.0f} {kind} {axes}' for (kind, axes), t in found)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> list[common.Figures]:
    common.prepare_devices(FLAGS.cpu_devices, keep_freed=False)
    jax.config.update('jax_platforms', 'cpu')  # leaves accelerators to the runs that use them
    if FLAGS.optax:
        common.need('optax')
    return [row for program in programs() for row in rows(*program)]


if __name__ == '__main__':
    flags.DEFINE_list('programs', PROGRAMS, 'CONFIG@TOPOLOGY, ...')
    flags.DEFINE_integer('layers', 0, "model.n_layers, of both updates; 0: the config's.", 0)
    flags.DEFINE_boolean('optax', True, 'Also compile the update of optax.')
    flags.DEFINE_boolean('step', False, 'Also compile the whole step, which takes minutes.')
    flags.DEFINE_integer('cpu_devices', 0, 'Compile configs/tiny.py for simulated devices.', 0)
    common.run(main)
