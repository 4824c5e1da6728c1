"""Sizes of released models, by the names under which their training runs are published.

From the config.json of each release. Only what a plan depends on stands here: sizes, kinds of
layers, tied embeddings; no eps, no rotary base, no factors of routers.
"""

from typing import Any

from ml_collections import ConfigDict

from config import ConfigError

# (vocab_size, d_model, n_layers, d_ff, n_heads, n_kv_heads), heads of 128 unless `MORE` says
# otherwise, untied embeddings.
LLAMA = {
    'llama2-7b': (32_000, 4096, 32, 11_008, 32, 32),
    'llama2-13b': (32_000, 5120, 40, 13_824, 40, 40),
    'llama2-70b': (32_000, 8192, 80, 28_672, 64, 8),
    'llama3-8b': (128_256, 4096, 32, 14_336, 32, 8),
    'llama3-70b': (128_256, 8192, 80, 28_672, 64, 8),
    'llama3-405b': (128_256, 16_384, 126, 53_248, 128, 8),
    'llama3.2-1b': (128_256, 2048, 16, 8192, 32, 8),
    'llama3.2-3b': (128_256, 3072, 28, 8192, 24, 8),
    'mistral-7b': (32_000, 4096, 32, 14_336, 32, 8),
    'qwen2.5-7b': (152_064, 3584, 28, 18_944, 28, 4),
    'qwen2.5-32b': (152_064, 5120, 64, 27_648, 40, 8),
    'qwen2.5-72b': (152_064, 8192, 80, 29_568, 64, 8),
    'qwen3-8b': (151_936, 4096, 36, 12_288, 32, 8),
    'qwen3-14b': (151_936, 5120, 40, 17_408, 40, 8),
    'qwen3-32b': (151_936, 5120, 64, 25_600, 64, 8),
}

# The same, with the experts' hidden size for d_ff, and (n_experts, experts_per_token).
MIXTURES = {
    'mixtral-8x7b': (32_000, 4096, 32, 14_336, 32, 8, 8, 2),
    'mixtral-8x22b': (32_768, 6144, 56, 16_384, 48, 8, 8, 2),
    'qwen3-30b-a3b': (151_936, 2048, 48, 768, 32, 4, 128, 8),
    'qwen3-235b-a22b': (151_936, 4096, 94, 1536, 64, 4, 128, 8),
    'gpt-oss-20b': (201_088, 2880, 24, 2880, 64, 8, 32, 4),
    'gpt-oss-120b': (201_088, 2880, 36, 2880, 64, 8, 128, 4),
}

# Latent attention with heads of 128 + 64: (vocab_size, d_model, n_layers, first_dense, d_ff,
# n_heads, q_rank, n_experts, experts_per_token, n_shared_experts, d_expert).
LATENT = {
    'deepseek-v2': (102_400, 5120, 60, 1, 12_288, 128, 1536, 160, 6, 2, 1536),
    'deepseek-v2-lite': (102_400, 2048, 27, 1, 10_944, 16, 0, 64, 6, 2, 1408),
    'deepseek-v3': (129_280, 7168, 61, 3, 18_432, 128, 1536, 256, 8, 1, 2048),
    'kimi-k2': (163_840, 7168, 61, 1, 18_432, 64, 1536, 384, 8, 1, 2048),
}

GPT_OSS = {
    'head_dim': 64, 'window': 128, 'block': ('gqa_window+moe', 'gqa+moe'), 'router_bias': True,
    'expert_bias': True, 'attention_sinks': True, 'attention_bias': 'qkvo',
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    'llama3.2-1b': {'head_dim': 64, 'tie_embeddings': True},
    'llama3.2-3b': {'tie_embeddings': True},
    'mistral-7b': {'window': 4096, 'block': ('gqa_window+dense',)},
    **{f'qwen2.5-{n}': {'attention_bias': 'qkv'} for n in ('7b', '32b', '72b')},
    **{name: {'qk_norm': True} for name in (*LLAMA, *MIXTURES) if name.startswith('qwen3')},
    'gpt-oss-20b': GPT_OSS,
    'gpt-oss-120b': GPT_OSS,
}

# Other names of the same sizes.
ALSO = {
    'llama3.1-8b': 'llama3-8b', 'llama3.1-70b': 'llama3-70b', 'llama3.1-405b': 'llama3-405b',
    'llama3.3-70b': 'llama3-70b', 'deepseek2-236b': 'deepseek-v2', 'deepseek2-16b':
    'deepseek-v2-lite', 'deepseek3-671b': 'deepseek-v3', 'deepseek-v3-671b': 'deepseek-v3',
    'deepseek-r1': 'deepseek-v3', 'kimi-k2-1t': 'kimi-k2',
}  # fmt: skip

NAMES = (*LLAMA, *MIXTURES, *LATENT, *ALSO)


def known_as(model: str) -> str:
    """Returns the name under which the sizes of a model stand here."""
    name = model.lower().replace('_', '-')
    return ALSO.get(name, name)


def fields_of(model: str) -> dict[str, Any]:
    """Returns the fields of config.model of a released model. Raises ConfigError if it has none
    of NAMES."""
    name = known_as(model)
    common = dict(zip(('vocab_size', 'd_model', 'n_layers'), sizes(name), strict=False))
    common |= {'tie_embeddings': False}
    if name in LATENT:
        first, d_ff, heads, q_rank, experts, each, shared, d_expert = LATENT[name][3:]
        return common | {
            'attention': 'mla', 'first_dense': first, 'block': ('moe',), 'd_ff': d_ff,
            'n_heads': heads, 'q_rank': q_rank, 'kv_rank': 512, 'nope_dim': 128, 'rope_dim': 64,
            'v_dim': 128, 'n_experts': experts, 'experts_per_token': each,
            'n_shared_experts': shared, 'd_expert': d_expert,
        }  # fmt: skip
    width, heads, kv_heads = sizes(name)[3:6]
    common |= {'attention': 'gqa', 'n_heads': heads, 'n_kv_heads': kv_heads, 'head_dim': 128}
    if name in MIXTURES:
        experts, each = MIXTURES[name][6:]
        common |= {
            'block': ('moe',), 'd_expert': width, 'n_experts': experts, 'experts_per_token': each,
            'n_shared_experts': 0, 'router': 'softmax',
        }  # fmt: skip
    else:
        common |= {'block': ('dense',), 'd_ff': width}
    return common | MORE.get(name, {})


def sizes(name: str) -> tuple[int, ...]:
    """Returns a model's line. Raises ConfigError if it has none."""
    for table in (LLAMA, MIXTURES, LATENT):
        if name in table:
            return table[name]
    raise ConfigError(f'the model {name!r} is unknown; use {", ".join(NAMES)}')


def set_model(config: ConfigDict, model: str) -> None:
    """Sets config.model to the sizes of a released model."""
    config.model.update(fields_of(model))
