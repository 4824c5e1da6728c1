"""Writes yarn.json: YaRN's frequencies and factors by the code of transformers.

    pip install torch transformers && python tests/golden/make_yarn.py

Each case holds the fields of a config.json, and what transformers makes of them: the radians per
position of each pair, the factor on cosine and sine, and the factor on the scores.
"""

import importlib.metadata
import json
import pathlib
import platform

import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.llama.modeling_llama import LlamaAttention

DEEPSEEK_V3 = {
    'factor': 40.0, 'original_max_position_embeddings': 4096, 'beta_fast': 32.0, 'beta_slow': 1.0,
    'mscale': 1.0, 'mscale_all_dim': 1.0, 'rope_theta': 10_000.0,
}  # fmt: skip
DEEPSEEK_V2_LITE = DEEPSEEK_V3 | {'mscale': 0.707, 'mscale_all_dim': 0.707}
QWEN = {'factor': 4.0, 'original_max_position_embeddings': 32_768, 'rope_theta': 1_000_000.0}
NARROW = {
    'factor': 8.0, 'original_max_position_embeddings': 8192, 'rope_theta': 500_000.0,
    'beta_fast': 16.0, 'beta_slow': 2.0, 'attention_factor': 1.25,
}  # fmt: skip


def deepseek(rope: dict) -> dict:
    """Returns a case of latent attention: heads of 192, of which 64 rotate."""
    config = DeepseekV3Config(
        hidden_size=64, num_attention_heads=1, num_key_value_heads=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=8,
        max_position_embeddings=length(rope), rope_parameters={'rope_type': 'yarn'} | rope,
    )  # fmt: skip
    return case('mla', config, DeepseekV3Attention(config, 0).scaling, rope)


def llama(rope: dict) -> dict:
    """Returns a case of grouped-query attention: heads of 128, all of which rotate."""
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=1, num_key_value_heads=1, head_dim=128,
        max_position_embeddings=length(rope), rope_parameters={'rope_type': 'yarn'} | rope,
    )  # fmt: skip
    return case('gqa', config, LlamaAttention(config, 0).scaling, rope)


def length(rope: dict) -> int:
    """Returns the context after the extension."""
    return int(rope['factor'] * rope['original_max_position_embeddings'])


def case(attention: str, config, scaling: float, rope: dict) -> dict:
    frequencies, factor = ROPE_INIT_FUNCTIONS['yarn'](config, torch.device('cpu'))
    return {
        'attention': attention,
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
            'deepseek_v3': deepseek(DEEPSEEK_V3),
            'deepseek_v2_lite': deepseek(DEEPSEEK_V2_LITE),
            'qwen': llama(QWEN),
            'narrow': llama(NARROW),
        },
    }
    pathlib.Path(__file__).with_name('yarn.json').write_text(json.dumps(golden) + '\n')
