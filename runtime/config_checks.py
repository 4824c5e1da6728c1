"""The rules that a config must fulfil, checked before anything compiles: each with its remedy.

Rules of one layer kind, kernel or optimizer stand beside it, in its record.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from config import (
    EXPERTS,
    MATMUL_TYPES,
    NOPE,
    QKV,
    REMAT_NAMES,
    WINDOW,
    ConfigError,
    LayerKind,
    divisors,
    flat,
    in_phase,
    indivisible,
    layer_kind,
    model_config,
    model_kinds,
    of_layer,
    phases,
    without_schedule,
)
from configs import default
from data import packing_errors, schedule_errors, source_errors
from layers.attention import ATTENTION, attention_sizes, linear_kinds
from layers.attention_kernels import ATTENTION_KERNELS, LATENT_KERNELS
from layers.context_parallel import STYLES
from layers.expert_kernels import EXPERT_KERNELS
from layers.kernels import AUTO, kernel_errors, names, portable
from layers.moe import GROUP_SCORES
from layers.rope_scaling import REFUSED, SCALINGS
from machine.chips import CHIPS
from machine.config_flag import RECORDS
from model import FEED_FORWARD, REMAT, is_linear, kernel_layers
from optimizer import COEFFICIENTS, OPTIMIZERS, SCALES
from parallel import AXES, CP, DP, EP, FSDP, PP, REDUCES, TP
from pipeline.schedules import CLOCKS, NAMES, check_settings
from runtime.writers import WRITERS
from train_step import compiler_options, pipeline_costs

GATHERS = ('layer', 'step')
INT32 = 2**31 - 1  # counts are int32 on the device
FLOAT32 = 3e38  # the largest number, and below the smallest that is not 0, in float32
TINY = 1e-30
BELOW_1 = 1 - 2**-24  # as float32
YEAR = 366 * 86400.0  # longer waits overflow what the system waits with

DEFAULTS = flat(default.get_config().to_dict())
# By the type of a field's default: the types of its values, and their name for people.
TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), 'True or False'),
    int: ((int,), 'a whole number'),
    float: ((int, float), 'a number'),
    str: ((str,), 'a text'),
    tuple: ((tuple,), "a tuple, as in ('a', 'b')"),
}

# Fields that are off by default, by the kinds of attention or feed-forward that read them.
OF_KIND = {
    ('gqa',): ('rotary_dim', 'qk_norm_over'),
    ('mla',): ('latent_norm_eps',),
    ('moe',): ('router_bias', 'expert_bias', 'shared_gate'),
    ('gdn', 'kda'): ('delta_key_heads',),
}

# The least and the largest value of each numeric field; further rules may narrow them.
RANGES: dict[str, tuple[float, float]] = {
    'seed': (0, 2**32 - 1),  # jax would take it modulo 2**32
    **dict.fromkeys(
        ('steps', 'batch_size', 'seq_len', 'microbatches', *(f'mesh.{axis}' for axis in AXES),
         'pipeline.chunks', 'log.sample_tokens', 'model.vocab_size', 'model.d_model',
         'model.n_layers', 'model.d_ff', 'model.n_experts', 'model.experts_per_token',
         'model.d_expert', 'model.n_expert_groups', 'model.n_top_groups', 'model.n_heads',
         'model.n_kv_heads', 'model.head_dim', 'model.kv_rank', 'model.nope_dim', 'model.rope_dim',
         'model.v_dim', 'model.rope_original_len', 'model.attention_block', 'model.loss_chunk',
         'model.delta_heads', 'model.delta_key_dim', 'model.delta_value_dim', 'model.delta_conv'),
        (1, INT32),
    ),
    **dict.fromkeys(
        ('optimizer.warmup_steps', 'optimizer.decay_steps', 'eval.every', 'eval.batches',
         'eval.tasks_every',
         'log.every', 'log.loads_every', 'log.sample_every', 'checkpoint.every', 'checkpoint.keep',
         'checkpoint.keep_every', 'guard.max_skips', 'model.first_dense', 'model.n_shared_experts',
         'model.q_rank', 'model.window', 'model.rotary_dim', 'model.delta_key_heads',
         'data.max_documents'),
        (0, INT32),
    ),
    'model.document_end': (-1, INT32),
    **dict.fromkeys(
        ('optimizer.peak_lr', 'optimizer.final_lr', 'optimizer.weight_decay', 'optimizer.clip_norm',
         'optimizer.muon.adamw_lr',
         'model.routed_scale', 'model.balance_loss', 'model.router_z_loss', 'model.z_loss',
         'model.capacity_factor', 'model.buffer_factor', 'model.swiglu_limit',
         'log.sample_temperature',
         'guard.spike_factor', 'peak_flops'),
        (0, FLOAT32),
    ),
    **dict.fromkeys(
        ('optimizer.b1', 'optimizer.b2', 'optimizer.ema', 'optimizer.muon.momentum',
         'model.dropout'),
        (0, BELOW_1),
    ),
    'optimizer.muon.steps': (1, 100),
    **dict.fromkeys(('optimizer.eps', 'model.norm_eps'), (TINY, 1)),
    **dict.fromkeys(('model.bias_rate', 'model.latent_norm_eps'), (0, 1)),
    'model.rope_base': (1, FLOAT32),
    **dict.fromkeys(
        ('model.rope_beta_fast', 'model.rope_beta_slow', 'model.rope_low_freq_factor',
         'model.rope_high_freq_factor'),
        (TINY, FLOAT32),
    ),
    **dict.fromkeys(
        ('model.rope_mscale', 'model.rope_mscale_all_dim', 'model.rope_attention_factor'),
        (0, FLOAT32),
    ),
    'model.rope_factor': (1, FLOAT32),
    'guard.history': (1, 10**6),  # norms that each device holds
    'guard.step_seconds': (0, YEAR),
    'guard.pause_seconds': (0, YEAR),
    'guard.heartbeat_seconds': (1, int(YEAR)),
}  # fmt: skip


def validate(
    config: ConfigDict, n_devices: int, n_processes: int = 1, needs_data: bool = True
) -> None:
    """Raises one ConfigError with all that is wrong: each rule, its values, and the remedy.

    `needs_data=False` leaves out data.path and data.sources, for plans.
    """
    errors = field_errors(config)
    if needs_data and isinstance(config.data.sources, tuple):
        errors += source_errors(config)
    if not errors:
        errors += phase_errors(config)
        errors += remat_errors(config)
        errors += device_errors(config, n_devices, n_processes)
    refuse(errors)


def check_fields(config: ConfigDict) -> None:
    """Raises ConfigError for values that are wrong by themselves, before any device is known."""
    refuse(field_errors(config))


def refuse(errors: list[str]) -> None:
    """Raises one ConfigError of all errors, if there are any."""
    if errors:
        raise ConfigError('the config cannot run:\n' + '\n'.join(f'  - {e}' for e in errors))


def field_errors(config: ConfigDict) -> list[str]:
    """Lists what is wrong with single fields."""
    fields = flat(config.to_dict())
    errors = [*type_errors(fields)]
    if not errors:  # the others compare values
        errors += [*choice_errors(fields), *number_errors(fields), *value_errors(config)]
    return errors


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


def type_errors(fields: dict[str, Any]) -> Iterator[str]:
    """Yields errors for values of another type than the default, and entries that are no text."""
    for name, example in DEFAULTS.items():
        value, (types, needed) = fields[name], TYPES[type(example)]
        if type(value) not in types:
            yield f'{name}={value!r} is of the type {type(value).__name__}; use {needed}'
        elif type(value) is tuple and name not in RECORDS:
            for entry in value:
                if not isinstance(entry, str):
                    text = ':'.join(map(str, entry)) if isinstance(entry, tuple) else str(entry)
                    yield f'{name}={value!r} holds {entry!r}; use texts, as in ({text!r},)'


def choices() -> dict[str, Collection[str]]:
    """Returns the values of the fields that name something, as the tables have them now."""
    return {
        'compute_dtype': ('float32', 'bfloat16'),
        'data.packing': ('stream', 'best_fit'),
        'model.attention': ATTENTION,
        'model.attention_bias': ('none', 'qkv', 'qkvo'),
        'model.norms': ('before', 'after'),
        'model.qk_norm_over': ('head', 'heads'),
        'model.attention_kernel': names(ATTENTION_KERNELS),
        'model.expert_kernel': names(EXPERT_KERNELS),
        'model.matmul_type': MATMUL_TYPES,
        'model.remat': REMAT,
        'model.router': ('sigmoid', 'softmax'),
        'fsdp_gather': GATHERS,
        'fsdp_reduce': tuple(REDUCES),
        'cp_style': STYLES,
        'pipeline.schedule': NAMES,
        'pipeline.clock': CLOCKS,
        'model.rope_scaling': SCALINGS,
        'model.group_score': GROUP_SCORES,
        'optimizer.name': OPTIMIZERS,
        'optimizer.lr_schedule': ('cosine', 'wsd'),
        'optimizer.muon.coefficients': COEFFICIENTS,
        'optimizer.muon.scale': SCALES,
        'optimizer.muon.replicas': ('repeat', 'split'),
        'optimizer.muon.dtype': ('auto', 'float32', 'bfloat16'),
        'chip': ('cpu', *CHIPS),
    }


def choice_errors(fields: dict[str, Any]) -> Iterator[str]:
    """Yields errors for names that do not exist."""
    for name, allowed in choices().items():
        if name == 'model.rope_scaling' and fields[name] in REFUSED:
            yield f'{name}={fields[name]!r} {REFUSED[fields[name]]}; use yarn, linear or llama3'
        elif fields[name] not in allowed:
            yield f'{name}={fields[name]!r} is unknown; use one of {", ".join(allowed)}'
    for name in ('model.remat_keep', 'model.remat_offload'):
        for entry in fields[name]:
            if entry not in REMAT_NAMES:
                yield f'{name} has the unknown {entry!r}; use {", ".join(REMAT_NAMES)}'
    for entry in fields['model.block']:
        kind = layer_kind(entry)
        own = kind.attention in ATTENTION or entry == kind.feed_forward
        if not own or kind.feed_forward not in FEED_FORWARD:
            yield (
                f'model.block has the unknown kind {entry!r}; use {", ".join(FEED_FORWARD)}, or '
                f'one of them after an attention, {", ".join(ATTENTION)}, with {WINDOW} and then '
                f"{NOPE} or without, as in 'gqa_window+dense'"
            )
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
    """Yields errors for numbers outside RANGES; NaN and infinity are outside of all."""
    for name, value in fields.items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:
            most = f'{high}' if isinstance(high, int) else f'{high:.8g}'
            use = f'{low} to {most}' if high not in (INT32, FLOAT32) or value > high else ''
            yield f'{name}={value} is out of range; use {use or f"{low} or more"}'


def value_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for values out of their range."""
    m, spike = config.model, config.guard.spike_factor
    if not m.block:
        yield "model.block=() is empty; use at least one kind of layer, as in ('dense',)"
    if 0 < spike <= 1:
        yield (
            f'guard.spike_factor={spike} skips ordinary steps; use a factor above 1, or 0 for none'
        )
    if config.eval.averaged and not config.optimizer.ema:
        yield (
            'eval.averaged=True evaluates averaged weights, and optimizer.ema=0.0 keeps none; give '
            'it a decay, as in 0.999'
        )
    if config.log.sample_every and not (config.log.prompts and all(config.log.prompts)):
        yield (
            f'log.sample_every={config.log.sample_every} continues log.prompts='
            f'{config.log.prompts!r}; give texts that are not empty'
        )
    yield from schedule_errors(config)
    yield from packing_errors(config)
    if config.optimizer.name in OPTIMIZERS:
        yield from OPTIMIZERS[config.optimizer.name].rules(config)


