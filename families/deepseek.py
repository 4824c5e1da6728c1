"""DeepSeek-V3, V2 and what has the same layers (Kimi K2): multi-head latent attention, dense
layers first, then experts in groups with shared ones.

Their rotary weights come in neighbouring pairs, which are permuted to this code's halves.
"""

from collections.abc import Mapping
from typing import Any

from config import ConfigError, ModelConfig
from families import llama
from families.family import Family
from families.fields import (
    Released,
    blocks,
    common_config,
    common_fields,
    layer_list,
    rope_config,
    rope_fields,
)
from families.qwen3_moe import EXPERTS, NO_BIAS, ROUTER
from families.rules import Rule, halves_of_pairs, slices

LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps
CORRECTION = Rule(
    'ffn.bias', 'model.layers.{layer}.mlp.gate.e_score_correction_bias', 'e -> e', float32=True
)
SHARED = [
    Rule('ffn.shared.w_gate',
         'model.layers.{layer}.mlp.shared_experts.gate_proj.weight', 'f d -> d f'),
    Rule('ffn.shared.w_up',
         'model.layers.{layer}.mlp.shared_experts.up_proj.weight', 'f d -> d f'),
    Rule('ffn.shared.w_down',
         'model.layers.{layer}.mlp.shared_experts.down_proj.weight', 'd f -> f d'),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------


def mla_rules(m: ModelConfig) -> list[Rule]:
    """Returns the rules of multi-head latent attention."""
    at = 'model.layers.{layer}.self_attn.'
    query = {'h': halves_of_pairs(m.nope_dim, m.rope_dim)}
    both = m.nope_dim + m.v_dim
    if m.q_rank:
        queries = [
            Rule('attention.w_q_down', at + 'q_a_proj.weight', 'r d -> d r'),
            Rule('attention.q_norm', at + 'q_a_layernorm.weight', 'r -> r'),
            Rule('attention.w_q_up', at + 'q_b_proj.weight', '(n h) r -> r n h', query),
        ]
    else:
        queries = [Rule('attention.w_q', at + 'q_proj.weight', '(n h) d -> d n h', query)]
    return [
        *queries,
        Rule(
            'attention.w_kv_down', at + 'kv_a_proj_with_mqa.weight', 'r d -> d r',
            {'r': halves_of_pairs(m.kv_rank, m.rope_dim)},
        ),
        Rule('attention.kv_norm', at + 'kv_a_layernorm.weight', 'r -> r'),
        Rule(
            'attention.w_k_up', at + 'kv_b_proj.weight', '(n h) r -> r n h',
            {'h': slices(0, m.nope_dim, both)},
        ),
        Rule(
            'attention.w_v_up', at + 'kv_b_proj.weight', '(n h) r -> r n h',
            {'h': slices(m.nope_dim, both, both)},
        ),
        Rule('attention.w_o', at + 'o_proj.weight', 'd (n h) -> n h d'),
    ]  # fmt: skip


def mla_fields(r: Released) -> dict[str, Any]:
    """Returns the fields of attention and of what lies outside of the layers."""
    r.refuse_unless('attention_bias', [False], False)
    return (
        common_fields(r)
        | rope_fields(r)
        | {
            'attention': 'mla',
            'q_rank': r.get('q_lora_rank', 0),
            'kv_rank': r.need('kv_lora_rank'),
            'nope_dim': r.need('qk_nope_head_dim'),
            'rope_dim': r.need('qk_rope_head_dim'),
            'v_dim': r.need('v_head_dim'),
            'latent_norm_eps': LATENT_EPS,
        }
    )


def mla_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `mla_fields`."""
    if m.attention != 'mla':
        raise ConfigError(f'model.attention={m.attention!r}, and all of the family have mla')
    return common_config(m) | rope_config(m) | {
        'attention_bias': False,
        'q_lora_rank': m.q_rank or None,
        'kv_lora_rank': m.kv_rank,
        'qk_nope_head_dim': m.nope_dim,
        'qk_rope_head_dim': m.rope_dim,
        'v_head_dim': m.v_dim,
        'num_key_value_heads': m.n_heads,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Experts
# ---------------------------------------------------------------------------------------------


def expert_fields(r: Released, attention: str = 'mla') -> dict[str, Any]:
    """Returns the fields of the experts, and the kinds of the layers."""
    r.refuse_unless('moe_layer_freq', [1], 1)
    n = r.need('num_hidden_layers')
    dense = min(r.get('first_k_dense_replace', 0), n)
    return {
        **blocks([attention] * n, ['dense'] * dense + ['moe'] * (n - dense)),
        'n_experts': r.get('n_routed_experts') or r.need('num_local_experts'),
        'experts_per_token': r.need('num_experts_per_tok'),
        'd_expert': r.need('moe_intermediate_size'),
        'n_shared_experts': r.get('n_shared_experts', 0),
        'routed_scale': float(r.get('routed_scaling_factor', 1.0)),
    }


def expert_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the keys of `expert_fields`."""
    kinds = [kind for _, kind in layer_list(m)]
    dense = kinds.index('moe') if 'moe' in kinds else len(kinds)
    if 'dense' in kinds[dense:]:
        raise ConfigError('a dense layer follows on one with experts, which no model of the family '
                          'has')  # fmt: skip
    return {
        'first_k_dense_replace': dense,
        'moe_layer_freq': 1,
        'n_routed_experts': m.n_experts,
        'num_experts_per_tok': m.experts_per_token,
        'moe_intermediate_size': m.d_expert,
        'n_shared_experts': m.n_shared_experts,
        'routed_scaling_factor': m.routed_scale,
        'n_group': m.n_expert_groups,
        'topk_group': m.n_top_groups,
    }


def v3_fields(r: Released) -> dict[str, Any]:
    r.refuse_unless('rope_interleave', [True], True)
    return mla_fields(r) | expert_fields(r) | sigmoid_fields(r)


def sigmoid_fields(r: Released) -> dict[str, Any]:
    """Returns the fields of V3's router, whose choice has correction biases."""
    r.refuse_unless('scoring_func', ['sigmoid'], 'sigmoid')
    r.refuse_unless('topk_method', ['noaux_tc'], 'noaux_tc')
    return {
        'router': 'sigmoid',
        'normalize_weights': bool(r.get('norm_topk_prob', True)),
        'n_expert_groups': r.get('n_group', 1),
        'n_top_groups': r.get('topk_group', 1),
        'bias_rate': 1e-3,
    }


def v3_config(m: ModelConfig) -> dict[str, Any]:
    return mla_config(m) | expert_config(m) | {
        'scoring_func': 'sigmoid',
        'topk_method': 'noaux_tc',
        'norm_topk_prob': m.normalize_weights,
        'num_nextn_predict_layers': 0,
    }  # fmt: skip


def v3_rules(m: ModelConfig) -> list[Rule]:
    return [*llama.NORMS, *mla_rules(m), *llama.SWIGLU, ROUTER, CORRECTION, *EXPERTS, *SHARED]


def further_layers(r: Released) -> Mapping[str, str]:
    """Names the layers behind the last one, which predict further tokens."""
    n = r.need('num_hidden_layers')
    return {
        f'model.layers.{n + i}.': 'multi-token prediction'
        for i in range(r.get('num_nextn_predict_layers') or r.get('num_mtp_layers', 0))
    }


def v2_fields(r: Released) -> dict[str, Any]:
    r.refuse_unless('scoring_func', ['softmax'], 'softmax')
    r.refuse_unless('topk_method', ['greedy', 'group_limited_greedy'], 'greedy')
    r.refuse_unless('norm_topk_prob', [False], False)
    fields = mla_fields(r) | expert_fields(r) | {'router': 'softmax', 'normalize_weights': False}
    if r.get('topk_method') == 'group_limited_greedy' and r.get('n_group', 1) > 1:
        groups = {'n_expert_groups': r.need('n_group'), 'n_top_groups': r.need('topk_group')}
        fields |= groups | {'group_score': 'max'}
    return fields


def v2_config(m: ModelConfig) -> dict[str, Any]:
    grouped = m.n_expert_groups > 1
    return mla_config(m) | expert_config(m) | {
        'scoring_func': 'softmax',
        'topk_method': 'group_limited_greedy' if grouped else 'greedy',
        'norm_topk_prob': False,
    }  # fmt: skip


def v2_rules(m: ModelConfig) -> list[Rule]:
    return [*llama.NORMS, *mla_rules(m), *llama.SWIGLU, ROUTER, NO_BIAS, *EXPERTS, *SHARED]


V3 = Family(
    ('deepseek_v3', 'kimi_k2'), 'DeepseekV3ForCausalLM', v3_fields, v3_config, v3_rules,
    further_layers,
)  # fmt: skip
V2 = Family(('deepseek_v2',), 'DeepseekV2ForCausalLM', v2_fields, v2_config, v2_rules)
