"""Memory that plan.py estimates beside what the compilers say, program by program.

    python benchmarks/estimates.py
    python benchmarks/estimates.py --cases='tpu,gpu experts' --json

Compiles the training steps of CASES for topologies that need not be there, each by its compiler of
requirements/tpu.txt or requirements/gpu.txt. A case without its compiler is left out. Between them
the programs have one microbatch and several, a pipeline, experts, both attentions, an untied head,
each rematerialization, arrays offloaded to host memory, sequences cut by both styles of cp, Muon,
windows, sinks, gates, biases and linear attention. tests/test_estimates.py holds each but the
`long` ones within 15 % of the compiler's figure.
"""

import dataclasses
import importlib
import sys
import time
from typing import Any

import common
import jax
from absl import flags
from ml_collections import ConfigDict

from config import ConfigError
from machine.chips import CHIPS, GB
from planning.ranking import compiled
from planning.roofline import estimate
from planning.topology import compiler_versions
from runtime.config_checks import validate

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Case:
    """A config of configs/, the topology that its step is compiled for, and what differs."""

    config: str
    topology: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    long: bool = False  # whether it is compiled by this command alone, not by the tests

    @property
    def chip(self) -> str:
        return self.topology.partition(':')[0]

    def make(self) -> ConfigDict:
        """Returns the config, which `validate` accepts."""
        c = importlib.import_module(f'configs.{self.config}').get_config()
        c.update(self.fields | {'chip': self.chip})
        c.mesh.update(self.mesh)
        c.model.update(self.model)
        validate(c, 10_000, needs_data=False)
        return c


# The peak is in the update, as the batch is small.
MUON = {
    'batch_size': 8, 'seq_len': 1024, 'microbatches': 1, 'model': {'remat': 'full'},
    'optimizer': {'name': 'muon'},
}  # fmt: skip
SMALL_H100 = {'batch_size': 64}
LONG = {'seq_len': 65_536, 'batch_size': 4}
KINDS = {
    'block': ('gqa_window+dense', 'gqa_nope+dense'), 'window': 1024, 'remat': 'full',
    'attention_sinks': True, 'attention_gate': True, 'attention_bias': 'qkvo',
}  # fmt: skip
NAMED = {'remat': 'full', 'remat_keep': ('attention', 'qkv'), 'tie_embeddings': False}
OFFLOADED = {'remat': 'full', 'remat_keep': ('attention',), 'remat_offload': ('qkv', 'residual')}
# Of configs/tpu_v4_best.py, whose kernels are TPUs'.
ANY_KERNEL = {'attention_kernel': 'auto', 'expert_kernel': 'auto', 'remat_keep': ()}
EIGHT_MOE = ANY_KERNEL | {'block': ('moe',), 'n_layers': 8}

