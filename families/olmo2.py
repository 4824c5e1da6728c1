"""OLMo 2: Llama's layers with norms behind each part, and of the queries and keys of all heads."""

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

NORMS = [
    Rule('attention_norm', 'model.layers.{layer}.post_attention_layernorm.weight', 'd -> d'),
    Rule('ffn_norm', 'model.layers.{layer}.post_feedforward_layernorm.weight', 'd -> d'),
]


def fields(r: Released) -> dict[str, Any]:
    n = r.need('num_hidden_layers')
    kinds = blocks(['gqa'] * n, ['dense'] * n)
    fields = common_fields(r, 1e-5) | gqa_fields(r) | rope_fields(r) | llama.bias_fields(r)
    return (
        fields
        | kinds
        | {
            'norms': 'after',
            'qk_norm': True,
            'qk_norm_over': 'heads',
        }
    )


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'dense')
    return common_config(m) | gqa_config(m) | rope_config(m) | llama.bias_config(m)


def rules(m: ModelConfig) -> list[Rule]:
    q_norm, k_norm = (f'model.layers.{{layer}}.self_attn.{x}_norm.weight' for x in 'qk')
    return [
        *NORMS, *llama.ATTENTION, *llama.BIASES, *llama.SWIGLU,
        Rule('attention.q_norm', q_norm, '(n h) -> n h'),
        # A single head has one gain of its size.
        Rule('attention.k_norm', k_norm, '(k h) -> k h' if m.n_kv_heads > 1 else 'h -> h'),
    ]  # fmt: skip


FAMILY = Family(('olmo2',), 'Olmo2ForCausalLM', fields, config, rules)
