"""The order of windows in an epoch, and of the sources in a mixture: pure functions."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from config import ConfigError
from corpus.hashes import mix

MAX_PERIOD = 10_000  # at most so many samples, then the order of a mixture's sources repeats


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the images of `index` under a permutation of 0..n-1 that seed and epoch choose.

    int64, in the shape of `index`. A Feistel network permutes 0..4**half-1, up to the next power
    of 4. Numbers that it sends to n or beyond go through it again until they are below n, which
    makes it a permutation of 0..n-1 (cycle walking).
    """
    half = max(1, math.ceil((n - 1).bit_length() / 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.array(index, np.uint64)
    beyond = np.ones(x.shape, bool)
    while beyond.any():
        left, right = x[beyond] >> np.uint64(half), x[beyond] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        x[beyond] = left << np.uint64(half) | right
        beyond = x >= n
    return x.astype(np.int64)


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Returns whole numbers in the ratio of the weights, exact to 1 part in MAX_PERIOD.

    Raises ConfigError if a weight is not positive, or too small a part of their sum.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(
            f'the weights of a mixture are finite and above 0, but are {list(weights)}: leave a '
            'source of weight 0 out'
        )
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * MAX_PERIOD) for share in shares]
    most_cut = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_PERIOD)
    for i in most_cut[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ConfigError(
            f'a weight of a mixture is at least {1 / MAX_PERIOD:g} of their sum, but they are '
            f'{list(weights)}: leave the smallest out or raise it'
        )
    return counts


def source_order(counts: Sequence[int]) -> np.ndarray:
    """Returns an order of the indices i in which i occurs counts[i] times, int64 [sum(counts)].

    Among the first n places, for any n, the number of places of i differs from
    n * counts[i] / sum(counts) by less than 1.

    Tijdeman's algorithm (The chairman assignment problem, 1980): each place goes, among the indices
    that are behind by at least 1 / (2k - 2) of a place (k = len(counts)), to the one with the
    earliest deadline.
    """
    k, period = len(counts), sum(counts)
    weight, unit = np.array(counts, np.int64), max(1, 2 * k - 2)
    behind = np.zeros(k, np.int64)  # in units of 1 / (period * unit) places
    out = np.empty(period, np.int64)
    for n in range(period):
        behind += weight * unit
        deadline = (period * (unit - 1) - behind) / weight
        out[n] = np.argmin(np.where(behind >= period, deadline, np.inf)) if k > 1 else 0
        behind[out[n]] -= period * unit
    return out
