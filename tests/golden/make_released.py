"""Makes the tiny released models of golden/released/ with transformers, and what they compute.

    pip install torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 && python make_released.py

A folder a model: config.json and safetensors files as `save_pretrained` writes them, in bfloat16
(the correction biases of routers in float32, as releases have them), and golden.npz: of a batch of
random tokens the logits, the loss and the gradients of some tensors by name, and 30 greedy tokens,
all computed in float32 from these very weights. Gains, biases and sinks are random too. The seed is
0; the versions are in golden.npz. `python make_released.py NAME ...` makes some of them.
"""

import copy
import json
import pathlib
import shutil
import sys
from typing import Any

import numpy as np
import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent / 'released'
VOCAB, LENGTH, PROMPT, GREEDY = 40, 16, 3, 30

SIZES = {
    'vocab_size': VOCAB, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
    'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8, 'rms_norm_eps': 0.05,
    'max_position_embeddings': 64, 'tie_word_embeddings': False, 'bos_token_id': 1,
    'eos_token_id': 2, 'pad_token_id': None,
}  # fmt: skip
EXPERTS = {'num_experts_per_tok': 2, 'moe_intermediate_size': 8}
LATENTS = {
    'num_key_value_heads': 4, 'q_lora_rank': 12, 'kv_lora_rank': 8, 'qk_nope_head_dim': 8,
    'qk_rope_head_dim': 8, 'v_head_dim': 6, 'first_k_dense_replace': 1, 'head_dim': None,
}  # fmt: skip
YARN = {
    'rope_type': 'yarn', 'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16,
    'beta_fast': 8.0, 'beta_slow': 0.5,
}  # fmt: skip

# model_type and the fields that differ from SIZES; the dtype's key and the rotation's are written
# in both spellings, the newer one by save_pretrained, the older one where 'older' is set.
MODELS: dict[str, dict[str, Any]] = {
    'llama2': {'model_type': 'llama', 'num_key_value_heads': 4, 'older': True},
    'llama31': {
        'model_type': 'llama', 'rope_theta': 500.0, 'tie_word_embeddings': True,
        'rope_scaling': {
            'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 1.0,
            'high_freq_factor': 4.0, 'original_max_position_embeddings': 16,
        },
    },
    'mistral': {'model_type': 'mistral', 'sliding_window': 6},
    'mixtral': {
        'model_type': 'mixtral', 'num_local_experts': 4, 'num_experts_per_tok': 2,
        'sliding_window': None,
    },
    'qwen2': {'model_type': 'qwen2', 'head_dim': None},
    'qwen2_moe': {
        'model_type': 'qwen2_moe', 'num_experts': 4, 'shared_expert_intermediate_size': 16,
        'head_dim': None, **EXPERTS,
    },
    'qwen3': {'model_type': 'qwen3'},
    'qwen3_moe': {
        'model_type': 'qwen3_moe', 'num_experts': 4, 'norm_topk_prob': True,
        'num_hidden_layers': 3, 'mlp_only_layers': [1], **EXPERTS,
    },
    'deepseek_v2': {
        'model_type': 'deepseek_v2', 'n_routed_experts': 8, 'n_shared_experts': 2,
        'topk_method': 'group_limited_greedy', 'n_group': 4, 'topk_group': 2,
        'routed_scaling_factor': 3.0, **EXPERTS, **LATENTS,
    },
    'deepseek_v2_lite': {
        'model_type': 'deepseek_v2', 'n_routed_experts': 4, 'n_shared_experts': 2,
        'topk_method': 'greedy', 'rope_scaling': YARN | {'mscale': 0.707, 'mscale_all_dim': 0.707},
        **EXPERTS, **LATENTS, 'q_lora_rank': None,
    },
    'deepseek_v3': {
        'model_type': 'deepseek_v3', 'n_routed_experts': 8, 'n_shared_experts': 1, 'n_group': 4,
        'topk_group': 2, 'routed_scaling_factor': 2.5, 'num_nextn_predict_layers': 1,
        'rope_scaling': YARN | {'mscale': 1.0, 'mscale_all_dim': 1.0}, **EXPERTS, **LATENTS,
    },
    'glm4_moe': {
        'model_type': 'glm4_moe', 'n_routed_experts': 4, 'n_shared_experts': 1, 'n_group': 1,
        'topk_group': 1, 'routed_scaling_factor': 1.5, 'attention_bias': True, 'use_qk_norm': True,
        'partial_rotary_factor': 0.5, 'first_k_dense_replace': 1, **EXPERTS,
    },
    'olmo2': {'model_type': 'olmo2', 'head_dim': None},
    'gpt_oss': {
        'model_type': 'gpt_oss', 'num_local_experts': 4, 'num_experts_per_tok': 2,
        'sliding_window': 6, 'intermediate_size': 12, 'swiglu_limit': 1.0,
        'layer_types': ['sliding_attention', 'full_attention'],
        'rope_scaling': YARN | {'truncate': False},
    },
}  # fmt: skip
SHARDED = {'llama2': '4KB', 'deepseek_v3': '8KB'}  # all others are one file


