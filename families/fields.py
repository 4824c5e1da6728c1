"""The config.json of released models: read with what it leaves out, and compared with this code.

A family says which of its keys are which fields of `model`; what the code cannot compute is refused
here, key by key, before a weight is read. Both spellings are read: rope_parameters as well as
rope_theta with rope_scaling, dtype as well as torch_dtype. The older ones are written, since all
programs that load models read them.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from config import ConfigError, ModelConfig

CONFIG = 'config.json'

# Fields of `model` by which a model computes what it computes, with what they are where a family
# does not have the thing at all; each family's own come on top.
PLAIN: dict[str, Any] = {
    'first_dense': 0, 'block': ('dense',), 'qk_norm': False, 'rope_scaling': 'none',
    'normalize_weights': True, 'routed_scale': 1.0, 'n_expert_groups': 1, 'n_top_groups': 1,
    'group_score': 'top2', 'n_shared_experts': 0, 'router_bias': False, 'expert_bias': False,
    'shared_gate': False, 'swiglu_limit': 0.0, 'attention_sinks': False, 'attention_gate': False,
    'attention_bias': 'none', 'norms': 'before', 'qk_norm_over': 'head', 'rotary_dim': 0,
}  # fmt: skip
# Fields that count in every model, and that a family's own fields have to set.
ALWAYS = ('vocab_size', 'd_model', 'n_layers', 'attention', 'n_heads', 'norm_eps', 'rope_base')
# Those that count where there are experts.
OF_EXPERTS = (
    'router', 'n_experts', 'experts_per_token', 'd_expert', 'normalize_weights', 'routed_scale',
    'n_expert_groups', 'n_top_groups', 'group_score', 'n_shared_experts', 'router_bias',
    'expert_bias', 'shared_gate',
)  # fmt: skip
# Of the rotation's fields, those that count with each kind of scaling.
ROPE = {
    'none': (),
    'linear': ('rope_factor',),
    'llama3': (
        'rope_factor', 'rope_original_len', 'rope_low_freq_factor', 'rope_high_freq_factor',
    ),
    'yarn': (
        'rope_factor', 'rope_original_len', 'rope_beta_fast', 'rope_beta_slow', 'rope_mscale',
        'rope_mscale_all_dim', 'rope_attention_factor', 'rope_truncate',
    ),
}  # fmt: skip
ROPE_KINDS = {'default': 'none', 'linear': 'linear', 'llama3': 'llama3', 'yarn': 'yarn'}


class Released:
    """A config.json as a family reads it."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self.config, self.where = config, where

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value; the default where the key is missing or null."""
        value = self.config.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """Returns a value. Raises ConfigError if there is none."""
        if self.config.get(key) is None:
            raise ConfigError(f'{self.where} lacks {key!r}: fetch the file again')
        return self.config[key]

    def refuse_unless(self, key: str, allowed: Iterable[Any], default: Any = None) -> None:
        """Raises ConfigError if the key has a value with which the model cannot be computed."""
        value, allowed = self.get(key, default), list(allowed)
        if value not in allowed:
            raise ConfigError(
                f'{self.where} has {key}={value!r}, which this code does not compute; it takes '
                f'{" or ".join(repr(x) for x in allowed if x is not None)}'
            )


def read_config(folder: str) -> Released:
    """Reads the config.json of a folder. Raises ConfigError if there is none or it is damaged."""
    path = os.path.join(folder, CONFIG)
    try:
        with open(path, encoding='utf-8') as f:
            config = json.load(f)
        if not isinstance(config, dict):
            raise ValueError('it is no object')
    except FileNotFoundError as error:
        raise ConfigError(
            f'there is no {path}: name the folder of a model, with {CONFIG} and safetensors files'
        ) from error
    except ValueError as error:
        raise ConfigError(f'{path} is damaged ({error}): fetch the file again') from error
    return Released(config, path)


def dtype_of(config: Mapping[str, Any]) -> str:
    """Returns the type that a config.json says, '' for none."""
    return config.get('dtype') or config.get('torch_dtype') or ''


# ---------------------------------------------------------------------------------------------
# What families share
# ---------------------------------------------------------------------------------------------


def common_fields(r: Released, eps: float = 1e-6, act: str = 'hidden_act') -> dict[str, Any]:
    """Returns the fields that all families have alike; `eps` is the family's own default."""
    r.refuse_unless(act, ['silu'], 'silu')
    return {
        'vocab_size': r.need('vocab_size'),
        'd_model': r.need('hidden_size'),
        'n_layers': r.need('num_hidden_layers'),
        'd_ff': r.need('intermediate_size'),
        'n_heads': r.need('num_attention_heads'),
        'norm_eps': float(r.get('rms_norm_eps', eps)),
        'tie_embeddings': bool(r.get('tie_word_embeddings', False)),
    }


