"""Writes rope.json: frequencies and factors of scaled rotations by the code of transformers.

    pip install torch transformers && python tests/golden/make_rope.py

Each case holds the fields of a config.json, and what transformers makes of them: the radians per
position of each pair, the factor on cosine and sine, and the factor on the scores.
"""

import importlib.metadata
import json
import pathlib
import platform

import torch
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

DEEPSEEK_V3 = {
    'rope_type': 'yarn',
    'factor': 40.0, 'original_max_position_embeddings': 4096, 'beta_fast': 32.0, 'beta_slow': 1.0,
    'mscale': 1.0, 'mscale_all_dim': 1.0, 'rope_theta': 10_000.0,
}  # fmt: skip
DEEPSEEK_V2_LITE = DEEPSEEK_V3 | {'mscale': 0.707, 'mscale_all_dim': 0.707}
KIMI_K2 = DEEPSEEK_V3 | {'factor': 32.0, 'beta_fast': 1.0, 'rope_theta': 50_000.0}
QWEN = {
    'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32_768,
    'rope_theta': 1_000_000.0,
}  # fmt: skip
GPT_OSS = {
    'rope_type': 'yarn', 'factor': 32.0, 'original_max_position_embeddings': 4096,
    'beta_fast': 32.0, 'beta_slow': 1.0, 'truncate': False, 'rope_theta': 150_000.0,
}  # fmt: skip
LONG = QWEN | {'original_max_position_embeddings': 262_144, 'rope_theta': 10_000.0}
LLAMA_3_1 = {
    'rope_type': 'llama3', 'factor': 8.0, 'original_max_position_embeddings': 8192,
    'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'rope_theta': 500_000.0,
}  # fmt: skip
LLAMA_3_2 = LLAMA_3_1 | {'factor': 32.0}
LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 10_000.0}
NARROW = {
    'rope_type': 'yarn',
    'factor': 8.0, 'original_max_position_embeddings': 8192, 'rope_theta': 500_000.0,
    'beta_fast': 16.0, 'beta_slow': 2.0, 'attention_factor': 1.25,
}  # fmt: skip


def deepseek(rope: dict, of_config: type, attention: type) -> dict:
    """Returns a case of latent attention: heads of 192, of which 64 rotate."""
    config = of_config(
        hidden_size=64, num_attention_heads=1, num_key_value_heads=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=8,
        max_position_embeddings=length(rope), rope_parameters=rope,
    )  # fmt: skip
    return case('mla', config, attention(config, 0).scaling, rope)


def deepseek_v2(rope: dict) -> dict:
    return deepseek(rope, DeepseekV2Config, DeepseekV2Attention)


def deepseek_v3(rope: dict) -> dict:
    return deepseek(rope, DeepseekV3Config, DeepseekV3Attention)


def llama(rope: dict, head: int = 128) -> dict:
    """Returns a case of grouped-query attention: heads of which all rotates."""
    config = LlamaConfig(
        hidden_size=head, num_attention_heads=1, num_key_value_heads=1, head_dim=head,
        max_position_embeddings=length(rope), rope_parameters=rope,
    )  # fmt: skip
    return case('gqa', config, LlamaAttention(config, 0).scaling, rope)


def length(rope: dict) -> int:
    """Returns the context after the extension."""
    return int(rope['factor'] * rope.get('original_max_position_embeddings', 2048))


def case(attention: str, config, scaling: float, rope: dict) -> dict:
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope['rope_type']](config, torch.device('cpu'))
    return {
        'attention': attention,
        'head': config.head_dim,
        'rope': rope,
        'frequencies': frequencies.double().tolist(),
        'attention_factor': factor,
        'scale': scaling,
    }


if __name__ == '__main__':
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'transformers')}
    golden = {
        'versions': versions | {'python': platform.python_version()},
        'cases': {
            'deepseek_v3': deepseek_v3(DEEPSEEK_V3),
            'deepseek_v2_lite': deepseek_v2(DEEPSEEK_V2_LITE),
            'kimi_k2': deepseek_v3(KIMI_K2),
            'qwen': llama(QWEN),
            'long': llama(LONG),
            'gpt_oss': llama(GPT_OSS, head=64),
            'narrow': llama(NARROW),
            'llama_3_1': llama(LLAMA_3_1),
            'llama_3_2': llama(LLAMA_3_2, head=64),
            'linear': llama(LINEAR),
        },
    }
    pathlib.Path(__file__).with_name('rope.json').write_text(json.dumps(golden) + '\n')
