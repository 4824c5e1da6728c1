"""Writes experts.json: mixtures of experts of released models by the code of transformers.

    pip install torch transformers && python tests/golden/make_experts.py

Each case holds the fields that the model has here, parameters in the layout of `moe.moe_params`,
tokens, the layer's output, the load of each expert, and the gradients of Σ output · cotangent.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

SEED = 0
B, T, D, F, E, C = 2, 8, 6, 4, 8, 3
GROUP_LIMITED = 'group_limited_greedy'

OF_EXPERTS = {
    'hidden_size': D, 'moe_intermediate_size': F, 'n_routed_experts': E, 'num_experts': E,
    'num_local_experts': E, 'num_experts_per_tok': C, 'experts_implementation': 'eager',
    'num_attention_heads': 1, 'num_key_value_heads': 1,
}  # fmt: skip
ALL_ALIKE = OF_EXPERTS | {'intermediate_size': F}  # where experts have no size of their own
GROUPS = {'n_group': 4, 'topk_group': 2}
OURS = {'router': 'softmax', 'normalize_weights': True, 'n_shared_experts': 0}
OUR_GROUPS = {'n_expert_groups': 4, 'n_top_groups': 2}


@dataclasses.dataclass(frozen=True)
class Model:
    """A layer of transformers, the config that makes it, and its fields here beyond OURS."""

    layer: type
    config: type
    fields: dict
    ours: dict


MODELS = {
    'mixtral': Model(MixtralSparseMoeBlock, MixtralConfig, ALL_ALIKE, {}),
    'qwen3_moe': Model(
        Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, OF_EXPERTS | {'norm_topk_prob': True}, {}
    ),
    'qwen2_moe': Model(
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig,
        OF_EXPERTS | {'shared_expert_intermediate_size': 2 * F, 'norm_topk_prob': False},
        {'normalize_weights': False, 'n_shared_experts': 2, 'shared_gate': True},
    ),
    'deepseek_v2': Model(
        DeepseekV2Moe,
        DeepseekV2Config,
        OF_EXPERTS
        | GROUPS
        | {'n_shared_experts': 2, 'routed_scaling_factor': 2.5, 'topk_method': GROUP_LIMITED},
        OUR_GROUPS
        | {'normalize_weights': False, 'n_shared_experts': 2, 'routed_scale': 2.5}
        | {'group_score': 'max'},
    ),
    'deepseek_v3': Model(
        DeepseekV3MoE,
        DeepseekV3Config,
        OF_EXPERTS
        | GROUPS
        | {'n_shared_experts': 1, 'routed_scaling_factor': 2.5, 'norm_topk_prob': True},
        OUR_GROUPS
        | {'router': 'sigmoid', 'n_shared_experts': 1, 'routed_scale': 2.5}
        | {'group_score': 'top2'},
    ),
    'gpt_oss': Model(
        GptOssMLP,
        GptOssConfig,
        ALL_ALIKE | {'swiglu_limit': 0.75},
        {'router_bias': True, 'expert_bias': True, 'swiglu_limit': 0.75},
    ),
}


def ours(tensors: dict[str, Tensor]) -> dict:
    """Returns tensors of a layer of transformers in the layout here, by its names."""
    get = tensors.get
    if 'router.bias' in tensors:  # gpt-oss: gate and up in turns, inputs first
        both, biases = get('experts.gate_up_proj'), get('experts.gate_up_proj_bias')
        return {
            'router': get('router.weight').T,
            'router_bias': get('router.bias'),
            'experts': {
                'w_gate': both[..., ::2], 'w_up': both[..., 1::2],
                'w_down': get('experts.down_proj'), 'b_gate': biases[:, ::2],
                'b_up': biases[:, 1::2], 'b_down': get('experts.down_proj_bias'),
            },
        }  # fmt: skip
    gate, up = get('experts.gate_up_proj').chunk(2, dim=1)
    down = get('experts.down_proj')
    tree = {
        'router': get('gate.weight').T,
        'experts': {'w_gate': gate.mT, 'w_up': up.mT, 'w_down': down.mT},
    }
    if 'gate.e_score_correction_bias' in tensors:
        tree['bias'] = get('gate.e_score_correction_bias')
    for shared in ('shared_expert', 'shared_experts'):
        if f'{shared}.up_proj.weight' in tensors:
            tree['shared'] = {
                f'w_{name}': get(f'{shared}.{name}_proj.weight').T
                for name in ('gate', 'up', 'down')
            }
    if 'shared_expert_gate.weight' in tensors:
        tree['shared_gate'] = get('shared_expert_gate.weight').T
    return tree


def as_lists(tree: dict | Tensor, digits: int) -> dict | list:
    """Returns nested lists of rounded numbers."""
    if isinstance(tree, dict):
        return {name: as_lists(x, digits) for name, x in tree.items()}
    flat = [float(f'{x:.{digits}g}') for x in tree.detach().double().reshape(-1).tolist()]
    return {'shape': list(tree.shape), 'numbers': flat}


def case(model: Model) -> dict:
    layer = model.layer(model.config(**model.fields))
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    for name, x in tensors.items():  # all random, the biases too, and exact in three digits
        scale = 0.2 if 'correction' in name else 0.7
        x.data = (scale * torch.randn(x.shape)).mul(1000).round().div(1000)
    x_BTD, d_BTD = (torch.randn(B, T, D).mul(1000).round().div(1000) for _ in range(2))
    x_BTD.requires_grad_(True)
    router, found = getattr(layer, 'gate', getattr(layer, 'router', None)), []
    router.register_forward_hook(lambda _, __, out: found.append(out[-1]))
    out = layer(x_BTD)
    out_BTD = out[0] if isinstance(out, tuple) else out
    (out_BTD * d_BTD).sum().backward()
    grads = {n: x.grad for n, x in tensors.items() if x.requires_grad}
    return {
        'fields': OURS | model.ours,
        'params': as_lists(ours(tensors), 4),
        'x': as_lists(x_BTD, 4),
        'cotangent': as_lists(d_BTD, 4),
        'output': as_lists(out_BTD, 8),
        'load': torch.bincount(found[0].reshape(-1), minlength=E).tolist(),
        'gradients': as_lists(ours(grads) | {'x': x_BTD.grad}, 8),
    }


if __name__ == '__main__':
    torch.manual_seed(SEED)
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'transformers')}
    golden = {
        'versions': versions | {'python': platform.python_version()},
        'sizes': {'d_model': D, 'd_expert': F, 'n_experts': E, 'experts_per_token': C},
        'cases': {name: case(model) for name, model in MODELS.items()},
    }
    pathlib.Path(__file__).with_name('experts.json').write_text(json.dumps(golden) + '\n')
