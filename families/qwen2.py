"""Qwen2 and 2.5: Llama's layers with biases of queries, keys and values."""

from typing import Any

from config import ModelConfig
from families import llama
from families.family import Family
from families.fields import (
    Released,
    all_same,
    common_config,
    common_fields,
    gqa_config,
    gqa_fields,
    rope_config,
    rope_fields,
    window_config,
    window_fields,
)


def fields(r: Released) -> dict[str, Any]:
    return attention_fields(r) | windows(r) | {'attention_bias': 'qkv'}


def attention_fields(r: Released) -> dict[str, Any]:
    """Returns the fields that all of Qwen's families have alike."""
    return common_fields(r) | gqa_fields(r) | rope_fields(r)


def windows(r: Released) -> dict[str, Any]:
    """Returns the kinds of dense layers, of which those from max_window_layers on have windows."""
    n = r.need('num_hidden_layers')
    if not r.get('use_sliding_window', False):
        return window_fields(r, 0, ['dense'] * n)
    whole = min(r.get('max_window_layers', 28), n)
    types = ['full_attention'] * whole + ['sliding_attention'] * (n - whole)
    given = Released({'layer_types': types} | dict(r.config), r.where)
    return window_fields(given, r.get('sliding_window', 4096), ['dense'] * n)


def windows_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `windows`."""
    keys = window_config(m)
    if keys['sliding_window'] is None:
        return {'use_sliding_window': False} | keys
    types = keys.get('layer_types', ['sliding_attention'] * m.n_layers)
    first = types.index('sliding_attention')
    return keys | {'use_sliding_window': True, 'layer_types': types, 'max_window_layers': first}


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'dense')
    return common_config(m) | gqa_config(m) | rope_config(m) | windows_config(m)


FAMILY = Family(('qwen2',), 'Qwen2ForCausalLM', fields, config, llama.rules)
