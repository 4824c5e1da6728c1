"""Describes devices to compile for that need not be there: TPU slices and nodes of GPUs."""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from config import ConfigError
from machine.chips import CHIPS

TPU_NAMES = 'v4:2x4x4, v5e:4x4, v5p:2x2x4, v6e:4x4 or tpu7x:2x2x1'
GPU_NAMES = 'h100:8 (one node of 8) or h100:4x8 (4 nodes of 8)'

# The slices that there are, in chips, by the configurations at cloud.google.com/tpu/docs; libtpu
# opens others, too. v5e and v6e: all of them. The rest: those smaller than a cube of 4 x 4 x 4, and
# whole cubes, at most so many chips.
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
SMALL = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
HOSTS = {'1x1': (1, 1), '2x4': (2, 4), '4x2': (4, 2)}  # chips of a host; of all others 2 x 2
LARGEST = {'v4': 4096, 'v5p': 6144, 'tpu7x': 9216}

# Properties of GPUs that CHIPS lacks and the compiler's choices depend on: compute capability as
# (major, features), multiprocessors, float32 units of each, MiB of L2 cache, clock, KiB of shared
# memory. From NVIDIA's data sheets and the table of compute capabilities in the CUDA C++
# programming guide.
_HOPPER = {
    'sm': (9, 'ACCELERATED_FEATURES'), 'cores': 132, 'fpus': 128, 'l2': 50, 'ghz': 1.98,
    'shared': 228,
}  # fmt: skip
_BLACKWELL = _HOPPER | {'sm': (10, 'ACCELERATED_FEATURES'), 'cores': 148, 'l2': 126.5, 'ghz': 1.965}
_GPUS = {
    'a100': {'sm': (8, 'NONE'), 'cores': 108, 'fpus': 64, 'l2': 40, 'ghz': 1.41, 'shared': 164},
    'h100': _HOPPER,
    'h200': _HOPPER,
    'b200': _BLACKWELL,
    'gb200': _BLACKWELL | {'cores': 152, 'l2': 129.25, 'ghz': 2.062},
}

# A GpuTargetConfigProto of XLA, as text.
_TARGET = """
gpu_device_info {{
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block_optin}
  shared_memory_per_core: {shared}
  core_count: {cores}
  fpus_per_core: {fpus}
  l2_cache_size: {l2}
  clock_rate_ghz: {ghz}
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} feature_extension: {features} }}
  dnn_version: "9.10.0"
  runtime_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""


def topology_devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a topology such as 'v4:2x4x4' or 'h100:8'.

    Only describes them: no device is opened, so that a training run on the same machine can go on.
    Raises ConfigError if no machine has it, or the compiler's package is missing or knows none.
    """
    check_topology(name)
    chip, _, shape = name.partition(':')
    return gpu_devices(chip, shape) if chip in _GPUS else tpu_devices(name)


def compiler_versions(platform: str) -> dict[str, str]:
    """Returns the version of the package that compiles for 'tpu' or 'gpu', and that of jax; '' of
    one that is not installed."""
    packages = ('libtpu',) if platform == 'tpu' else ('jax-cuda13-plugin', 'jax-cuda12-plugin')
    compiler = next((x for x in packages if _version(x)), packages[-1])
    return {x: _version(x) or '' for x in (compiler, 'jax')}


def pinned_libtpu() -> str | None:
    """Returns the libtpu that the installed jax is made for, as '0.0.42'; None if it names none."""
    for requirement in importlib.metadata.requires('jax') or ():
        pin = re.match(r'libtpu *== *(\d+(?:\.\d+)*)', requirement)
        if pin:
            return pin[1]
    return None


def _version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_topology(name: str) -> None:
    """Raises ConfigError unless machines have a topology of this name. No compiler is asked."""
    chip, _, shape = name.partition(':')
    if chip in _GPUS:
        check_gpus(chip, shape)
    elif chip in CHIPS and CHIPS[chip].torus:
        check_slice(chip, shape)
    else:
        compiled = [x for x in CHIPS if x in _GPUS or CHIPS[x].torus]
        raise ConfigError(
            f'the topology {name!r} is unknown; use a chip of {", ".join(compiled)} with a shape, '
            f'as in {TPU_NAMES}, or {GPU_NAMES}'
        )


