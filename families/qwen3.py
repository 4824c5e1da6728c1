"""Qwen3: Llama's layers with norms of queries and keys, each head by itself."""

from typing import Any

from config import ModelConfig
from families import llama, qwen2
from families.family import Family
from families.fields import (
    Released,
    all_same,
    common_config,
    gqa_config,
    rope_config,
)
from families.rules import Rule

QK_NORMS = [
    Rule('attention.q_norm', 'model.layers.{layer}.self_attn.q_norm.weight', 'h -> h'),
    Rule('attention.k_norm', 'model.layers.{layer}.self_attn.k_norm.weight', 'h -> h'),
]
HEAD_DIM = 128  # where config.json has none


def attention_fields(r: Released) -> dict[str, Any]:
    """Returns the fields that dense and sparse models have alike."""
    fields = qwen2.attention_fields(r) | llama.bias_fields(r)
    return fields | {'head_dim': r.get('head_dim', HEAD_DIM), 'qk_norm': True}


def attention_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `attention_fields`."""
    return common_config(m) | gqa_config(m) | rope_config(m) | llama.bias_config(m)


def fields(r: Released) -> dict[str, Any]:
    return attention_fields(r) | qwen2.windows(r)


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'dense')
    return attention_config(m) | qwen2.windows_config(m)


def rules(m: ModelConfig) -> list[Rule]:
    return [*llama.rules(m), *QK_NORMS]


FAMILY = Family(('qwen3',), 'Qwen3ForCausalLM', fields, config, rules)
