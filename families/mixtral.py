"""Mixtral: Llama's attention, and a softmax over the chosen experts alone, which is the one over
all, normalized."""

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
from families.rules import Rule

EXPERTS = [
    Rule('ffn.experts.w_gate',
         'model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight', 'f d -> d f'),
    Rule('ffn.experts.w_up',
         'model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight', 'f d -> d f'),
    Rule('ffn.experts.w_down',
         'model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight', 'd f -> f d'),
]  # fmt: skip
ROUTER = Rule('ffn.router', 'model.layers.{layer}.block_sparse_moe.gate.weight', 'e d -> d e')
NO_BIAS = Rule('ffn.bias', '')
BASE = 1e6  # of the rotation, where config.json has none


def fields(r: Released) -> dict[str, Any]:
    windows = window_fields(r, r.get('sliding_window'), ['moe'] * r.need('num_hidden_layers'))
    moe = {
        'n_experts': r.need('num_local_experts'),
        'experts_per_token': r.need('num_experts_per_tok'),
        'd_expert': r.need('intermediate_size'),
        'router': 'softmax',
        'normalize_weights': True,
    }
    return common_fields(r, 1e-5) | gqa_fields(r) | rope_fields(r, BASE) | windows | moe


def config(m: ModelConfig) -> dict[str, Any]:
    all_same(m, 'moe')
    return common_config(m) | gqa_config(m) | rope_config(m) | window_config(m) | {
        'intermediate_size': m.d_expert,
        'num_local_experts': m.n_experts,
        'num_experts_per_tok': m.experts_per_token,
    }  # fmt: skip


def rules(m: ModelConfig) -> list[Rule]:
    return [*llama.NORMS, *llama.ATTENTION, ROUTER, NO_BIAS, *EXPERTS]


FAMILY = Family(('mixtral',), 'MixtralForCausalLM', fields, config, rules)
