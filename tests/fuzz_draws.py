"""Draws the configs of fuzz_parity.py: legal ones, from a seed.

A case is what differs from the base, a single dense layer on one device: {'mesh.tp': 2}. A field
that comes later is drawn by itself if it is a bool or names something (config_checks.choices), and
needs a line in NUMBERS or BESIDE if not.
"""

import collections
import functools
import operator
import random
from collections.abc import Iterator
from typing import Any

from common import small_config
from ml_collections import ConfigDict

from config import ConfigError, flat, layer_kind, model_config
from layers.attention import ATTENTION, linear_kinds
from optimizer import OPTIMIZERS
from parallel import AXES
from runtime.config_checks import DEFAULTS, choices, validate

Case = dict[str, Any]  # full names of fields, or of DERIVED, and values

MOST_DEVICES = 8
LAYOUTS = 3  # of a model, which share its single device
RARE = 0.2  # with which an option is drawn

# ---------------------------------------------------------------------------------------------
# The fields
# ---------------------------------------------------------------------------------------------

# Values of fields that are no bool and name nothing; a new field needs a line here or in BESIDE.
NUMBERS: dict[str, tuple] = {
    'model.first_dense': (0, 1),
    'model.n_kv_heads': (1, 2, 4),
    'model.experts_per_token': (1, 2, 3),
    'model.n_shared_experts': (0, 1, 2),
    'model.n_expert_groups': (1, 2),
    'model.n_top_groups': (1, 2),
    'model.routed_scale': (1.0, 2.5),
    'model.swiglu_limit': (0.0, 0.5),
    'model.bias_rate': (0.0, 0.02),
    'model.balance_loss': (0.0, 0.1),
    'model.router_z_loss': (0.0, 0.01),
    'model.capacity_factor': (0.0, 0.8, 1.5),
    'model.rotary_dim': (0, 4),
    'model.delta_key_heads': (0, 1, 2, 4),
    'model.delta_conv': (4, 1, 6),
    'model.window': (0, 3, 7),
    'model.q_rank': (0, 48),
    'model.latent_norm_eps': (0.0, 0.01),
    'model.rope_base': (10000.0, 100.0),
    'model.rope_factor': (1.0, 4.0),
    'model.rope_original_len': (256, 8),
    'model.rope_mscale_all_dim': (0.0, 1.0),
    'model.rope_attention_factor': (0.0, 1.2),
    'model.norm_eps': (1e-6, 1e-3),
    'model.dropout': (0.0, 0.2),
    'model.z_loss': (0.0, 0.01),
    'optimizer.warmup_steps': (0, 2),
    'optimizer.weight_decay': (0.0, 0.1, 1.0),
    'optimizer.clip_norm': (0.0, 0.1, 1.0),
    'optimizer.b1': (0.9, 0.5),
    'optimizer.b2': (0.95, 0.5),
    'optimizer.eps': (1e-8, 1e-4),
    'optimizer.ema': (0.0, 0.9),
    'optimizer.muon.momentum': (0.95, 0.5),
    'optimizer.muon.steps': (5, 2),
    'optimizer.muon.adamw_lr': (0.0, 3e-4),
    'guard.spike_factor': (0.0, 1.001),
}

# The fields that say how the numbers are computed: one device has those of the base.
LAYOUT: dict[str, tuple] = {
    'microbatches': (1, 2, 3, 4, 6, 8),  # but with dropout, which each microbatch draws anew
    'pipeline.chunks': (1, 2),
    'model.buffer_factor': (0.0, 8.0),  # less drops choices, by the mesh
    'model.remat_keep': ((), ('attention',), ('qkv', 'hidden'), ('residual', 'experts')),
    'model.attention_block': (4, 8, 16),
    'model.loss_chunk': (5, 16, 1024),
}
LAYOUT_NAMES = (
    *LAYOUT, 'check_vma', 'cp_style', 'fsdp_gather', 'fsdp_reduce', 'pipeline.schedule',
    'pipeline.clock', 'model.remat', 'model.expert_kernel', 'optimizer.muon.replicas', 'mesh.',
)  # fmt: skip

