"""GLM-4.5: grouped-query attention with biases, half of each head rotated, and DeepSeek-V3's
experts."""

import dataclasses
from typing import Any

from config import ConfigError, ModelConfig
from families import deepseek, llama, qwen3, qwen3_moe
from families.family import Family
from families.fields import (
    Released,
    common_config,
    common_fields,
    gqa_config,
    gqa_fields,
    layer_list,
    rope_config,
    rope_fields,
)
from families.rules import Rule, rotary_last

ROTARY = 0.5  # of a head, where config.json does not say
TURNED = ('w_q', 'w_k', 'b_q', 'b_k', 'q_norm', 'k_norm')  # leaves that hold what is rotated


def fields(r: Released) -> dict[str, Any]:
    heads = gqa_fields(r)
    given = r.get('rope_parameters') or {}
    share = given.get('partial_rotary_factor') or r.get('partial_rotary_factor', ROTARY)
    rotary = int(heads['head_dim'] * share)
    experts = deepseek.expert_fields(r, 'gqa') | deepseek.sigmoid_fields(r)
    return common_fields(r, 1e-5) | heads | rope_fields(r) | experts | {
        'attention_bias': 'qkv' if r.get('attention_bias', False) else 'none',
        'qk_norm': bool(r.get('use_qk_norm', False)),
        'rotary_dim': rotary % heads['head_dim'],
    }  # fmt: skip


def config(m: ModelConfig) -> dict[str, Any]:
    if any(attention != 'gqa' for attention, _ in layer_list(m)):
        raise ConfigError('a layer has a window or no rotary part, and none of the family has')
    keys = common_config(m) | gqa_config(m) | rope_config(m) | deepseek.expert_config(m)
    return keys | {
        'attention_bias': m.attention_bias == 'qkv',
        'norm_topk_prob': m.normalize_weights,
        'num_nextn_predict_layers': 0,
        'partial_rotary_factor': (m.rotary_dim or m.head_dim) / m.head_dim,
        'use_qk_norm': m.qk_norm,
    }


def rules(m: ModelConfig) -> list[Rule]:
    turned = {'h': rotary_last(m.head_dim, m.rotary_dim)} if m.rotary_dim else {}
    attention = [
        dataclasses.replace(rule, take=turned) if rule.leaf.endswith(TURNED) else rule
        for rule in (*llama.ATTENTION, *llama.BIASES, *qwen3.QK_NORMS)
    ]
    return [
        *llama.NORMS, *attention, *llama.SWIGLU, qwen3_moe.ROUTER, deepseek.CORRECTION,
        *qwen3_moe.EXPERTS, *deepseek.SHARED,
    ]  # fmt: skip


FAMILY = Family(('glm4_moe',), 'Glm4MoeForCausalLM', fields, config, rules, deepseek.further_layers)
