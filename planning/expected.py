"""Expects the time of a training step: the roofline's parts, each at the share that runs reach.

A roofline bounds a step; what a run reaches is lower by factors that are alike from run to run. A
few of them a platform turn the parts of `planning.roofline` into seconds:

    matmuls    FLOPs at `matmul` of the rate that the chip holds (`Chip.held`), and `width` more
               rows, columns or depth of each matmul's smallest dimension: tiles that are not full,
               and pipelines of a matrix unit that fill and drain
    experts    the same at `experts` of that: rows are sorted by expert first, groups are uneven
    attention  FLOPs of the attention kernels at `attention` of the rate
    memory     bytes at `memory` of the bandwidth, in addition: elementwise work between matmuls
    stacking   what a scan over layers keeps takes so many times its bytes more than the roofline
               counts
    network    bytes at `network` of the links' rate. What fsdp and cp move hides behind work for
               `hidden` of its time, if there is so much work; the rest is waited for
    bubble     blocks of a pipeline take 1 / (1 - bubble) of their time
    doubling   each doubling of the devices adds so much of the step: the slowest is waited for

`fitted` finds the shares from published runs, by least squares of the logarithms of the times
(benchmarks/published.py). PRIORS stand for as many runs as they are sure, and keep the shares of a
platform sane that has two or three runs. Each value of EFFICIENCIES is what `python
benchmarks/published.py --fit` prints.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from machine.chips import Chip
from parallel import AXES, CP, FSDP
from planning.roofline import NEWTON_SCHULZ, Estimate, Work


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The shares that a platform reaches. `spread` is the root mean square of the logarithm of
    published over expected times, each run expected without itself."""

    matmul: float
    width: float
    attention: float
    experts: float
    memory: float
    network: float
    hidden: float
    doubling: float = 0.005
    stacking: float = 0.0
    spread: float = 0.0


# Before any run is seen, and how far off each may be, as a logarithm (0: not fitted).
# matmul: XLA:TPU reaches 0.9 to 0.95 of the peak in large matmuls, so do cuBLAS' of the clock that
# is held. width: a systolic array of 128 or 256 is filled and drained; NVIDIA's tiles: 128 x 256.
# attention: 35 % is what the compilers' figures assume for splash attention (planning.compiled);
# FlashAttention-2 reaches 350 of 989 TFLOP/s forward and less backward on H100 (Shah et al. 2024,
# figure 5), more on A100. memory: STREAM-like kernels reach 0.8 to 0.95. network: NCCL's all-gather
# 360 of 450 GB/s in a node; a torus loses its ends. hidden: docs/measured.md has 0.37 to 0.99 of
# collectives behind work, large models at the upper end. doubling: from 8 to 128 H100 torchtitan
# loses 2.3 %, from 64 to 256 TPU7x MaxText 0.6 % (docs/published.tsv). stacking: by the cycles of
# the TPU compiler for configs/tpu_v4_best.py with model.remat full and none: steps differ by 1.3
# (docs/7_final_run.md). The rest are guesses.
PRIORS = {
    'tpu': Efficiency(0.93, 384, 0.35, 0.85, 0.85, 0.8, 0.85, stacking=8),
    'gpu': Efficiency(0.90, 256, 0.45, 0.70, 0.85, 0.8, 0.85),
    'cpu': Efficiency(0.80, 16, 0.50, 0.80, 0.80, 0.8, 0.0),
}
SURE = Efficiency(0.05, 0.4, 0.2, 0.2, 0.15, 0.2, 0.0, 0.0, 0.0)
NOISE = 0.08  # of a published run that is expressed as it was, as a logarithm
FAR = 3.0  # times NOISE from which on a run tells little: it did something that no part expresses
FITTED = tuple(f.name for f in dataclasses.fields(SURE) if getattr(SURE, f.name))

PRIOR_RUNS, PRIOR_SPREAD = 3, 0.15

EFFICIENCIES = {
    'tpu': Efficiency(
        matmul=0.944, width=406.0, attention=0.336, experts=1.0, memory=0.821, network=0.775,
        hidden=0.85, doubling=0.005, stacking=8.0, spread=0.084,
    ),
    'gpu': Efficiency(
        matmul=0.893, width=266.0, attention=0.437, experts=0.7, memory=0.831, network=0.791,
        hidden=0.85, doubling=0.005, spread=0.11,
    ),
    'cpu': dataclasses.replace(PRIORS['cpu'], spread=0.3),  # no run is published: a guess
}  # fmt: skip

# Of memory. Estimates lie within it of the compilers' figures and of published peaks.
MEMORY_SPREAD = 0.10


