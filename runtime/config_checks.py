"""What a config must fulfil, checked before anything compiles: each rule with its remedy."""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from config import REMAT_NAMES, divisors
from data import source_errors
from layers.attention import ATTENTION
from layers.attention_kernels import CUDNN_HEAD, KERNELS, SPLASH_LANES, key_size
from layers.expert_kernels import EXPERT_KERNELS
from machine.chips import CHIPS
from model import FEED_FORWARD, REMAT
from parallel import AXES
from pipeline.schedules import NAMES, make_schedule
from runtime.writers import WRITERS


def division_errors(config: ConfigDict) -> Iterator[str]:
    """What does not divide, with what would."""
    m, mesh = config.model, config.mesh
    tp = {'model.n_heads': m.n_heads, 'model.d_ff': m.d_ff, 'model.vocab_size': m.vocab_size}
    fsdp, ep = {'model.d_model': m.d_model}, {}
    if 'moe' in m.block:
        tp['model.d_expert'] = m.d_expert
        ep['model.n_experts'] = m.n_experts
        yield from moe_errors(config)
    if m.attention == 'mla':
        fsdp |= {'model.kv_rank': m.kv_rank} | ({'model.q_rank': m.q_rank} if m.q_rank else {})
    elif m.n_kv_heads > 1:
        tp['model.n_kv_heads'] = m.n_kv_heads
    for axis, sizes in (('tp', tp | {'seq_len': config.seq_len}), ('fsdp', fsdp), ('ep', ep)):
        for name, size in sizes.items():
            if size % mesh[axis]:
                yield (
                    f'{name}={size} is not divisible by mesh.{axis}={mesh[axis]}; '
                    f'use a {axis} of {divisors(size)}'
                )
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
    if m.attention == 'gqa' and m.n_heads % m.n_kv_heads:
        yield (
            f'model.n_heads={m.n_heads} is not divisible by model.n_kv_heads={m.n_kv_heads}; '
            f'use {divisors(m.n_heads)} key/value heads'
        )
    if config.seq_len % min(m.attention_block, config.seq_len):
        yield (
            f'seq_len={config.seq_len} is not a multiple of model.attention_block='
            f'{m.attention_block}; use a block of {divisors(config.seq_len)}'
        )
    yield from attention_errors(config)
    yield from pipeline_errors(config)
    rotary = 'rope_dim' if m.attention == 'mla' else 'head_dim'
    if m[rotary] % 2:
        yield f'model.{rotary}={m[rotary]} is odd, but rotation takes pairs; use {m[rotary] + 1}'


def attention_errors(config: ConfigDict) -> Iterator[str]:
    """What the kernels do not take, and what remat would ignore."""
    m = config.model
    kernel, block = m.attention_kernel, min(m.attention_block, config.seq_len)
    if kernel in ('splash', 'cudnn') and config.check_vma:
        yield (
            f'model.attention_kernel={kernel!r} has no replication types, which check_vma=True '
            f"checks; use check_vma=False, or 'blockwise'"
        )
    if kernel == 'splash' and block % SPLASH_LANES:
        yield (
            f'model.attention_block={m.attention_block} with seq_len={config.seq_len} makes '
            f'blocks of {block}, and splash takes multiples of {SPLASH_LANES}; use a multiple of '
            f'it that divides seq_len'
        )
    if kernel == 'cudnn' and config.compute_dtype != 'bfloat16':
        yield (
            f"model.attention_kernel='cudnn' does not take compute_dtype={config.compute_dtype!r}; "
            f"use 'bfloat16', or the kernel 'blockwise'"
        )
    if kernel == 'cudnn' and (key_size(m) % 8 or key_size(m) > 2 * CUDNN_HEAD):
        yield (
            f"model.attention_kernel='cudnn' does not take heads of {key_size(m)} for queries and "
            f'keys; use a multiple of 8 up to {CUDNN_HEAD} ({2 * CUDNN_HEAD} on Hopper and later), '
            f"or the kernel 'blockwise'"
        )
    for field in ('remat_keep', 'remat_offload'):
        if m[field] and m.remat != 'full':
            yield (
                f"model.{field}={tuple(m[field])} are exceptions from remat='full', and "
                f"model.remat={m.remat!r}; use 'full', or none of them"
            )
        for name in m[field]:
            if name not in REMAT_NAMES:
                yield f'model.{field} has the unknown {name!r}; use {", ".join(REMAT_NAMES)}'


def pipeline_errors(config: ConfigDict) -> Iterator[str]:
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
        make_schedule(p.schedule, mesh.pp, config.microbatches, p.chunks)
    except ValueError as error:
        yield f'pipeline: {error}'


