"""Mistral: Llama's layers, which all look back by a window or none does."""

from typing import Any

from config import ConfigError, ModelConfig
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

WINDOW = 4096  # where config.json has no sliding_window; null is none


def fields(r: Released) -> dict[str, Any]:
    dense = ['dense'] * r.need('num_hidden_layers')
    window = r.config.get('sliding_window', WINDOW)
    kinds = window_fields(r, window, dense)
    return common_fields(r) | gqa_fields(r) | rope_fields(r) | kinds


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'dense')
    windows = window_config(m)
    if 'layer_types' in windows:
        raise ConfigError('some layers have a window and some have none, and all of the family are '
                          'alike')  # fmt: skip
    return common_config(m) | gqa_config(m) | rope_config(m) | windows


FAMILY = Family(('mistral',), 'MistralForCausalLM', fields, config, llama.rules)