def common_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `common_fields`."""
    return {
        'hidden_act': 'silu',
        'hidden_size': m.d_model,
        'intermediate_size': m.d_ff,
        'num_attention_heads': m.n_heads,
        'num_hidden_layers': m.n_layers,
        'rms_norm_eps': m.norm_eps,
        'tie_word_embeddings': m.tie_embeddings,
        'vocab_size': m.vocab_size,
    }


def gqa_fields(r: Released) -> dict[str, Any]:
    """Returns the sizes of grouped-query attention's heads."""
    heads = r.need('num_attention_heads')
    return {
        'attention': 'gqa',
        'n_kv_heads': r.get('num_key_value_heads', heads),
        'head_dim': r.get('head_dim', r.need('hidden_size') // heads),
    }


def gqa_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `gqa_fields`."""
    if m.attention != 'gqa':
        raise ConfigError(f'model.attention={m.attention!r}, and all of the family have gqa')
    return {'head_dim': m.head_dim, 'num_key_value_heads': m.n_kv_heads}


# ---------------------------------------------------------------------------------------------
# Rotation
# ---------------------------------------------------------------------------------------------


def rope_fields(r: Released, base: float = 10000.0) -> dict[str, Any]:
    """Returns the fields of the rotation; `base` is the family's own default."""
    given = r.get('rope_parameters') or r.get('rope_scaling') or {}
    if not isinstance(given, dict):
        raise ConfigError(f'{r.where} says of the rotation {given!r}: fetch the file again')
    nested = [value for value in given.values() if isinstance(value, dict)]
    if nested:
        if any(value != nested[0] for value in nested):
            raise ConfigError(
                f'{r.where} rotates layers of several kinds differently, which this code does not '
                f'compute: {given}'
            )
        given = dict(nested[0])
    fields: dict[str, Any] = {
        'rope_base': float(given.get('rope_theta') or r.get('rope_theta', base))
    }
    kind = given.get('rope_type', given.get('type', 'default'))
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f'{r.where} scales the rotation by rope_type={kind!r}, which this code does not '
            f'compute; it takes {", ".join(ROPE_KINDS)}'
        )
    fields['rope_scaling'] = ROPE_KINDS[kind]
    if kind == 'default':
        return fields
    scaling = Released(given, f'the rotation of {r.where}')
    fields['rope_factor'] = float(scaling.need('factor'))
    if kind == 'linear':
        return fields
    original = given.get('original_max_position_embeddings')
    original = original or r.get('original_max_position_embeddings')
    fields['rope_original_len'] = int(original or r.need('max_position_embeddings'))
    if kind == 'yarn':
        return fields | yarn_fields(given, fields['rope_factor'])
    return fields | {
        'rope_low_freq_factor': float(scaling.need('low_freq_factor')),
        'rope_high_freq_factor': float(scaling.need('high_freq_factor')),
    }


