"""Describes devices to compile for that need not be there: TPU slices and nodes of GPUs."""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from config import ConfigError
from machine.chips import CHIPS

TPU_NAMES = 'v4:2x4x4, v5e:4x4, v5p:2x2x4 or v6e:4x4'
GPU_NAMES = 'h100:8 (one node of 8) or h100:4x8 (4 nodes of 8)'

# Properties of GPUs that CHIPS lacks and the compiler's choices depend on: compute capability as
# (major, features), multiprocessors, float32 units of each, MiB of L2 cache, clock, KiB of shared
# memory. From NVIDIA's data sheets and the table of compute capabilities in the CUDA C++
# programming guide.
_HOPPER = {
    'sm': (9, 'ACCELERATED_FEATURES'), 'cores': 132, 'fpus': 128, 'l2': 50, 'ghz': 1.98,
    'shared': 228,
}  # fmt: skip
_GPUS = {
    'a100': {'sm': (8, 'NONE'), 'cores': 108, 'fpus': 64, 'l2': 40, 'ghz': 1.41, 'shared': 164},
    'h100': _HOPPER,
    'h200': _HOPPER,
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
    Raises ConfigError if the compiler's package is missing or knows no such topology.
    """
    chip, _, shape = name.partition(':')
    return gpu_devices(chip, shape) if chip in _GPUS else tpu_devices(name)


def tpu_devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice, as libtpu names it: chip, colon, shape of the torus."""
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # no questions to a metadata server
    if importlib.util.find_spec('libtpu') is None:
        raise ConfigError('--compile takes libtpu: pip install -r requirements/tpu.txt')
    # Without it, each of the two cores of a v4 chip is a device.
    megacore = {'chip_config_name': 'megacore'} if name.startswith('v4:') else {}
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **megacore).devices
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(
            f'libtpu has no topology {name!r} ({str(error).splitlines()[0]}); use one as '
            f'{TPU_NAMES}, or {GPU_NAMES}'
        ) from error


def gpu_devices(chip: str, shape: str) -> Sequence[jax.Device]:
    """Returns the GPUs of one node, with shape '8', or of several nodes, '4x8'."""
    sizes = re.fullmatch(r'(?:([1-9]\d*)x)?([1-9]\d*)', shape)
    if not sizes:
        raise ConfigError(f'{chip}:{shape} is not a number of GPUs; use {GPU_NAMES}')
    nodes, gpus = sizes[1] or 1, sizes[2]
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
        l2=gpu['l2'] * kib**2, shared=shared, block_optin=shared - kib, kind=known.kinds[0],
        bandwidth=int(known.bandwidth), memory=int(known.memory),
    )  # fmt: skip
