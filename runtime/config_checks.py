"""The rules that a config must fulfil, checked before anything compiles: each with its remedy.

Rules of one layer kind, kernel or optimizer stand beside it, in its record.
"""

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from config import REMAT_NAMES, ConfigError, divisors, flat, indivisible
from data import source_errors
from layers.attention import ATTENTION, attention_sizes
from layers.attention_kernels import ATTENTION_KERNELS
from layers.expert_kernels import EXPERT_KERNELS
from layers.kernels import kernel_errors, names
from machine.chips import CHIPS
from model import FEED_FORWARD, REMAT
from optimizer import OPTIMIZERS
from parallel import AXES, FSDP, TP
from pipeline.schedules import NAMES
from runtime.writers import WRITERS
from train_step import train_schedule

MAY_BE_ZERO = {
    'seed', 'eval.every', 'eval.batches', 'log.every', 'optimizer.warmup_steps',
    'optimizer.decay_steps', 'model.q_rank', 'model.first_dense', 'model.n_shared_experts',
    'log.loads_every', 'checkpoint.every', 'checkpoint.keep', 'checkpoint.keep_every',
    'log.sample_every', 'guard.max_skips',
}  # fmt: skip


def validate(
    config: ConfigDict, n_devices: int, n_processes: int = 1, needs_data: bool = True
) -> None:
    """Raises one ConfigError with all that is wrong: each rule, its values, and the remedy.

    `needs_data=False` leaves out data.path and data.sources, for plans.
    """
    fields = flat(config.to_dict())
    errors = [*choice_errors(fields), *number_errors(fields), *value_errors(config)]
    if needs_data:
        errors += source_errors(config)
    if not errors:
        errors += layout_errors(config)
        errors += kind_errors(config)
        errors += remat_errors(config)
        errors += pipeline_errors(config)
        errors += device_errors(config, n_devices, n_processes)
    if errors:
        raise ConfigError('the config cannot run:\n' + '\n'.join(f'  - {e}' for e in errors))


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


def choice_errors(fields: dict[str, Any]) -> Iterator[str]:
    """Yields errors for names that do not exist."""
    choices = {
        'compute_dtype': ('float32', 'bfloat16'),
        'model.attention': ATTENTION,
        'model.attention_kernel': names(ATTENTION_KERNELS),
        'model.expert_kernel': names(EXPERT_KERNELS),
        'model.remat': REMAT,
        'model.router': ('sigmoid', 'softmax'),
        'fsdp_gather': ('layer', 'step'),
        'pipeline.schedule': NAMES,
        'model.rope_scaling': ('none', 'linear', 'yarn'),
        'optimizer.name': OPTIMIZERS,
        'optimizer.lr_schedule': ('cosine', 'wsd'),
        'chip': ('cpu', *CHIPS),
    }
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            yield f'{name}={fields[name]!r} is unknown; use one of {", ".join(allowed)}'
    lists = {
        'model.remat_keep': REMAT_NAMES,
        'model.remat_offload': REMAT_NAMES,
        'model.block': FEED_FORWARD,
    }
    for name, allowed in lists.items():
        for entry in fields[name]:
            if entry not in allowed:
                kind = ' kind' if name == 'model.block' else ''
                yield f'{name} has the unknown{kind} {entry!r}; use {", ".join(allowed)}'
    for entry in fields['log.writers']:
        if entry not in WRITERS:
            yield (
                f'log.writers has the unknown {entry!r}; use {", ".join(WRITERS)}, or both as in '
                f"--config.log.writers=\"('tensorboard', 'wandb')\""
            )
    for entry in fields['compiler_options'].split():
        if '=' not in entry:
            yield f"compiler_options has {entry!r}, which sets nothing; use 'name=value ...'"


def number_errors(fields: dict[str, Any]) -> Iterator[str]:
    """Yields errors for counts below 1, or 0 where they may be, and for negative numbers."""
    for name, value in fields.items():
        least = -1 if name == 'model.document_end' else 0 if name in MAY_BE_ZERO else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield f'{name}={value} is below {least}; use {least} or more'
        if isinstance(value, float) and value < 0:
            yield f'{name}={value} is negative; use 0 or more'


