"""Qwen2-MoE: Qwen2's attention, Qwen3-MoE's experts, and a shared expert behind a gate."""

from typing import Any

from config import ConfigError, ModelConfig
from families import llama, qwen2, qwen3_moe
from families.family import Family
from families.fields import Released, common_config, gqa_config, rope_config
from families.rules import Rule

SHARED = [
    Rule('ffn.shared.w_gate',
         'model.layers.{layer}.mlp.shared_expert.gate_proj.weight', 'f d -> d f'),
    Rule('ffn.shared.w_up',
         'model.layers.{layer}.mlp.shared_expert.up_proj.weight', 'f d -> d f'),
    Rule('ffn.shared.w_down',
         'model.layers.{layer}.mlp.shared_expert.down_proj.weight', 'd f -> f d'),
    Rule('ffn.shared_gate', 'model.layers.{layer}.mlp.shared_expert_gate.weight', 'o d -> d o'),
]  # fmt: skip


def fields(r: Released) -> dict[str, Any]:
    r.refuse_unless('use_sliding_window', [False], False)
    r.refuse_unless('qkv_bias', [True], True)
    sparse = qwen3_moe.sparse_fields(r)
    shared, size = r.need('shared_expert_intermediate_size'), sparse['d_expert']
    if shared % size or not shared:
        raise ConfigError(
            f'{r.where} has shared_expert_intermediate_size={shared}, which this code computes as '
            f'a multiple of moe_intermediate_size={size} alone'
        )
    return qwen2.attention_fields(r) | sparse | {
        'attention_bias': 'qkv',
        'n_shared_experts': shared // size,
        'shared_gate': True,
    }  # fmt: skip


def config(m: ModelConfig) -> dict[str, Any]:
    keys = common_config(m) | gqa_config(m) | rope_config(m) | qwen3_moe.sparse_config(m)
    return keys | {
        'shared_expert_intermediate_size': m.n_shared_experts * m.d_expert,
        'use_sliding_window': False,
    }


def rules(m: ModelConfig) -> list[Rule]:
    return [*llama.rules(m), qwen3_moe.ROUTER, qwen3_moe.NO_BIAS, *qwen3_moe.EXPERTS, *SHARED]


FAMILY = Family(('qwen2_moe',), 'Qwen2MoeForCausalLM', fields, config, rules)
