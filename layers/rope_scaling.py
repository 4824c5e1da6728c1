"""Rotary positions beyond the length that a model was trained on: position interpolation, Llama 3's
form of it, and YaRN.

All slow rotations down; YaRN also makes queries and keys longer, hence attention sharper.
"""

import math
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from config import ModelConfig

SCALINGS = ('none', 'linear', 'llama3', 'yarn')

# Those of released models that are no constants of a model, and why they are not computed.
REFUSED = {
    'dynamic': (
        'changes all rotations with the length of the sequence at hand, so that a cached key has '
        'those of another length than the query'
    ),
    'longrope': (
        'has a factor for each pair, searched for one model, and other ones below its original '
        'length'
    ),
}


def rope_frequencies(cfg: ModelConfig, rotary: int) -> np.ndarray:
    """Returns the radians per position of each pair of rotary dimensions: float64 [rotary / 2].

    'linear' divides all by the factor (position interpolation, Chen et al. 2023). The others leave
    those that turn often within the original context, divide those that turn seldom, and blend
    between: 'llama3' linearly in the number of turns, from low_freq_factor to high_freq_factor (as
    released with Llama 3.1); 'yarn', from beta_slow to beta_fast, as `yarn_slowed` has it.
    """
    half = rotary // 2
    freqs = cfg.rope_base ** (-np.arange(half) / half)
    if cfg.rope_scaling == 'none':
        return freqs
    if cfg.rope_scaling == 'linear':
        return freqs / cfg.rope_factor
    if cfg.rope_scaling == 'llama3':
        low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
        turns = cfg.rope_original_len * freqs / (2 * math.pi)
        slowed = 1 - np.clip((turns - low) / (high - low), 0, 1)
    else:
        slowed = yarn_slowed(cfg, rotary)
    return freqs * (1 - slowed) + freqs / cfg.rope_factor * slowed


def yarn_slowed(cfg: ModelConfig, rotary: int) -> np.ndarray:
    """Returns how much of the slowing down each pair takes in YaRN, 0 to 1: float64 [rotary / 2].

    Peng et al. 2023, section 3.2, but linear in the index of the pair, with both ends rounded
    outwards where rope_truncate says so, as DeepSeek's, Qwen's and other released models do. (The
    paper's formula is linear in the number of turns. gpt-oss does not round.)
    """
    half = rotary // 2

    def index_of(turns: float) -> float:
        """Returns the index, with a fraction, of the pair that turns so often."""
        longest = math.log(cfg.rope_original_len / (2 * math.pi * turns))
        return half * longest / math.log(cfg.rope_base)

    first, last = index_of(cfg.rope_beta_fast), index_of(cfg.rope_beta_slow)
    if cfg.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary - 1)
    return np.clip((np.arange(half) - first) / max(last - first, 0.001), 0, 1)


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
    """Yields errors for constants that do not go together."""
    m = config.model
    if m.rope_scaling == 'llama3' and m.rope_low_freq_factor >= m.rope_high_freq_factor:
        yield (
            f'model.rope_low_freq_factor={m.rope_low_freq_factor} and model.rope_high_freq_factor='
            f'{m.rope_high_freq_factor} are turns within the original context, at which slowing '
            f'down is whole and none; use a low one below the high one, as 1 and 4'
        )
    if m.rope_scaling != 'yarn':
        return
    if m.rope_beta_slow > m.rope_beta_fast:
        yield (
            f'model.rope_beta_slow={m.rope_beta_slow} and model.rope_beta_fast={m.rope_beta_fast} '
            f'are turns within the original context; use a beta_slow up to beta_fast, as 1 and 32'
        )
    if m.rope_base <= 1:
        yield f'model.rope_base={m.rope_base} slows no pair down; use a base above 1'