# Fewer values than config_checks.choices has.
FEWER: dict[str, tuple] = {
    'compute_dtype': ('float32',),  # in bfloat16 nothing is equal
    'optimizer.muon.dtype': ('auto',),
    'model.matmul_type': ('compute',),  # a scale that moves by a rounding flips 8-bit numbers
    'model.attention_kernel': ('blockwise',),  # the others take 128 positions, and minutes
    'model.expert_kernel': ('blocks', 'ragged_dot'),  # so do pallas and megablox
    'model.rope_scaling': ('none', 'linear', 'llama3', 'yarn'),
}

# Fields that are not drawn by themselves, and why.
BESIDE = {
    'sizes, see `sized`': (
        'batch_size', 'seq_len', 'model.vocab_size', 'model.d_model', 'model.d_ff',
        'model.n_experts', 'model.d_expert', 'model.n_heads', 'model.head_dim', 'model.kv_rank',
        'model.nope_dim', 'model.rope_dim', 'model.v_dim', 'model.delta_heads',
        'model.delta_key_dim', 'model.delta_value_dim',
    ),
    'drawn by `draw_model` or `draw_mesh`': (
        'model.block', 'model.n_layers', 'mesh.', 'optimizer.name', 'seed', 'model.document_end',
        'data.isolate_documents', 'data.packing',
    ),
    'no numbers of a step follow from them': (
        'chip', 'compilation_cache', 'peak_flops', 'eval.', 'log.', 'checkpoint.', 'data.path',
        'data.sources', 'data.tokenizer', 'data.max_documents', 'guard.max_skips',
        'guard.step_seconds', 'guard.pause_seconds', 'guard.heartbeat_seconds',
        'optimizer.muon.dtype', 'guard.nonfinite',
    ),
    'three steps do not show them': (
        'steps', 'schedule.', 'optimizer.decay_steps', 'optimizer.peak_lr', 'optimizer.final_lr',
        'guard.history',
    ),
    'other compilers': ('compiler_options', 'model.remat_offload'),
    'alike on any mesh, and tested by test_layer_kinds and test_released': (
        'model.rope_low_freq_factor', 'model.rope_high_freq_factor', 'model.rope_beta_fast',
        'model.rope_beta_slow', 'model.rope_mscale',
    ),
}  # fmt: skip

# Fields that layers with experts alone read.
OF_EXPERTS = (
    'model.experts_per_token', 'model.n_shared_experts', 'model.expert_kernel', 'model.router',
    'model.normalize_weights', 'model.routed_scale', 'model.n_expert_groups', 'model.n_top_groups',
    'model.group_score', 'model.router_bias', 'model.expert_bias', 'model.shared_gate',
    'model.bias_rate', 'model.balance_loss', 'model.router_z_loss', 'model.capacity_factor',
    'model.buffer_factor',
)  # fmt: skip

# Names beside the config's fields.
DERIVED = {
    'blocks': (1, 2, 3, 4, 6),  # of model.block: model.n_layers follows
    'threes': (False, True),  # sizes that 3 divides, and not 8
}


def beside(name: str) -> bool:
    """Returns whether a field is not drawn by itself."""
    return any(
        name.startswith(x) if x.endswith('.') else name == x for xs in BESIDE.values() for x in xs
    )


def is_layout(name: str) -> bool:
    """Returns whether a field says how the numbers are computed."""
    return name.startswith('mesh.') or name in LAYOUT_NAMES


def attentions(case: Case) -> set[str]:
    """Returns the kinds of attention of a case's blocks."""
    kinds = (layer_kind(kind).attention for kind in case.get('model.block', ()))
    return {kind or case.get('model.attention', 'gqa') for kind in kinds}


def is_read(name: str, case: Case) -> bool:
    """Returns whether a step reads a field, by block, optimizer and mesh."""
    if name.startswith('optimizer.muon.'):
        return case.get('optimizer.name') == 'muon'
    if name.startswith('pipeline.'):
        return case.get('mesh.pp', 1) > 1
    if name == 'cp_style':
        return case.get('mesh.cp', 1) > 1
    if name.startswith('fsdp_'):
        return case.get('mesh.fsdp', 1) > 1
    if name.startswith('model.delta_'):
        return bool(LINEAR & attentions(case))
    return name not in OF_EXPERTS or any(
        kind.endswith('moe') for kind in case.get('model.block', ())
    )