CASES = {
    'tpu stages': Case('tpu_v4', 'v4:2x4x4', model={'block': ('dense',)}),
    'tpu best': Case('tpu_v4_best', 'v4:2x4x4', long=True),
    'tpu experts': Case(
        'tpu_v4', 'v4:2x4x4', {'microbatches': 1}, {'pp': 1, 'fsdp': 16, 'ep': 2, 'tp': 1},
        EIGHT_MOE | {'remat': 'none'},
    ),
    'tpu kept by name': Case('gpu_h100', 'v5p:2x2x2', model=NAMED, long=True),
    'tpu muon': Case('gpu_h100', 'v5p:2x2x2', MUON),
    'tpu kinds': Case('gpu_h100', 'v5p:2x2x2', model=KINDS),
    'tpu offload': Case('gpu_h100', 'v5p:2x2x2', model=OFFLOADED, long=True),
    'tpu ring': Case('long_context', 'v5p:4x4x4', long=True),
    'tpu ring, 8 chips': Case(
        'long_context', 'v5p:2x2x2', LONG, {'fsdp': 2, 'cp': 4}, long=True
    ),
    'tpu gathered cp': Case(
        'long_context', 'v5p:2x2x2', LONG | {'cp_style': 'gather'}, {'fsdp': 2, 'cp': 4},
        {'attention_kernel': 'splash'}, long=True,
    ),
    'tpu whole sequences': Case('long_context', 'v5p:2x2x2', {}, {'cp': 1}, long=True),
    'tpu llama': Case('llama3_8b', 'v5p:4x4x4', long=True),
    'tpu heads': Case(
        'llama3_8b', 'v6e:4x4', {'batch_size': 64, 'microbatches': 2}, {'fsdp': 8, 'tp': 2},
        long=True,
    ),
    'tpu linear': Case(
        'linear', 'v5p:2x2x1', {'seq_len': 4096, 'batch_size': 4}, {'fsdp': 4, 'cp': 1},
        {'n_layers': 4, 'block': ('gdn+dense',), 'attention_block': 256}, long=True,
    ),
    'tpu7x': Case('tpu7x', 'tpu7x:4x4x4', long=True),
    'tpu7x, 4 chips': Case(
        'tpu7x', 'tpu7x:2x2x1', {'batch_size': 16}, {'fsdp': 8}, {'n_layers': 4}, long=True
    ),
    'gpu': Case('gpu_h100', 'h100:8'),
    'gpu stages': Case('tpu_v4', 'h100:8', SMALL_H100, {'fsdp': 2}, {'block': ('dense',)}),
    'gpu experts': Case('tpu_v4_best', 'h100:8', SMALL_H100, {'fsdp': 8}, EIGHT_MOE),
    'gpu experts, clipped': Case(
        'tpu_v4_best', 'h100:8', SMALL_H100, {'fsdp': 8}, EIGHT_MOE | {'swiglu_limit': 7.0},
        long=True,
    ),
    'gpu experts apart': Case(
        'tpu_v4_best', 'h100:8', SMALL_H100, {'fsdp': 4, 'ep': 2}, EIGHT_MOE | {'remat': 'full'},
        long=True,
    ),
    'gpu best': Case('tpu_v4_best', 'h100:8', SMALL_H100, {'fsdp': 8}, ANY_KERNEL, long=True),
    'gpu head of its own': Case(
        'llama3_8b', 'h100:8', {'batch_size': 128, 'microbatches': 16}, {'fsdp': 8}
    ),
    'gpu kept by name': Case('gpu_h100', 'h100:8', model=NAMED, long=True),
    'gpu muon': Case('gpu_h100', 'h100:8', MUON),
    'gpu kinds': Case('gpu_h100', 'h100:8', model=KINDS, long=True),
    'gpu offload': Case(
        'gpu_h100', 'h100:8', model={'remat': 'full', 'remat_offload': ('qkv', 'residual')}
    ),
    'gpu heads': Case('gpu_h100', 'h100:8', {}, {'fsdp': 4, 'tp': 2}, long=True),
    'gpu gathered once': Case(
        'gpu_h100', 'h100:8', {'fsdp_gather': 'step'}, model={'remat': 'full'}
    ),
    'gpu kept': Case(
        'gpu_h100', 'h100:8', {'batch_size': 64}, model={'remat': 'none', 'n_layers': 12}, long=True
    ),
    'gpu ring': Case('long_context', 'h100:8', LONG, {'fsdp': 2, 'cp': 4}),
    'gpu gathered cp': Case(
        'long_context', 'h100:8', LONG | {'cp_style': 'gather'}, {'fsdp': 2, 'cp': 4}
    ),
    'b200': Case('gpu_b200', 'b200:8'),
}  # fmt: skip


def compiler_of(chip: str) -> str:
    """Returns the package that compiles for a chip, with its version; '' if it is missing."""
    package, version = next(iter(compiler_versions(CHIPS[chip].platform).items()))
    return f'{package} {version}' if version else ''


def compare(name: str) -> common.Figures:
    """Compiles a case, and returns its estimate beside the compiler's figure, in GB; of one that
    does not compile 0, and the reason."""
    case, start = CASES[name], time.perf_counter()
    config, chip = case.make(), CHIPS[case.chip]
    e = estimate(config, chip)
    found = compiled(config, e, 1, case.topology)
    peak = found.answer.peak if found.answer else 0.0
    return {
        'case': name,
        'topology': case.topology,
        'compiler': compiler_of(case.chip),
        'estimate_GB': e.memory.peak / GB,
        'compiled_GB': peak / GB,
        'off_%': 100 * (e.memory.peak / peak - 1) if peak else 0.0,
        'seconds': time.perf_counter() - start,
        'note': '' if peak else found.why,
    }


def chosen(beginnings: str) -> list[str]:
    """Returns the cases whose compiler is installed, of those that begin so, all if ''. Raises
    ConfigError if there is none."""
    wanted = tuple(x.strip() for x in beginnings.split(',') if x.strip()) or ('',)
    names = [x for x in CASES if x.startswith(wanted)]
    found = [x for x in names if compiler_of(CASES[x].chip)]
    if not found:
        raise ConfigError(
            f'no case of --cases={beginnings!r} has its compiler; pip install -r '
            f'requirements/tpu.txt or requirements/gpu.txt, and name the beginnings of '
            f'{", ".join(CASES)}'
        )
    return found


def measure() -> list[common.Figures]:
    """Compares the cases of --cases whose compiler is installed."""
    jax.config.update('jax_platforms', 'cpu')
    names = chosen(FLAGS.cases)
    rows = []
    for i, name in enumerate(names, 1):
        print(f'{name}: {i} of {len(names)}', file=sys.stderr, flush=True)
        rows.append(compare(name))
    return rows


if __name__ == '__main__':
    flags.DEFINE_string('cases', '', 'Beginnings of names of cases, with commas; all if empty.')
    common.run(measure)
