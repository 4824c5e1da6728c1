"""gpt-oss: windows in every other layer, sinks, biases everywhere, a clamped SwiGLU.

A layer's experts are three-dimensional tensors; gates and ups take turns in one of them.
"""

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
from families.rules import Rule, slices

ALPHA = 1.702  # of the clamped SwiGLU
BASE = 150000.0  # of the rotation, where config.json has none
DEFAULT_LIMIT = 7.0


def fields(r: Released) -> dict[str, Any]:
    r.refuse_unless('attention_bias', [True], True)
    r.refuse_unless('swiglu_alpha', [ALPHA], ALPHA)
    n = r.need('num_hidden_layers')
    types = ['full_attention' if i % 2 else 'sliding_attention' for i in range(n)]
    given = Released({'layer_types': types} | dict(r.config), r.where)
    kinds = window_fields(given, r.get('sliding_window', 128), ['moe'] * n)
    return common_fields(r, 1e-5) | gqa_fields(r) | rope_fields(r, BASE) | kinds | {
        'head_dim': r.get('head_dim', 64),
        'attention_bias': 'qkvo',
        'attention_sinks': True,
        'n_experts': r.get('num_local_experts') or r.need('num_experts'),
        'experts_per_token': r.get('num_experts_per_tok') or r.need('experts_per_token'),
        'd_expert': r.need('intermediate_size'),
        'router': 'softmax',
        'router_bias': True,
        'expert_bias': True,
        'swiglu_limit': float(r.get('swiglu_limit', DEFAULT_LIMIT)),
    }  # fmt: skip


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'moe')
    keys = common_config(m) | gqa_config(m) | rope_config(m) | window_config(m)
    types = keys.get('layer_types', ['sliding_attention'] * m.n_layers)
    return keys | {
        'attention_bias': True,
        'intermediate_size': m.d_expert,
        'layer_types': types if keys['sliding_window'] else ['full_attention'] * m.n_layers,
        'num_experts_per_tok': m.experts_per_token,
        'num_local_experts': m.n_experts,
        'swiglu_limit': m.swiglu_limit,
    }


def rules(m: ModelConfig) -> list[Rule]:
    at, both = 'model.layers.{layer}.mlp.', 2 * m.d_expert
    gate = {'f': slices(0, both, both, step=2)}
    up = {'f': slices(1, both, both, step=2)}
    return [
        *llama.NORMS, *llama.ATTENTION, *llama.BIASES,
        Rule('attention.sinks', 'model.layers.{layer}.self_attn.sinks', 'n -> n'),
        Rule('ffn.router', at + 'router.weight', 'e d -> d e'),
        Rule('ffn.router_bias', at + 'router.bias', 'e -> e'),
        Rule('ffn.bias', ''),
        Rule('ffn.experts.w_gate', at + 'experts.gate_up_proj', 'e d f -> e d f', gate),
        Rule('ffn.experts.w_up', at + 'experts.gate_up_proj', 'e d f -> e d f', up),
        Rule('ffn.experts.w_down', at + 'experts.down_proj', 'e f d -> e f d'),
        Rule('ffn.experts.b_gate', at + 'experts.gate_up_proj_bias', 'e f -> e f', gate),
        Rule('ffn.experts.b_up', at + 'experts.gate_up_proj_bias', 'e f -> e f', up),
        Rule('ffn.experts.b_down', at + 'experts.down_proj_bias', 'e d -> e d'),
    ]  # fmt: skip


FAMILY = Family(('gpt_oss',), 'GptOssForCausalLM', fields, config, rules)
