"""The memory that a run takes: its peak, remedies when it does not suffice, reuse on CPU."""

import contextlib
import ctypes
import platform
import resource
import sys
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict


class OutOfMemoryError(Exception):
    """The devices' memory does not suffice; the message lists remedies."""


def memory_use() -> dict[str, int]:
    """Returns peak bytes: host_bytes of this process, device_bytes of its fullest device.

    device_bytes is missing on platforms that do not report it.
    """
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    use = {'host_bytes': host if sys.platform == 'darwin' else 1024 * host}
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s['peak_bytes_in_use'] for s in stats if s and 'peak_bytes_in_use' in s]
    return use | ({'device_bytes': max(peaks)} if peaks else {})


def remedies(config: ConfigDict) -> Iterator[str]:
    """Yields the settings of the config that would take less memory, the cheapest first."""
    mesh, m = config.mesh, config.model
    rows = config.batch_size // (mesh.dp * mesh.fsdp * mesh.ep)
    if config.microbatches < rows:
        yield (
            f'microbatches={config.microbatches}: with more of them, up to {rows}, a device works '
            f'on fewer rows at a time; the result is the same'
        )
    tokens = rows // config.microbatches * config.seq_len // (mesh.cp * mesh.tp)
    if m.loss_chunk > 128 and tokens > 128:
        yield f'model.loss_chunk={m.loss_chunk}: with fewer tokens per chunk, fewer logits exist'
    if m.remat != 'full':
        yield f"model.remat='{m.remat}': 'full' keeps only the input of each block; it is slower"
    if config.fsdp_gather == 'step' and mesh.fsdp > 1:
        yield "fsdp_gather='step' gathers all layers' weights; 'layer' gathers one layer at a time"
    yield (
        f'mesh.fsdp={mesh.fsdp}: a larger axis shards parameters, optimizer state and gradients '
        f'further; so do mesh.tp={mesh.tp} and mesh.pp={mesh.pp}, and mesh.ep={mesh.ep} for experts'
    )
    if config.compute_dtype == 'float32':
        yield "compute_dtype='float32': 'bfloat16' halves the activations"


@contextlib.contextmanager
def out_of_memory_explained(config: ConfigDict) -> Iterator[None]:
    """Turns an out-of-memory error of the compiler or of a device into OutOfMemoryError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        found = '\n'.join(f'  - {remedy}' for remedy in remedies(config))
        raise OutOfMemoryError(
            f'out of memory: {str(error)[:1000]}\nSettings that take less:\n{found}'
        ) from error


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that XLA:CPU frees, for the next step.

    Returning it to the system and faulting it in again page by page took a third of a matmul's
    time. The process then holds its peak. With other C libraries this does nothing.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)
