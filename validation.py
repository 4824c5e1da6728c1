"""What a config must fulfil, checked before anything compiles: each rule with its remedy."""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from attention import ATTENTION
from layers import ModelConfig
from model import FEED_FORWARD, REMAT
from optimizer import OptimizerConfig
from parallel import AXES


def model_config(config: ConfigDict) -> ModelConfig:
    return ModelConfig(compute_dtype=config.compute_dtype, **config.model)


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    return OptimizerConfig(steps=config.steps, **config.optimizer)


def divisors(n: int) -> str:
    small = [str(d) for d in range(1, min(n, 64) + 1) if n % d == 0]
    return ', '.join(small[:-1]) + (' or ' if small[:-1] else '') + small[-1]


def division_errors(config: ConfigDict) -> Iterator[str]:
    """What does not divide, with what would."""
    m, mesh = config.model, config.mesh
    tp = {'model.n_heads': m.n_heads, 'model.d_ff': m.d_ff, 'model.vocab_size': m.vocab_size}
    fsdp = {'model.d_model': m.d_model}
    if m.attention == 'mla':
        fsdp |= {'model.kv_rank': m.kv_rank} | ({'model.q_rank': m.q_rank} if m.q_rank else {})
    elif m.n_kv_heads > 1:
        tp['model.n_kv_heads'] = m.n_kv_heads
    for axis, sizes in (('tp', tp | {'seq_len': config.seq_len}), ('fsdp', fsdp)):
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
    if m.n_layers % len(m.block):
        yield (
            f'model.n_layers={m.n_layers} is not a multiple of the {len(m.block)} layers of '
            f'model.block={tuple(m.block)}; use a multiple of {len(m.block)}'
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
    rotary = 'rope_dim' if m.attention == 'mla' else 'head_dim'
    if m[rotary] % 2:
        yield f'model.{rotary}={m[rotary]} is odd, but rotation takes pairs; use {m[rotary] + 1}'


def value_errors(config: ConfigDict) -> Iterator[str]:
    """Values out of range and names that do not exist."""
    may_be_zero = {
        'seed', 'eval.every', 'eval.batches', 'log.every', 'optimizer.warmup_steps',
        'optimizer.decay_steps', 'model.q_rank', 'checkpoint.every', 'checkpoint.keep',
        'checkpoint.keep_every',
    }  # fmt: skip
    flat = dict(config)
    for group in ('model', 'mesh', 'data', 'optimizer', 'eval', 'log', 'checkpoint'):
        flat |= {f'{group}.{k}': v for k, v in flat.pop(group).items()}
    for name, value in flat.items():
        least = 0 if name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield f'{name}={value} is below {least}; use {least} or more'
        if isinstance(value, float) and value < 0:
            yield f'{name}={value} is negative; use 0 or more'
    choices = {
        'compute_dtype': ('float32', 'bfloat16'),
        'model.attention': ATTENTION,
        'model.remat': REMAT,
        'model.rope_scaling': ('none', 'linear', 'yarn'),
        'optimizer.schedule': ('cosine', 'wsd'),
    }
    for name, allowed in choices.items():
        if flat[name] not in allowed:
            yield f'{name}={flat[name]!r} is unknown; use one of {", ".join(allowed)}'
    for kind in flat['model.block']:
        if kind not in FEED_FORWARD:
            yield f'model.block has the unknown kind {kind!r}; use {", ".join(FEED_FORWARD)}'
    if not flat['model.block']:
        yield "model.block=() is empty; use at least one kind of layer, as in ('dense',)"
    if flat['model.dropout'] >= 1:
        yield f'model.dropout={flat["model.dropout"]} drops everything; use a share below 1'
    if flat['model.rope_factor'] < 1:
        yield f'model.rope_factor={flat["model.rope_factor"]} shortens the context; use 1 or more'
    for name in ('optimizer.b1', 'optimizer.b2'):
        if flat[name] >= 1:
            yield f'{name}={flat[name]} never forgets; use a value below 1'
    if not flat['data.path']:
        yield "data.path is empty; use a folder that data.py wrote, or 'stdlib'"
    for axis in ('pp', 'ep'):
        if flat[f'mesh.{axis}'] > 1:
            yield f'mesh.{axis}={flat[f"mesh.{axis}"]}: this axis is not built yet; use 1'


def validate(config: ConfigDict, n_devices: int) -> None:
    """Raises one ValueError with all that is wrong: each rule, its values, and the remedy."""
    errors = list(value_errors(config))
    if not errors:
        errors += division_errors(config)
        needed = int(np.prod([config.mesh[axis] for axis in AXES]))
        if needed > n_devices:
            errors.append(
                f'the mesh takes {needed} devices and {n_devices} are there; use a smaller mesh, '
                f'or --cpu_devices={needed} to simulate them'
            )
    if errors:
        raise ValueError('the config cannot run:\n' + '\n'.join(f'  - {e}' for e in errors))