def make_model(fields: dict[str, Any]) -> torch.nn.Module:
    """Returns a model with random values of bfloat16 in float32."""
    fields = {k: v for k, v in (SIZES | fields).items() if (k, v) != ('head_dim', None)}
    fields.pop('older', None)
    config = AutoConfig.for_model(**fields)
    config._attn_implementation = 'eager'
    config._experts_implementation = 'eager'
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if 'inv_freq' in name:
            continue
        with torch.no_grad():
            if x.dim() >= 2:
                x.normal_(0, 1.5 * x.shape[-1] ** -0.5)
            elif 'norm' in name:
                x.normal_(1, 0.3)
            else:
                x.normal_(0, 0.2)
            if not keeps_float32(name):
                x.copy_(x.to(torch.bfloat16))
    return model.eval()


def keeps_float32(name: str) -> bool:
    """Returns whether releases have this tensor in float32."""
    return name.endswith('e_score_correction_bias')


def save(model: torch.nn.Module, folder: pathlib.Path, name: str) -> None:
    """Writes the model in bfloat16."""
    saved = copy.deepcopy(model)
    for key, x in [*saved.named_parameters(), *saved.named_buffers()]:
        if x.is_floating_point() and not keeps_float32(key):
            x.data = x.data.to(torch.bfloat16)
    saved.config.dtype = torch.bfloat16
    saved.save_pretrained(folder, max_shard_size=SHARDED.get(name, '1GB'))
    if MODELS[name].get('older'):
        path = folder / 'config.json'
        text = path.read_text().replace('"dtype"', '"torch_dtype"')
        config = json.loads(text)
        rope = config.pop('rope_parameters')
        config |= {'rope_theta': rope['rope_theta'], 'rope_scaling': None}
        path.write_text(json.dumps(config, indent=2) + '\n')


def computed(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Returns what golden.npz holds, but for the versions."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=generator)
    logits = model(tokens[:, :-1]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    wanted = ('embed_tokens', 'norm', 'q_proj', 'kv_a_proj', 'kv_b_proj', 'o_proj', 'bias', 'sinks',
              'layers.0.mlp.gate_proj', 'gate.weight', 'router', 'shared_expert_gate')  # fmt: skip
    grads = {
        f'grad/{released(name, model)}': p.grad.numpy()
        for name, p in model.named_parameters()
        if p.grad is not None and 'experts' not in name and any(part in name for part in wanted)
    }
    row = tokens[:1, :PROMPT]
    with torch.no_grad():
        for _ in range(GREEDY):
            row = torch.cat((row, model(row).logits[:, -1:].argmax(-1)), 1)
    return {
        'tokens': tokens.numpy().astype(np.int32),
        'logits': logits.detach().numpy(),
        'loss': loss.detach().numpy(),
        'greedy': row[0, PROMPT:].numpy().astype(np.int32),
        **grads,
    }


def released(name: str, model: torch.nn.Module) -> str:
    """Returns a parameter's name in the files, where transformers has another one in memory."""
    mixtral = model.config.model_type == 'mixtral'
    return name.replace('.mlp.', '.block_sparse_moe.') if mixtral else name


def main(names: list[str]) -> None:
    versions = {
        'torch': torch.__version__,
        'transformers': transformers.__version__,
        'safetensors': safetensors.__version__,
    }
    for name in names or MODELS:
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = make_model(MODELS[name])
        save(model, folder, name)
        (folder / 'README.md').unlink(missing_ok=True)
        np.savez_compressed(
            folder / 'golden.npz', versions=np.array(str(versions)), **computed(model)
        )
        print(name, sum(f.stat().st_size for f in folder.iterdir()))


if __name__ == '__main__':
    main(sys.argv[1:])
