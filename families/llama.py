"""Llama 2, 3 and what has the same layers: grouped-query attention and a dense SwiGLU."""

from typing import Any

from config import ModelConfig
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
    Rule('attention_norm', 'model.layers.{layer}.input_layernorm.weight', 'd -> d'),
    Rule('ffn_norm', 'model.layers.{layer}.post_attention_layernorm.weight', 'd -> d'),
]
ATTENTION = [
    Rule('attention.w_q', 'model.layers.{layer}.self_attn.q_proj.weight', '(n h) d -> d n h'),
    Rule('attention.w_k', 'model.layers.{layer}.self_attn.k_proj.weight', '(k h) d -> d k h'),
    Rule('attention.w_v', 'model.layers.{layer}.self_attn.v_proj.weight', '(k h) d -> d k h'),
    Rule('attention.w_o', 'model.layers.{layer}.self_attn.o_proj.weight', 'd (n h) -> n h d'),
]
BIASES = [
    Rule('attention.b_q', 'model.layers.{layer}.self_attn.q_proj.bias', '(n h) -> n h'),
    Rule('attention.b_k', 'model.layers.{layer}.self_attn.k_proj.bias', '(k h) -> k h'),
    Rule('attention.b_v', 'model.layers.{layer}.self_attn.v_proj.bias', '(k h) -> k h'),
    Rule('attention.b_o', 'model.layers.{layer}.self_attn.o_proj.bias', 'd -> d'),
]
SWIGLU = [
    Rule('ffn.w_gate', 'model.layers.{layer}.mlp.gate_proj.weight', 'f d -> d f'),
    Rule('ffn.w_up', 'model.layers.{layer}.mlp.up_proj.weight', 'f d -> d f'),
    Rule('ffn.w_down', 'model.layers.{layer}.mlp.down_proj.weight', 'd f -> f d'),
]


def fields(r: Released) -> dict[str, Any]:
    r.refuse_unless('mlp_bias', [False], False)
    r.refuse_unless('pretraining_tp', [1], 1)
    n = r.need('num_hidden_layers')
    kinds = blocks(['gqa'] * n, ['dense'] * n)
    return common_fields(r) | gqa_fields(r) | rope_fields(r) | bias_fields(r) | kinds


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'dense')
    return common_config(m) | gqa_config(m) | rope_config(m) | bias_config(m) | {'mlp_bias': False}


def bias_fields(r: Released) -> dict[str, Any]:
    """Returns the field of attention's biases, which all four projections have or none."""
    return {'attention_bias': 'qkvo' if r.get('attention_bias', False) else 'none'}


def bias_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the key of `bias_fields`."""
    return {'attention_bias': m.attention_bias == 'qkvo'}


def rules(m: ModelConfig) -> list[Rule]:
    return [*NORMS, *ATTENTION, *BIASES, *SWIGLU]


FAMILY = Family(('llama',), 'LlamaForCausalLM', fields, config, rules)