def check_slice(chip: str, shape: str) -> None:
    """Raises ConfigError unless there are slices of this shape, in any order of its dimensions. A
    torus that may be twisted may end in _twisted or _untwisted, as libtpu names it."""
    parts = re.fullmatch(r'([1-9]\d*(?:x[1-9]\d*)+)(_twisted|_untwisted)?', shape)
    sizes = sorted(map(int, parts[1].split('x'))) if parts else []
    if chip not in LARGEST:
        known = parts is not None and not parts[2] and 'x'.join(map(str, sizes)) in FLAT
        there = ', '.join(FLAT)
    else:
        small = [sorted(map(int, x.split('x'))) for x in SMALL]
        cubes = len(sizes) == 3 and not any(n % 4 for n in sizes)
        known = sizes in small or (cubes and math.prod(sizes) <= LARGEST[chip])
        if parts and parts[2]:
            known = known and cubes and 2 * sizes[0] == sizes[2] != sizes[0]
        there = (
            f'{", ".join(SMALL)}, and multiples of 4 in each of 3 dimensions up to '
            f'{LARGEST[chip]:,} chips, as 4x4x8'
        )
    if not known:
        raise ConfigError(f'no machine has {chip}:{shape}; slices of {chip} are {there}')


def tpu_devices(name: str, **more: Any) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice, as libtpu names it: chip, colon, shape of the torus; more
    arguments as `slice_arguments` lists them. Raises ConfigError if libtpu lacks it."""
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no questions to a metadata server
    if importlib.util.find_spec('libtpu') is None:
        raise ConfigError('--compile takes libtpu: pip install -r requirements/tpu.txt')
    given = slice_arguments(name) | more
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **given).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f'libtpu has no topology {name!r} ({str(error).splitlines()[0]}); use one as '
            f'{TPU_NAMES}, or {GPU_NAMES}'
        ) from error


def slice_arguments(name: str) -> dict[str, Any]:
    """Returns what libtpu has to be told of a slice besides its name.

    wrap: for each of 3 dimensions, whether links join its ends. In slices of whole cubes of 4 x 4 x
        4 all have them, in smaller ones none (cloud.google.com/tpu/docs/v5p). A dimension of a v5e
        or v6e has them if it is that of the whole pod, 16. Without, libtpu takes every torus for a
        mesh, and compiles other collectives.
    chips_per_host_bounds: 2 x 2 chips a host; the 8 of v5e and v6e 2x4 share one.
    chip_config_name: without 'megacore', each of the two cores of a v4 chip is a device.
    """
    chip, _, shape = name.partition(':')
    sizes = [int(n) for n in re.findall(r'\d+', shape)]
    if chip in LARGEST:
        wrap = [len(sizes) == 3 and not any(n % 4 for n in sizes)] * 3
    else:
        wrap = [n == 16 for n in sizes]
    host = [*HOSTS.get(shape, (2, 2)), 1]
    megacore = {'chip_config_name': 'megacore'} if chip == 'v4' else {}
    return {'wrap': (*wrap, *(False,) * 3)[:3], 'chips_per_host_bounds': tuple(host)} | megacore


def check_gpus(chip: str, shape: str) -> tuple[int, int]:
    """Returns the nodes, and the GPUs of each, of a shape. Raises ConfigError if it is none."""
    sizes = re.fullmatch(r'(?:([1-9]\d*)x)?([1-9]\d*)', shape)
    if not sizes:
        raise ConfigError(f'{chip}:{shape} is not a number of GPUs; use {GPU_NAMES}')
    nodes, gpus = int(sizes[1] or 1), int(sizes[2])
    if gpus > CHIPS[chip].node:
        raise ConfigError(
            f'no machine has {chip}:{shape}: a node has at most {CHIPS[chip].node} GPUs; name '
            f'several nodes, as in {chip}:2x{CHIPS[chip].node}'
        )
    return nodes, gpus


def gpu_devices(chip: str, shape: str) -> Sequence[jax.Device]:
    """Returns the GPUs of one node, with shape '8', or of several nodes, '4x8'."""
    nodes, gpus = check_gpus(chip, shape)
    try:
        return topologies.get_topology_desc(
            platform='cuda', topology=f'1x{nodes}x{gpus}', target_config=gpu_target(chip)
        ).devices
    except NotImplementedError as error:
        raise ConfigError(
            '--compile for GPUs takes their compiler: pip install -r requirements/gpu.txt'
        ) from error


def gpu_target(chip: str) -> str:
    """Returns XLA's description of a GPU of CHIPS, a GpuTargetConfigProto as text."""
    gpu, known, kib = _GPUS[chip], CHIPS[chip], 1024
    (major, features), shared = gpu['sm'], gpu['shared'] * kib
    return _TARGET.format(
        major=major, features=features, cores=gpu['cores'], fpus=gpu['fpus'], ghz=gpu['ghz'],
        l2=int(gpu['l2'] * kib**2), shared=shared, block_optin=shared - kib, kind=known.kinds[0],
        bandwidth=int(known.bandwidth), memory=int(known.memory),
    )  # fmt: skip