def axis_rate(e: Estimate, axis: str) -> float:
    """Returns the bytes/s at which a device sends along a mesh axis, at the peak of the links.

    On TPUs an axis of many devices lies along several dimensions of the torus, and a collective
    uses the links of all. On GPUs each node is entered at the rate of all of its members of the
    axis together, which pass on what they have inside of the node.
    """
    chip, span = e.chip, e.spans[axis]
    inner = e.spans[AXES[AXES.index(axis) + 1]] if axis != AXES[-1] else 1
    if chip.torus:
        part = math.log(max(span // inner, 2)) / math.log(max(e.devices, 2))
        return chip.link * max(1.0, chip.torus * part)
    if chip.node and span > chip.node:
        return min(chip.link, chip.outer * max(1, chip.node // inner))
    return chip.link


def work_seconds(w: Work, chip: Chip, x: Efficiency) -> float:
    """Returns the expected seconds of a part's work."""
    matmuls = w.flops - w.attention + x.width * w.narrow + w.experts * (1 / x.experts - 1)
    # What is faster in 8 bits is by the ratio of the peaks: no published run shows another.
    matmuls -= w.flops - w.matmul_seconds(chip) * chip.flops
    rate = chip.flops * chip.held
    at_rate = matmuls / x.matmul + w.attention / x.attention
    moved = w.bytes + x.stacking * w.stacked
    return at_rate / rate + moved / (x.memory * chip.bandwidth)


def expected_seconds(e: Estimate, x: Efficiency | None = None) -> float:
    """Returns the expected seconds of a step, by the efficiencies of the chip's platform."""
    x = x or EFFICIENCIES[e.chip.platform]
    work = [work_seconds(w, e.chip, x) for w in e.work]
    total = sum(work) + work[0] * e.bubble / (1 - e.bubble)
    hides = sum(t for t, w in zip(work, e.work, strict=True) if w.part != NEWTON_SCHULZ)
    behind = waited = 0.0
    for axis, n in e.axis_bytes.items():
        seconds = n / (x.network * axis_rate(e, axis))
        if axis in (FSDP, CP):
            behind += seconds
        else:
            waited += seconds
    total += waited + max((1 - x.hidden) * behind, behind - x.hidden * hides)
    return total * (1 + x.doubling * math.log2(e.devices))


@dataclasses.dataclass(frozen=True)
class Interval:
    """An expected value, and the bounds that hold it in 8 of 10 runs by the errors so far."""

    value: float
    low: float
    high: float


def interval(value: float, spread: float) -> Interval:
    """Returns the interval of a value whose logarithm has this spread."""
    factor = math.exp(1.28 * spread)  # of a normal distribution
    return Interval(value, value / factor, value * factor)


@dataclasses.dataclass(frozen=True)
class Expectation:
    """The time, rates and memory that a step of a config is expected to take."""

    seconds: Interval
    tokens_per_second: Interval  # of all devices
    mfu: Interval
    memory: Interval  # bytes, of the fullest device


def expectation(e: Estimate) -> Expectation:
    """Returns what a config is expected to take, by the efficiencies of the chip's platform."""
    spread = EFFICIENCIES[e.chip.platform].spread
    seconds = interval(expected_seconds(e), spread)

    def of_time(f: Callable[[float], float]) -> Interval:
        return Interval(f(seconds.value), f(seconds.high), f(seconds.low))

    return Expectation(
        seconds, of_time(lambda t: e.tokens / t), of_time(e.mfu),
        interval(e.memory.peak, MEMORY_SPREAD),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The fit
# ---------------------------------------------------------------------------------------------


def soft(error: float) -> float:
    """Returns an error that never exceeds FAR, and is as given where it is small."""
    return error / math.sqrt(1 + (error / FAR) ** 2)


def fitted(platform: str, runs: Sequence[tuple[Estimate, float]]) -> Efficiency:
    """Returns the efficiencies that published runs of a platform tell: (estimate, seconds of a
    step). Gauss-Newton on the logarithms of times over NOISE and of shares over SURE."""
    prior = PRIORS[platform]
    start = np.log([getattr(prior, name) for name in FITTED])
    sure = np.array([getattr(SURE, name) for name in FITTED])

    def at(theta: np.ndarray) -> Efficiency:
        return dataclasses.replace(
            prior, **dict(zip(FITTED, map(float, np.exp(theta)), strict=True))
        )

    def errors(theta: np.ndarray) -> np.ndarray:
        x = at(theta)
        of_runs = [soft(math.log(expected_seconds(e, x) / t) / NOISE) for e, t in runs]
        return np.array([*of_runs, *(theta - start) / sure])

    theta, step = start.copy(), 1e-4
    for _ in range(20):
        here = errors(theta)
        slopes = np.stack(
            [(errors(theta + step * unit) - here) / step for unit in np.eye(len(theta))], 1
        )
        theta = theta - np.linalg.lstsq(slopes, here, rcond=None)[0]
        theta = np.where(start < 0, np.minimum(theta, 0.0), theta)  # no share is above 1
    return at(theta)


def spread_of(errors: Sequence[float]) -> float:
    """Returns the spread of the logarithms of expected over published times: their root mean
    square, with PRIOR_RUNS more of which each is PRIOR_SPREAD off, as long as there are few."""
    squares = sum(x**2 for x in errors) + PRIOR_RUNS * PRIOR_SPREAD**2
    return math.sqrt(squares / (len(errors) + PRIOR_RUNS))
