"""Qwen3: Llama's layers with norms of queries and keys, each head by itself."""

from typing import Any

from config import ModelConfig
from families import llama
from families.family import Family
from families.fields import (
    Released,
    all_same,
    blocks,
    common_config,
    common_fields,
    gqa_config,
    gqa_fields,
    rope_config,
    rope_fields,
)
from families.rules import Rule

QK_NORMS = [
    Rule('attention.q_norm', 'model.layers.{layer}.self_attn.q_norm.weight', 'h -> h'),
    Rule('attention.k_norm', 'model.layers.{layer}.self_attn.k_norm.weight', 'h -> h'),
]
HEAD_DIM = 128  # where config.json has none


def attention_fields(r: Released) -> dict[str, Any]:
    """Returns the fields that dense and sparse models have alike."""
    r.refuse_unless('attention_bias', [False], False)
    r.refuse_unless('use_sliding_window', [False], False)
    fields = common_fields(r) | gqa_fields(r) | rope_fields(r)
    return fields | {'head_dim': r.get('head_dim', HEAD_DIM), 'qk_norm': True}


def attention_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `attention_fields`."""
    keys = common_config(m) | gqa_config(m) | rope_config(m)
    return keys | {'attention_bias': False, 'use_sliding_window': False, 'sliding_window': None}


def fields(r: Released) -> dict[str, Any]:
    n = r.need('num_hidden_layers')
    return attention_fields(r) | blocks(['gqa'] * n, ['dense'] * n)


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'dense')
    return attention_config(m)


def rules(m: ModelConfig) -> list[Rule]:
    return [*llama.rules(m), *QK_NORMS]


FAMILY = Family(('qwen3',), 'Qwen3ForCausalLM', fields, config, rules)