# ---------------------------------------------------------------------------------------------
# Sizes, kinds and devices, of a config whose values are right
# ---------------------------------------------------------------------------------------------


def phase_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors of the sizes of each phase of config.schedule, and of the sizes of the config,
    which are those of evaluation: each once."""
    found: dict[str, str] = {}
    sized = {'': without_schedule(config)}
    for phase in phases(config):
        name = f'from step {phase.start + 1} on: ' if phase.start else 'from the first step on: '
        sized[name] = in_phase(config, phase)
    for name, own in sized.items():
        for errors in (mesh_errors, pipeline_errors):
            for error in errors(own):
                found.setdefault(error, f'{name}{error}')
    yield from found.values()


def mesh_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for what does not go with the mesh."""
    yield from layout_errors(config)
    yield from kind_errors(config)


def layout_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes that the mesh or the blocks do not divide, with those that would."""
    m, mesh = config.model, config.mesh
    yield from indivisible(config, TP, ['model.n_heads', 'model.vocab_size'])
    yield from sequence_errors(config)
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


def sequence_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for a sequence that cp, tp or the blocks of attention do not divide."""
    T, m, mesh = config.seq_len, config.model, config.mesh
    if mesh.cp == 1:
        yield from indivisible(config, TP, ['seq_len'])
        if T % min(m.attention_block, T):
            yield (
                f'seq_len={T} is not a multiple of model.attention_block={m.attention_block}; use '
                f'a block of {divisors(T)}'
            )
        return
    # Of 2·cp parts a device has two, in whole blocks; tp cuts what is on a device.
    block = min(m.attention_block, max(T // (2 * mesh.cp), 1))
    unit = math.lcm(2 * mesh.cp * block, mesh.cp * mesh.tp)
    if T % unit:
        nearest = sorted({max(T // unit, 1) * unit, -(-T // unit) * unit})
        yield (
            f'seq_len={T} is not cut evenly by mesh.cp={mesh.cp}, mesh.tp={mesh.tp} and '
            f'model.attention_block={m.attention_block}: each of 2·cp parts takes whole blocks; '
            f'use a seq_len of {" or ".join(map(str, nearest))}, or a smaller block'
        )
    if config.log.sample_every:
        yield (
            f'log.sample_every={config.log.sample_every} samples on the mesh of the run, and '
            f'generation does not run with mesh.cp={mesh.cp}; use 0, and generate.py on a '
            f'checkpoint'
        )


def kind_errors(config: ConfigDict) -> Iterator[str]:
    """Yields the errors of the kinds of layers and kernels that the config names, each once."""
    kinds, cfg = model_kinds(config.model), model_config(config)
    layers, found = kernel_layers(config), [*attention_errors(config)]
    for kind, (own, head) in zip(kinds, layers, strict=True):
        name, cp = own.model.attention, config.mesh.cp
        sizes = attention_sizes(of_layer(cfg, kind))
        if cp > 1 and not (sizes.travels or sizes.state):
            found.append(
                f'attention {name!r} takes whole sequences, and mesh.cp={cp}; use a cp of 1'
            )
        found += ATTENTION[name].rules(own)
        if not sizes.state:  # a linear layer has no scores
            found += kernel_errors(ATTENTION_KERNELS, 'attention_kernel', own, head)
    feed_forwards = dict.fromkeys(layer_kind(kind).feed_forward for kind in kinds)
    for name in feed_forwards:
        found += FEED_FORWARD[name].rules(config)
    if any(FEED_FORWARD[name].routed for name in feed_forwards):
        found += kernel_errors(EXPERT_KERNELS, 'expert_kernel', *layers[0])
    yield from dict.fromkeys(found)


def attention_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for choices that no layer of the model would read."""
    m = config.model
    kinds = [layer_kind(kind) for kind in model_kinds(m)]
    windows = any(kind.window for kind in kinds)
    if windows and not m.window:
        yield (
            f'model.block={tuple(m.block)} has layers with a window, and model.window=0; give the '
            f'positions that a query sees, its own included'
        )
    if m.window and not windows:
        yield (
            f'model.window={m.window} is for layers that end in {WINDOW}, and model.block='
            f"{tuple(m.block)} has none; name them, as in '{m.attention}{WINDOW}+dense', or use 0"
        )
    yield from linear_errors(config, kinds)
    present = {part for k in kinds for part in (k.attention or m.attention, k.feed_forward)}
    for readers, fields in OF_KIND.items():
        for field in fields if present.isdisjoint(readers) else ():
            off = DEFAULTS[f'model.{field}']
            if m[field] != off:
                yield (
                    f'model.{field}={m[field]!r} is for {" or ".join(map(repr, readers))}, which '
                    f'no layer of model.block={tuple(m.block)} has; use {off!r}'
                )


def linear_errors(config: ConfigDict, kinds: list[LayerKind]) -> Iterator[str]:
    """Yields errors for what only attention that compares keys can have."""
    m, linear = config.model, linear_kinds(model_config(config))
    for kind in kinds:
        name = kind.attention or m.attention
        if name in linear and (kind.window or kind.nope):
            suffix = WINDOW if kind.window else NOPE
            yield (
                f'model.block={tuple(m.block)} has {name}{suffix}, and {name!r} compares no keys '
                f'and rotates none; leave {suffix} out'
            )
    if all((kind.attention or m.attention) in linear for kind in kinds):
        for field in ('attention_sinks', 'attention_gate', 'attention_bias'):
            off = DEFAULTS[f'model.{field}']
            if m[field] != off:
                yield (
                    f'model.{field}={m[field]!r} is for attention that compares keys, and none of '
                    f'model.block={tuple(m.block)} does; use {off!r}'
                )
        if m.attention_kernel not in (AUTO, portable(ATTENTION_KERNELS)):
            yield (
                f'model.attention_kernel={m.attention_kernel!r} compares keys, and none of '
                f'model.block={tuple(m.block)} does; use {AUTO!r}'
            )


def remat_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for exceptions from rematerialization that contradict each other, or that would
    be ignored."""
    m = config.model
    for field in ('remat_keep', 'remat_offload'):
        if m[field] and m.remat != 'full':
            yield (
                f"model.{field}={tuple(m[field])} are exceptions from remat='full', and "
                f"model.remat={m.remat!r}; use 'full', or none of them"
            )
        for name in sorted({*m[field]} & without_arrays(config)):
            yield (
                f'model.{field}={tuple(m[field])} has {name!r}, and no layer of model.block='
                f'{tuple(m.block)} has such arrays with model.attention_kernel='
                f'{m.attention_kernel!r}; leave it out'
            )
    both = sorted({*m.remat_keep} & {*m.remat_offload})
    if both:
        yield (
            f'model.remat_keep and model.remat_offload both have {", ".join(map(repr, both))}, and '
            f'an array is kept in one place; leave it out of one of them'
        )


def without_arrays(config: ConfigDict) -> set[str]:
    """Returns the REMAT_NAMES that name no array of any layer."""
    m, cfg = config.model, model_config(config)
    found = set() if is_routed(config) else {EXPERTS}
    compared = not all(is_linear(cfg, kind) for kind in model_kinds(m))
    makes_heads = m.attention_kernel not in LATENT_KERNELS or m.attention_gate
    return found if compared and makes_heads else found | {QKV}


def pipeline_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for stages, chunks and microbatches that do not go together."""
    m, mesh, p = config.model, config.mesh, config.pipeline
    if mesh.pp == 1:
        if p.chunks > 1:
            yield f'pipeline.chunks={p.chunks} cuts stages, but mesh.pp=1 has none; use 1'
        return
    tokens = config.batch_size // config.microbatches // (mesh.dp * mesh.fsdp * mesh.ep)
    tokens *= config.seq_len // (mesh.cp * mesh.tp)
    blocks = (m.n_layers - m.first_dense) // len(m.block)
    yield from stage_errors(blocks, tokens, mesh.pp, p.chunks)
    try:
        costs = pipeline_costs(m.remat)
        check_settings(p.schedule, mesh.pp, config.microbatches, p.chunks, costs, p.clock)
    except ConfigError as error:
        yield f'pipeline: {error}'


def stage_errors(blocks: int, tokens: int, stages: int, chunks: int) -> Iterator[str]:
    """Yields errors for blocks of the model, and tokens of a microbatch on a device, that do not
    spread over the stages and their chunks."""
    parts = stages * chunks
    if blocks % parts:
        yield (
            f'the {blocks} blocks of the model are not divisible by mesh.pp * pipeline.chunks='
            f'{parts}; use a product of {divisors(blocks)}'
        )
    if tokens % stages:
        yield (
            f"a microbatch's {tokens} tokens on a device are not divisible by mesh.pp={stages}, "
            f'whose stages share the head; use a pp of {divisors(tokens)}'
        )


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


def check_compiler_options(config: ConfigDict) -> None:
    """Raises ConfigError for options that the compiler of this machine's devices does not take."""
    if not config.compiler_options:
        return
    options = compiler_options(config.compiler_options, jax.default_backend())
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        refuse([f'compiler_options={config.compiler_options!r}: {error}; use names of XLA'])


def check_all_devices(config: ConfigDict, n_devices: int, n_processes: int = 1) -> None:
    """Raises ConfigError if the mesh leaves devices idle, with sizes that take all of them."""
    validate(config, n_devices)
    needed = math.prod(config.mesh[axis] for axis in AXES)
    if needed == n_devices:
        return
    sizes = [
        size for axis in (FSDP, DP, TP, CP, EP, PP) if (size := larger(config, axis, n_devices))
    ]
    use = ' or '.join(sizes[:2]) or f'python plan.py --config=... --search --devices={n_devices}'
    # Of several processes none may be left out.
    spare = ', or --spare_devices to leave the others idle' if n_processes == 1 else ''
    refuse([f'the mesh takes {needed} of {n_devices} devices; use {use}{spare}'])


def is_routed(config: ConfigDict) -> bool:
    """Returns whether the model's blocks have experts."""
    return any(FEED_FORWARD[layer_kind(kind).feed_forward].routed for kind in config.model.block)


def larger(config: ConfigDict, axis: str, n_devices: int) -> str:
    """Returns the flag that lets this axis of the mesh take all devices, '' if it cannot."""
    c = config.copy_and_resolve_references()
    others = math.prod(c.mesh[other] for other in AXES if other != axis)
    c.mesh[axis] = n_devices // others
    if others * c.mesh[axis] != n_devices or (axis == EP and not is_routed(c)):
        return ''
    try:
        validate(c, n_devices, needs_data=False)
    except ConfigError:
        return ''
    return f'--config.mesh.{axis}={c.mesh[axis]}'
