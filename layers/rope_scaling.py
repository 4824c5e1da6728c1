"""Rotary positions beyond the length that a model was trained on: position interpolation and YaRN.

Both slow rotations down; YaRN also makes queries and keys longer, hence attention sharper.
"""

import math
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from config import ModelConfig


def rope_frequencies(cfg: ModelConfig, rotary: int) -> np.ndarray:
    """Returns the radians per position of each pair of rotary dimensions: float64 [rotary / 2].

    'linear' divides all by the factor (position interpolation, Chen et al. 2023). 'yarn' leaves
    those that turn more than beta_fast times within the original context, divides those that turn
    less than beta_slow times, and blends between (Peng et al. 2023, section 3.2): linearly in the
    index of the pair, with both ends rounded outwards, as DeepSeek's, Qwen's and other released
    models do. (The paper's formula is linear in the number of turns.)
    """
    half = rotary // 2
    freqs = cfg.rope_base ** (-np.arange(half) / half)
    if cfg.rope_scaling == 'none':
        return freqs
    if cfg.rope_scaling == 'linear':
        return freqs / cfg.rope_factor

    def index_of(turns: float) -> float:
        """Returns the index, with a fraction, of the pair that turns so often."""
        longest = math.log(cfg.rope_original_len / (2 * math.pi * turns))
        return half * longest / math.log(cfg.rope_base)

    first = max(math.floor(index_of(cfg.rope_beta_fast)), 0)
    last = min(math.ceil(index_of(cfg.rope_beta_slow)), rotary - 1)
    slowed = np.clip((np.arange(half) - first) / max(last - first, 0.001), 0, 1)
    return freqs * (1 - slowed) + freqs / cfg.rope_factor * slowed


def yarn_sharpening(factor: float, mscale: float) -> float:
    """Returns 0.1·mscale·ln(factor) + 1: how much longer YaRN makes queries and keys."""
    return 0.1 * mscale * math.log(factor) + 1


def rope_attention_factor(cfg: ModelConfig) -> float:
    """Returns YaRN's factor on cosines and sines, so on what rotates of queries and keys.

    rope_attention_factor if it is given. Otherwise 0.1·mscale·ln(factor) + 1 (Peng et al. 2023,
    section 3.4) over the same with mscale_all_dim, which `attention_scale` applies to whole heads.
    """
    if cfg.rope_scaling != 'yarn':
        return 1.0
    if cfg.rope_attention_factor:
        return cfg.rope_attention_factor
    factor = cfg.rope_factor
    return yarn_sharpening(factor, cfg.rope_mscale) / yarn_sharpening(
        factor, cfg.rope_mscale_all_dim
    )


def attention_scale(cfg: ModelConfig, key_size: int) -> float:
    """Returns the factor on scores: 1/√H, and YaRN's on both whole queries and whole keys.

    That is `yarn_sharpening` squared with mscale_all_dim, as DeepSeek's models have it; with 0, the
    default, YaRN sharpens only what rotates (`rope_attention_factor`).
    """
    if cfg.rope_scaling != 'yarn':
        return 1 / math.sqrt(key_size)
    return yarn_sharpening(cfg.rope_factor, cfg.rope_mscale_all_dim) ** 2 / math.sqrt(key_size)


def rope_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for constants of YaRN that do not go together."""
    m = config.model
    if m.rope_scaling != 'yarn':
        return
    if not 0 < m.rope_beta_slow < m.rope_beta_fast:
        yield (
            f'model.rope_beta_slow={m.rope_beta_slow} and model.rope_beta_fast={m.rope_beta_fast} '
            f'are turns within the original context; use a beta_slow above 0 and below beta_fast, '
            f'as 1 and 32'
        )
    if m.rope_base <= 1:
        yield f'model.rope_base={m.rope_base} slows no pair down; use a base above 1'