def value_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for values out of their range."""
    m, spike = config.model, config.guard.spike_factor
    if not m.block:
        yield "model.block=() is empty; use at least one kind of layer, as in ('dense',)"
    if m.dropout >= 1:
        yield f'model.dropout={m.dropout} drops everything; use a share below 1'
    if m.rope_factor < 1:
        yield f'model.rope_factor={m.rope_factor} shortens the context; use 1 or more'
    if 0 < spike <= 1:
        yield (
            f'guard.spike_factor={spike} skips ordinary steps; use a factor above 1, or 0 for none'
        )
    if config.optimizer.name in OPTIMIZERS:
        yield from OPTIMIZERS[config.optimizer.name].rules(config)


# ---------------------------------------------------------------------------------------------
# Sizes, kinds and devices, of a config whose values are right
# ---------------------------------------------------------------------------------------------


def layout_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes that the mesh or the blocks do not divide, with those that would."""
    m, mesh = config.model, config.mesh
    yield from indivisible(config, TP, ['model.n_heads', 'model.vocab_size', 'seq_len'])
    yield from indivisible(config, FSDP, ['model.d_model'])
    shards = mesh.dp * mesh.fsdp * mesh.ep * config.microbatches
    if config.batch_size % shards:
        yield (
            f'batch_size={config.batch_size} is not divisible by mesh.dp * mesh.fsdp * mesh.ep * '
            f'microbatches={shards}; use a multiple of {shards}'
        )
    in_blocks = m.n_layers - m.first_dense
    if in_blocks <= 0 or in_blocks % len(m.block):
        yield (
            f'model.n_layers={m.n_layers} - model.first_dense={m.first_dense} is not a multiple of '
            f'the {len(m.block)} layers of model.block={tuple(m.block)}; use a multiple of '
            f'{len(m.block)}, and at least one'
        )
    if config.seq_len % min(m.attention_block, config.seq_len):
        yield (
            f'seq_len={config.seq_len} is not a multiple of model.attention_block='
            f'{m.attention_block}; use a block of {divisors(config.seq_len)}'
        )


def kind_errors(config: ConfigDict) -> Iterator[str]:
    """Yields the errors of the kinds of layers and kernels that the config names."""
    m = config.model
    head = attention_sizes(m).key
    yield from ATTENTION[m.attention].rules(config)
    yield from kernel_errors(ATTENTION_KERNELS, 'attention_kernel', config, head)
    kinds = dict.fromkeys((*m.block, *(('dense',) if m.first_dense else ())))
    for kind in kinds:
        yield from FEED_FORWARD[kind].rules(config)
    if any(FEED_FORWARD[kind].routed for kind in kinds):
        yield from kernel_errors(EXPERT_KERNELS, 'expert_kernel', config, head)


def remat_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for exceptions from rematerialization that would be ignored."""
    m = config.model
    for field in ('remat_keep', 'remat_offload'):
        if m[field] and m.remat != 'full':
            yield (
                f"model.{field}={tuple(m[field])} are exceptions from remat='full', and "
                f"model.remat={m.remat!r}; use 'full', or none of them"
            )


def pipeline_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for stages, chunks and microbatches that do not go together."""
    m, mesh, p = config.model, config.mesh, config.pipeline
    if mesh.pp == 1:
        if p.chunks > 1:
            yield f'pipeline.chunks={p.chunks} cuts stages, but mesh.pp=1 has none; use 1'
        return
    n_blocks, parts = (m.n_layers - m.first_dense) // len(m.block), mesh.pp * p.chunks
    if n_blocks % parts:
        yield (
            f'the {n_blocks} blocks of the model are not divisible by mesh.pp * pipeline.chunks='
            f'{parts}; use a product of {divisors(n_blocks)}'
        )
    tokens = config.batch_size // config.microbatches // (mesh.dp * mesh.fsdp * mesh.ep)
    tokens *= config.seq_len // mesh.tp
    if tokens % mesh.pp:
        yield (
            f"a microbatch's {tokens} tokens on a device are not divisible by mesh.pp={mesh.pp}, "
            f'whose stages share the head; use a pp of {divisors(tokens)}'
        )
    try:
        train_schedule(config)
    except ConfigError as error:
        yield f'pipeline: {error}'


def device_errors(config: ConfigDict, n_devices: int, n_processes: int) -> Iterator[str]:
    """Yields errors for a mesh that does not fit the devices."""
    needed = math.prod(config.mesh[axis] for axis in AXES)
    if needed > n_devices:
        yield (
            f'the mesh takes {needed} devices and {n_devices} are there; use a smaller mesh, '
            f'or --cpu_devices={needed} to simulate them'
        )
    elif n_processes > 1 and needed < n_devices:
        yield (
            f'the mesh takes {needed} of the {n_devices} devices that {n_processes} processes '
            f'have; use a mesh of all of them, since no process may be left out'
        )