def moe_errors(config: ConfigDict) -> Iterator[str]:
    m, ep = config.model, config.mesh.ep
    if m.experts_per_token > m.n_experts:
        yield (
            f'model.experts_per_token={m.experts_per_token} is above model.n_experts='
            f'{m.n_experts}; use {m.n_experts} or fewer'
        )
    if m.n_experts % m.n_expert_groups:
        yield (
            f'model.n_experts={m.n_experts} is not divisible by model.n_expert_groups='
            f'{m.n_expert_groups}; use {divisors(m.n_experts)} groups'
        )
    elif m.n_top_groups > m.n_expert_groups:
        yield (
            f'model.n_top_groups={m.n_top_groups} is above model.n_expert_groups='
            f'{m.n_expert_groups}; use {m.n_expert_groups} or fewer'
        )
    elif m.n_top_groups * (m.n_experts // m.n_expert_groups) < m.experts_per_token:
        yield (
            f'model.n_top_groups={m.n_top_groups} of {m.n_experts // m.n_expert_groups} experts '
            f'cannot offer model.experts_per_token={m.experts_per_token}; use more groups'
        )
    if m.expert_kernel == 'pallas' and config.check_vma:
        yield (
            "model.expert_kernel='pallas' has no replication types, which check_vma=True checks; "
            "use check_vma=False, or 'blocks'"
        )
    if ep > 1 and m.buffer_factor and m.buffer_factor < 1:
        yield (
            f'model.buffer_factor={m.buffer_factor} has less room than an even spread takes; '
            f'use 1 or more, or 0 for room for all'
        )


def value_errors(config: ConfigDict) -> Iterator[str]:
    """Values out of range and names that do not exist."""
    may_be_zero = {
        'seed', 'eval.every', 'eval.batches', 'log.every', 'optimizer.warmup_steps',
        'optimizer.decay_steps', 'model.q_rank', 'model.first_dense', 'model.n_shared_experts',
        'log.loads_every', 'checkpoint.every', 'checkpoint.keep', 'checkpoint.keep_every',
        'log.sample_every', 'guard.max_skips',
    }  # fmt: skip
    flat = dict(config)
    for group in [name for name, value in flat.items() if isinstance(value, ConfigDict)]:
        flat |= {f'{group}.{k}': v for k, v in flat.pop(group).items()}
    for name, value in flat.items():
        least = -1 if name == 'model.document_end' else 0 if name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield f'{name}={value} is below {least}; use {least} or more'
        if isinstance(value, float) and value < 0:
            yield f'{name}={value} is negative; use 0 or more'
    choices = {
        'compute_dtype': ('float32', 'bfloat16'),
        'model.attention': ATTENTION,
        'model.attention_kernel': ('auto', *KERNELS),
        'model.expert_kernel': ('auto', *EXPERT_KERNELS),
        'model.remat': REMAT,
        'model.router': ('sigmoid', 'softmax'),
        'fsdp_gather': ('layer', 'step'),
        'pipeline.schedule': NAMES,
        'model.rope_scaling': ('none', 'linear', 'yarn'),
        'optimizer.schedule': ('cosine', 'wsd'),
        'chip': ('cpu', *CHIPS),
    }
    for name, allowed in choices.items():
        if flat[name] not in allowed:
            yield f'{name}={flat[name]!r} is unknown; use one of {", ".join(allowed)}'
    for kind in flat['model.block']:
        if kind not in FEED_FORWARD:
            yield f'model.block has the unknown kind {kind!r}; use {", ".join(FEED_FORWARD)}'
    if not flat['model.block']:
        yield "model.block=() is empty; use at least one kind of layer, as in ('dense',)"
    for entry in config.compiler_options.split():
        if '=' not in entry:
            yield f"compiler_options has {entry!r}, which sets nothing; use 'name=value ...'"
    if flat['model.dropout'] >= 1:
        yield f'model.dropout={flat["model.dropout"]} drops everything; use a share below 1'
    if flat['model.rope_factor'] < 1:
        yield f'model.rope_factor={flat["model.rope_factor"]} shortens the context; use 1 or more'
    for name in flat['log.writers']:
        if name not in WRITERS:
            yield (
                f'log.writers has the unknown {name!r}; use {", ".join(WRITERS)}, or both as in '
                f"--config.log.writers=\"('tensorboard', 'wandb')\""
            )
    if 0 < flat['guard.spike_factor'] <= 1:
        yield (
            f'guard.spike_factor={flat["guard.spike_factor"]} skips ordinary steps; use a factor '
            f'above 1, or 0 for none'
        )
    for name in ('optimizer.b1', 'optimizer.b2'):
        if flat[name] >= 1:
            yield f'{name}={flat[name]} never forgets; use a value below 1'


def validate(config: ConfigDict, n_devices: int, n_processes: int = 1) -> None:
    """Raises one ValueError with all that is wrong: each rule, its values, and the remedy."""
    errors = [*value_errors(config), *source_errors(config)]
    if not errors:
        errors += division_errors(config)
        needed = int(np.prod([config.mesh[axis] for axis in AXES]))
        if needed > n_devices:
            errors.append(
                f'the mesh takes {needed} devices and {n_devices} are there; use a smaller mesh, '
                f'or --cpu_devices={needed} to simulate them'
            )
        elif n_processes > 1 and needed < n_devices:
            errors.append(
                f'the mesh takes {needed} of the {n_devices} devices that {n_processes} processes '
                f'have; use a mesh of all of them, since no process may be left out'
            )
    if errors:
        raise ValueError('the config cannot run:\n' + '\n'.join(f'  - {e}' for e in errors))
