"""Qwen3-MoE: Qwen3's attention, experts by a softmax over all, without shared ones."""

from typing import Any

from config import ConfigError, ModelConfig
from families import llama, qwen3
from families.family import Family
from families.fields import Released, blocks, layer_list
from families.rules import Rule

EXPERTS = [
    Rule('ffn.experts.w_gate',
         'model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight', 'f d -> d f'),
    Rule('ffn.experts.w_up',
         'model.layers.{layer}.mlp.experts.{expert}.up_proj.weight', 'f d -> d f'),
    Rule('ffn.experts.w_down',
         'model.layers.{layer}.mlp.experts.{expert}.down_proj.weight', 'd f -> f d'),
]  # fmt: skip
ROUTER = Rule('ffn.router', 'model.layers.{layer}.mlp.gate.weight', 'e d -> d e')
NO_BIAS = Rule('ffn.bias', '')


def sparse_fields(r: Released) -> dict[str, Any]:
    """Returns the fields of Qwen's experts, and the kinds of its layers."""
    n, step = r.need('num_hidden_layers'), r.get('decoder_sparse_step', 1)
    dense = r.get('mlp_only_layers', [])
    kinds = ['dense' if i in dense or (i + 1) % step else 'moe' for i in range(n)]
    return {
        **blocks(['gqa'] * n, kinds),
        'n_experts': r.get('num_experts') or r.need('num_local_experts'),
        'experts_per_token': r.need('num_experts_per_tok'),
        'd_expert': r.need('moe_intermediate_size'),
        'router': 'softmax',
        'normalize_weights': bool(r.get('norm_topk_prob', False)),
    }


def sparse_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `sparse_fields`."""
    kinds = [kind for _, kind in layer_list(m)]
    if any(attention != 'gqa' for attention, _ in layer_list(m)):
        raise ConfigError('a layer has a window or no rotary part, and none of the family has')
    if 'moe' not in kinds:
        raise ConfigError('the model has no experts, and all of the family do')
    return {
        'num_experts': m.n_experts,
        'num_experts_per_tok': m.experts_per_token,
        'moe_intermediate_size': m.d_expert,
        'norm_topk_prob': m.normalize_weights,
        'decoder_sparse_step': 1,
        'mlp_only_layers': [i for i, kind in enumerate(kinds) if kind == 'dense'],
    }


def fields(r: Released) -> dict[str, Any]:
    r.refuse_unless('use_sliding_window', [False], False)
    return qwen3.attention_fields(r) | sparse_fields(r)


def config(m: ModelConfig) -> dict[str, Any]:
    return qwen3.attention_config(m) | sparse_config(m) | {'use_sliding_window': False}


def rules(m: ModelConfig) -> list[Rule]:
    return [*llama.rules(m), *qwen3.QK_NORMS, ROUTER, NO_BIAS, *EXPERTS]


FAMILY = Family(('qwen3_moe',), 'Qwen3MoeForCausalLM', fields, config, rules)