def yarn_fields(given: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Returns YaRN's constants; where only one of both mscales is given, releases take neither for
    the factor on what rotates."""
    mscale, all_dim = given.get('mscale') or 0.0, given.get('mscale_all_dim') or 0.0
    explicit = given.get('attention_factor') or 0.0
    if all_dim and not mscale and not explicit:
        explicit = 0.1 * math.log(factor) + 1
    return {
        'rope_beta_fast': float(given.get('beta_fast') or 32),
        'rope_beta_slow': float(given.get('beta_slow') or 1),
        'rope_mscale': float(mscale) if mscale and all_dim else 1.0,
        'rope_mscale_all_dim': float(all_dim),
        'rope_attention_factor': float(explicit),
        'rope_truncate': bool(given.get('truncate', True)),
    }


def rope_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `rope_fields`."""
    names = {ours: name for name, ours in ROPE_KINDS.items()}
    config: dict[str, Any] = {'rope_theta': m.rope_base, 'rope_scaling': None}
    if m.rope_scaling == 'none':
        return config
    kind = names[m.rope_scaling]
    scaling: dict[str, Any] = {'rope_type': kind, 'type': kind, 'factor': m.rope_factor}
    if kind != 'linear':
        scaling['original_max_position_embeddings'] = m.rope_original_len
    if kind == 'llama3':
        scaling |= {
            'low_freq_factor': m.rope_low_freq_factor,
            'high_freq_factor': m.rope_high_freq_factor,
        }
    if kind == 'yarn':
        scaling |= {'beta_fast': m.rope_beta_fast, 'beta_slow': m.rope_beta_slow}
        if not m.rope_truncate:
            scaling['truncate'] = False
        if m.rope_attention_factor:
            scaling['attention_factor'] = m.rope_attention_factor
        if m.rope_mscale_all_dim:
            scaling |= {'mscale': m.rope_mscale, 'mscale_all_dim': m.rope_mscale_all_dim}
    return config | {'rope_scaling': scaling}


# ---------------------------------------------------------------------------------------------
# Kinds of layers
# ---------------------------------------------------------------------------------------------


def blocks(attention: list[str], feed_forward: list[str]) -> dict[str, Any]:
    """Returns the fields that name these layers' kinds, with the shortest block that repeats.

    The layers before the blocks are dense, and have the attention of the block's first layer.
    """
    kinds = list(zip(attention, feed_forward, strict=True))
    dense = next((i for i, kind in enumerate(feed_forward) if kind != 'dense'), 0)
    found: list[tuple[int, int]] = []
    for first in sorted({0, dense}):
        rest = kinds[first:]
        if all(kind == rest[0][0] for kind in attention[:first]):
            n = next(
                n for n in range(1, len(rest) + 1)
                if len(rest) % n == 0 and rest == rest[:n] * (len(rest) // n)
            )  # fmt: skip
            found.append((n, first))
    n, first = min(found)
    base = attention[0].split('_')[0]
    names = [f if a == base else f'{a}+{f}' for a, f in kinds[first : first + n]]
    return {'first_dense': first, 'block': tuple(names)}


def shortest_block(m: ModelConfig) -> ModelConfig:
    """Returns a config of the same layers with model.block as `blocks` names them."""
    attention, feed_forward = map(list, zip(*layer_list(m), strict=True))
    if attention[0].split('_')[0] != m.attention:
        return m
    return dataclasses.replace(m, **blocks(attention, feed_forward))


def window_fields(r: Released, window: int | None, feed_forward: list[str]) -> dict[str, Any]:
    """Returns the fields of layers that look back by `window` where layer_types says so, which
    without layer_types are all."""
    n = len(feed_forward)
    if not window:
        return blocks(['gqa'] * n, feed_forward)
    names = {'sliding_attention': 'gqa_window', 'full_attention': 'gqa'}
    types = r.get('layer_types', ['sliding_attention'] * n)
    if len(types) != n or not set(types) <= names.keys():
        raise ConfigError(
            f'{r.where} has layer_types={types}, which this code does not compute; it takes '
            f'{" and ".join(names)}, one for each of the {n} layers'
        )
    kinds = [names[kind] for kind in types]
    given = {'window': window} if 'gqa_window' in kinds else {}
    return {**blocks(kinds, feed_forward), **given}


def window_config(m: ModelConfig) -> dict[str, Any]:
    """Returns sliding_window, and layer_types where some layers look back further than others."""
    kinds = [attention for attention, _ in layer_list(m)]
    if not set(kinds) <= {'gqa', 'gqa_window'}:
        raise ConfigError(
            f'layers have the attention {", ".join(sorted(set(kinds)))}, and those of the family '
            f'gqa or gqa_window'
        )
    if 'gqa_window' not in kinds:
        return {'sliding_window': None}
    keys: dict[str, Any] = {'sliding_window': m.window}
    if 'gqa' in kinds:
        names = {'gqa_window': 'sliding_attention', 'gqa': 'full_attention'}
        keys['layer_types'] = [names[kind] for kind in kinds]
    return keys


def layer_list(m: ModelConfig) -> list[tuple[str, str]]:
    """Returns the kinds of attention and of feed-forward of all layers, in order."""
    block = [tuple(kind.split('+')) for kind in m.block]
    block = [kind if len(kind) == 2 else (m.attention, *kind) for kind in block]
    return [(block[0][0], 'dense')] * m.first_dense + block * m.n_blocks


def all_same(m: ModelConfig, feed_forward: str) -> None:
    """Raises ConfigError unless all feed-forward parts are of this kind."""
    for i, (_, kind) in enumerate(layer_list(m)):
        if kind != feed_forward:
            raise ConfigError(f'layer {i} is {kind!r}, and all of the family are {feed_forward!r}')