def values_of(name: str) -> tuple:
    """Returns the values that a field is drawn from. Raises KeyError for one that has none."""
    tables = (FEWER, NUMBERS, LAYOUT, DERIVED)
    for table in tables:
        if name in table:
            return table[name]
    return (False, True) if isinstance(DEFAULTS[name], bool) else tuple(choices()[name])


def options(layout: bool) -> list[str]:
    """Lists the fields that are drawn one by one: of the layout, or of the model."""
    return [name for name in DEFAULTS if not beside(name) and is_layout(name) == layout]


# ---------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------


def sized(threes: bool) -> dict[str, int]:
    """Returns sizes that the axes of a mesh divide: by 8, or by 2 and 3."""
    if threes:
        return {
            'batch_size': 36, 'seq_len': 24, 'model.vocab_size': 96, 'model.d_model': 48,
            'model.d_ff': 48, 'model.n_experts': 6, 'model.d_expert': 24, 'model.n_heads': 6,
            'model.n_kv_heads': 6, 'model.kv_rank': 24, 'model.attention_block': 24,
            'model.delta_heads': 6, 'model.delta_key_dim': 16, 'model.delta_value_dim': 12,
        }  # fmt: skip
    return {
        'batch_size': 16, 'seq_len': 16, 'model.vocab_size': 64, 'model.d_model': 32,
        'model.d_ff': 32, 'model.n_experts': 8, 'model.d_expert': 16, 'model.n_heads': 8,
        'model.n_kv_heads': 8, 'model.kv_rank': 16, 'model.attention_block': 16,
        'model.delta_heads': 8, 'model.delta_key_dim': 16, 'model.delta_value_dim': 8,
    }  # fmt: skip


@functools.cache
def base(threes: bool = False) -> ConfigDict:
    """Returns the config that all others differ from: one dense layer, with no options."""
    config = small_config('gqa', tied=False)
    config.check_vma, config.guard.history = True, 1
    config.update_from_flattened_dict(
        {
            'guard.spike_factor': 0.0, 'model.block': ('dense',), 'model.loss_chunk': 1024,
            'model.z_loss': 0.0, 'model.q_rank': 0, 'model.bias_rate': 0.0,
            'model.n_shared_experts': 0, 'model.expert_kernel': 'blocks', 'model.qk_norm': False,
            **sized(threes),
        }
    )  # fmt: skip
    return config


def config_of(case: Case) -> ConfigDict:
    """Returns the config of a case."""
    fields = dict(case)
    config = base(fields.pop('threes', False)).copy_and_resolve_references()
    blocks = fields.pop('blocks', 1)
    for name, value in fields.items():
        *groups, field = name.split('.')
        group = functools.reduce(operator.getitem, groups, config)
        group[field] = tuple(value) if isinstance(value, list) else value  # a list is JSON's
    m = config.model
    m.n_layers = m.first_dense + blocks * len(m.block)
    return config


def legal(case: Case, counts: collections.Counter) -> bool:
    """Returns whether the rules accept a case; counts it otherwise."""
    try:
        validate(config_of(case), MOST_DEVICES)
        return True
    except ConfigError:
        counts['illegal'] += 1
        return False


def draw_kind(rng: random.Random, feed_forward: str) -> str:
    """Draws a kind of layer: attention that compares keys may have a window, or no rotary part."""
    attention = rng.choice(('', '', '', *ATTENTION))
    if not attention:
        return feed_forward
    if attention in LINEAR:
        return f'{attention}+{feed_forward}'
    window, nope = (rng.choice(('', '', suffix)) for suffix in ('_window', '_nope'))
    return f'{attention}{window}{nope}+{feed_forward}'


