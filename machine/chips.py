"""Rates and memory of chips, by their vendors' figures, and of this CPU, by measurement."""

import dataclasses
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from config import FP8, ConfigError

GB, GIB = 1e9, 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. Rates are peaks: a roofline made of them is a bound, not a forecast.

    On TPUs, `link` is the rate at which one device sends along one dimension of its network, to
    both neighbours together; a mesh axis is assumed to lie along one dimension. On GPUs, `link` is
    the rate at which a device sends to others of its node, and `outer` to those of other nodes.
    A device may be a part of a chip (`of_chip`): flops, memory and rates are those of the part.
    """

    name: str
    platform: str  # of jax: 'tpu' | 'gpu' | 'cpu'
    kinds: tuple[str, ...]  # jax.Device.device_kind
    flops: float  # FLOP/s of dense matmuls in bfloat16, accumulated in float32
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes/s of that memory
    link: float  # bytes/s
    source: str
    clock: float = 0.0  # Hz of the cycles in the compiler's estimates; 0: it makes none
    node: int = 0  # devices per node; 0: the rate between all devices is `link`
    outer: float = 0.0  # bytes/s
    of_chip: int = 1  # jax devices that one chip is: what is bought and published may be chips
    torus: int = 0  # dimensions of a TPU's network
    flops_fp8: float = 0.0  # FLOP/s of dense matmuls in e4m3; 0: none that are faster
    held: float = 1.0  # clock that matmuls hold under the power limit, over that of `flops`

    def axis_bandwidth(self, devices: int) -> float:
        """Returns the bytes/s of a mesh axis whose groups span this many consecutive devices."""
        return self.outer if self.node and devices > self.node else self.link


_TPU = 'https://cloud.google.com/tpu/docs/'

# TPU: the specifications at cloud.google.com/tpu/docs, whose interconnect figure counts all links
# and both directions; v4's links are from Jouppi et al. 2023 (arXiv 2304.01433, table 4: 6 links of
# 50 GB/s). v4's clock is from the same paper, the others are peak FLOP/s / FLOPs per cycle: v6e's
# and TPU7x's by 524,288 of them, as the clocks then are round numbers, and the cycles that the
# compiler estimates for a matmul of 8,192 cubed are 70 and 81 % of the peak (90 % on v5p).
# TPU7x: docs.cloud.google.com/tpu/docs/tpu7x. B200's and GB200's bandwidth is that of the cards in
# XLA's descriptions of them (xla/backends/gpu/target_config/specs), below the 8,000 GB/s of their
# data sheets; the other cards' are those of the sheets within 0.1 %.
# `held` of NVIDIA's is a guess from cuBLAS' best matmuls of random numbers, as far as published;
# with 500 of 700 W the clock is lower by about the third root.
CHIPS = {
    'v4': Chip(
        'TPU v4', 'tpu', ('TPU v4',), 275e12, 32 * GIB, 1200 * GB, 2 * 50 * GB, f'{_TPU}v4', 1.05e9,
        torus=3,
    ),
    'v5e': Chip(
        'TPU v5e', 'tpu', ('TPU v5 lite', 'TPU v5e'), 197e12, 16 * GB, 819 * GB, 2 * 50 * GB,
        f'{_TPU}v5e', 1.5e9, torus=2,
    ),
    'v5p': Chip(
        'TPU v5p', 'tpu', ('TPU v5', 'TPU v5p'), 459e12, 95 * GIB, 2765 * GB, 2 * 100 * GB,
        f'{_TPU}v5p', 1.75e9, torus=3,
    ),
    'v6e': Chip(
        'TPU v6e', 'tpu', ('TPU v6 lite', 'TPU v6e'), 918e12, 32 * GB, 1638 * GB, 2 * 100 * GB,
        f'{_TPU}v6e', 1.75e9, torus=2,
    ),
    # Half of a chip, whose two dies are devices of their own: 2,307 TFLOP/s, 192 GiB, 7,380 GB/s
    # and 1,200 GB/s of links, in both directions, are a chip's.
    'tpu7x': Chip(
        'TPU7x', 'tpu', ('TPU7x',), 2307e12 / 2, 192 * GIB / 2, 7380 * GB / 2, 200 * GB / 2,
        f'{_TPU}tpu7x; half of a chip', 2.2e9, torus=3, of_chip=2,
        flops_fp8=4614e12 / 2,
    ),
    'a100': Chip(
        'A100', 'gpu', ('NVIDIA A100-SXM4-80GB',), 312e12, 80 * GB, 2039 * GB, 300 * GB,
        'NVIDIA A100 80GB SXM data sheet; 200 Gbit/s InfiniBand per GPU between nodes',
        node=8, outer=25 * GB,
    ),
    'h100': Chip(
        'H100', 'gpu', ('NVIDIA H100 80GB HBM3',), 989e12, 80 * GB, 3350 * GB, 450 * GB,
        'NVIDIA H100 SXM data sheet; 400 Gbit/s InfiniBand per GPU between nodes',
        node=8, outer=50 * GB, flops_fp8=1979e12, held=0.78,
    ),
    'h100-96gb': Chip(
        'H100 96 GB', 'gpu', (), 989e12, 96 * GB, 2400 * GB, 450 * GB,
        'torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: HBM2e, 500 W; H100 SXM otherwise',
        node=8, outer=50 * GB, flops_fp8=1979e12, held=0.70,
    ),
    'h200': Chip(
        'H200', 'gpu', ('NVIDIA H200',), 989e12, 141 * GB, 4800 * GB, 450 * GB,
        'NVIDIA H200 SXM data sheet; 400 Gbit/s InfiniBand per GPU between nodes',
        node=8, outer=50 * GB, flops_fp8=1979e12, held=0.78,
    ),
    'b200': Chip(
        'B200', 'gpu', ('NVIDIA B200',), 2250e12, 180 * GB, 7672 * GB, 900 * GB,
        'NVIDIA DGX B200 data sheet, 1/8 of the system, dense; 400 Gbit/s InfiniBand per GPU',
        node=8, outer=50 * GB, flops_fp8=4500e12, held=0.78,
    ),
    # A node is the 72 GPUs that NVLink joins.
    'gb200': Chip(
        'GB200', 'gpu', ('NVIDIA GB200',), 2500e12, 186 * GB, 7928 * GB, 900 * GB,
        'NVIDIA GB200 NVL72 data sheet, 1/72 of the rack, dense; 400 Gbit/s InfiniBand per GPU',
        node=72, outer=50 * GB, flops_fp8=5000e12, held=0.78,
    ),
}  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a jax device's `device_kind`; None if CHIPS lacks it."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)


def check_matmul_type(config: ConfigDict, chip: Chip | None) -> None:
    """Raises ConfigError if the config asks for matmuls in 8 bits, and this chip has none.

    CPUs compute what such a chip would; a chip that CHIPS lacks, None, may have them.
    """
    none = chip and chip.platform != 'cpu' and not chip.flops_fp8
    if none and config.model.matmul_type == FP8:
        having = ', '.join(other.name for other in CHIPS.values() if other.flops_fp8)
        raise ConfigError(
            f'model.matmul_type={FP8!r} multiplies numbers in e4m3 (float8_e4m3fn), which a '
            f"{chip.name} does no faster than bfloat16; use 'compute', or one of: {having}"
        )


def fastest(f: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int) -> float:
    """Returns the seconds of the fastest of several calls of f(x), after one that compiles it."""
    f(x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        f(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cpu_flops(device: jax.Device, n: int = 2048) -> float:
    """Measures the FLOP/s of a float32 matmul of n x n on the CPU, all cores: the best of several.

    Other work on the machine makes it too low, and nothing too high.
    """
    x = jax.device_put(np.ones((n, n), np.float32), device)
    return 2 * n**3 / fastest(jax.jit(lambda x: x @ x), x, 10)


def measured_cpu() -> Chip:
    """Measures this machine as one device: float32 matmul rate and memory bandwidth.

    Simulated devices share both; their network is its memory.
    """
    device = jax.devices('cpu')[0]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add(jax.device_put(np.ones(32 * 2**20, np.float32), device))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        x = add(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    bandwidth = 2 * x.nbytes / min(seconds)
    memory = device_memory()
    return Chip(
        'this CPU', 'cpu', ('cpu',), cpu_flops(device), memory, bandwidth, bandwidth,
        'measured: float32 matmul of 2048 x 2048, addition to 128 MB',
    )  # fmt: skip


def device_memory() -> float:
    """Returns the bytes of this machine's memory."""
    return float(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))


def is_measured(config: ConfigDict, mesh: Mesh) -> bool:
    """Returns True if `peak_flops` measures: on a CPU without config.peak_flops."""
    return not config.peak_flops and mesh.devices.flat[0].platform == 'cpu'


def peak_flops(config: ConfigDict, mesh: Mesh) -> tuple[float, str]:
    """Returns the peak FLOP/s of the whole mesh, and the source of the figure.

    Raises ConfigError if config.peak_flops is not set and the chip is unknown.
    """
    device = mesh.local_devices[0]
    if config.peak_flops:
        return config.peak_flops * mesh.size, 'config.peak_flops'
    if is_measured(config, mesh):
        return cpu_flops(device), 'float32 matmul of 2048 x 2048 on this CPU, all cores'
    chip = chip_of(device.device_kind)
    if chip is None:
        raise ConfigError(
            f'the peak of {device.device_kind!r} is unknown; set --config.peak_flops to the '
            f'FLOP/s of one device'
        )
    return chip.flops * mesh.size, f'data sheet of {device.device_kind}'