def draw_model(rng: random.Random, counts: collections.Counter) -> Case:
    """Draws all that makes the numbers, which one device can compute."""
    while True:
        feed_forwards = rng.choice((('dense',), ('moe',), ('dense', 'moe'), ('moe', 'dense')))
        block = tuple(draw_kind(rng, name) for name in feed_forwards)
        case: Case = {'model.block': block, 'model.attention': rng.choice(tuple(ATTENTION))}
        if LINEAR & attentions(case):  # a head's output may be next to nothing: see common.KINDS
            case['model.norm_eps'] = 0.01
        case['optimizer.name'] = rng.choice(tuple(OPTIMIZERS))
        if rng.random() < 0.4:  # documents
            case['model.document_end'] = 3
            case['data.isolate_documents'] = rng.random() < 0.5
            if case['data.isolate_documents'] and rng.random() < 0.6:
                case['data.packing'] = 'best_fit'
        if any('_window' in kind for kind in block):
            case['model.window'] = rng.choice((3, 7))
        if 'moe' in feed_forwards and rng.random() < 0.1:
            case |= {'model.experts_per_token': 1, 'model.normalize_weights': False}
        case['blocks'] = rng.choice((1, 2, 2, 4, 4))
        if rng.random() < 0.2:
            case |= {'threes': True, 'blocks': rng.choice((1, 3, 6))}
        case['seed'] = rng.randrange(100)
        if legal(case, counts):
            break
    return without_defaults(draw_options(rng, case, options(layout=False), counts))


def draw_layout(rng: random.Random, model: Case, counts: collections.Counter) -> Case | None:
    """Draws how and where a model is computed; None if nothing fits it."""
    for _ in range(100):
        case = model | draw_mesh(rng, model.get('threes', False))
        case['microbatches'] = rng.choice((1, 2, 3, 6) if case.get('threes') else (1, 2, 4, 8))
        if case.get('mesh.pp', 1) > 1:
            case['pipeline.schedule'] = rng.choice(tuple(choices()['pipeline.schedule']))
            if case['pipeline.schedule'] == 'interleaved':
                case['pipeline.chunks'] = 2
        if rng.random() < 0.15:
            case |= {
                'model.remat': 'full',
                'model.remat_keep': rng.choice(LAYOUT['model.remat_keep']),
            }
        if legal(case, counts):
            return without_defaults(draw_options(rng, case, options(layout=True), counts))
    return None


def draw_mesh(rng: random.Random, threes: bool) -> Case:
    """Draws the sizes of a mesh of at most eight devices; seldom a single one."""
    factors = rng.choice(((2, 3), (3, 2), (3,), (2,))) if threes else (2,) * rng.choice((1, 2, 3))
    if rng.random() < 0.05:
        factors = ()
    sizes: Case = collections.Counter()
    for factor in factors:
        axis = f'mesh.{rng.choice(AXES)}'
        sizes[axis] = factor * max(sizes[axis], 1)
    return dict(sizes)


def draw_options(
    rng: random.Random, case: Case, names: list[str], counts: collections.Counter
) -> Case:
    """Draws some of the fields of a legal case, one by one; what is illegal with those before it
    stays as it was."""
    names = [name for name in names if name not in case and is_read(name, case)]
    drawn: Case = {}
    for name in rng.sample(names, len(names)):
        others = [x for x in values_of(name) if x != USUAL[name]]
        if others and rng.random() < RARE:
            drawn[name] = rng.choice(others)
    if legal(case | drawn, counts):
        return case | drawn
    for name, value in drawn.items():
        if legal(case | {name: value}, counts):
            case = case | {name: value}
    return case


def without_defaults(case: Case) -> Case:
    """Returns the fields that differ from the base."""
    return {name: x for name, x in case.items() if x != USUAL[name]}


LINEAR = linear_kinds(model_config(base()))
USUAL = flat(base().to_dict()) | {'threes': False, 'blocks': 1}


def draw_cases(seed: int, counts: collections.Counter) -> Iterator[Case]:
    """Yields cases without end, those of one model one after the other."""
    rng = random.Random(seed)
    while True:
        model = draw_model(rng, counts)
        for _ in range(LAYOUTS):
            if case := draw_layout(rng, model, counts):
                yield case


def alone(case: Case) -> Case:
    """Returns the case of one device that has the same numbers."""
    kept = {'microbatches'} if case.get('model.dropout') else set()
    return {name: x for name, x in case.items() if name in kept or not is_layout(name)}
