"""How much memory a run takes, and what to turn when it is not enough."""

import contextlib
import ctypes
import platform
import resource
import sys
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict


class OutOfMemoryError(Exception):
    """The devices' memory does not suffice; the message says what would take less."""


def memory_use() -> dict[str, int]:
    """Peak bytes: of this process's fullest device, where the platform tells, and of its host."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    use = {'host_bytes': host if sys.platform == 'darwin' else 1024 * host}
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s['peak_bytes_in_use'] for s in stats if s and 'peak_bytes_in_use' in s]
    return use | ({'device_bytes': max(peaks)} if peaks else {})


def remedies(config: ConfigDict) -> Iterator[str]:
    """What would take less memory, of what the config has not turned yet; the cheapest first."""
    mesh, m = config.mesh, config.model
    rows = config.batch_size // (mesh.dp * mesh.fsdp * mesh.ep)
    if config.microbatches < rows:
        yield (
            f'microbatches={config.microbatches}: with more of them, up to {rows}, fewer rows are '
            f'worked on at a time; the result is the same'
        )
    tokens = rows // config.microbatches * config.seq_len // mesh.tp
    if m.loss_chunk > 128 and tokens > 128:
        yield f'model.loss_chunk={m.loss_chunk}: with fewer tokens a chunk, fewer logits exist'
    if m.remat != 'full':
        yield f"model.remat='{m.remat}': 'full' keeps only the input of each block, for more time"
    if config.fsdp_gather == 'step' and mesh.fsdp > 1:
        yield "fsdp_gather='step' holds the layers' weights whole; 'layer' one layer at a time"
    yield (
        f'mesh.fsdp={mesh.fsdp}: more of it shards parameters, moments and gradients; so do '
        f'mesh.tp={mesh.tp} and mesh.pp={mesh.pp}, and mesh.ep={mesh.ep} for experts'
    )
    if config.compute_dtype == 'float32':
        yield "compute_dtype='float32': 'bfloat16' halves the activations"


@contextlib.contextmanager
def out_of_memory_explained(config: ConfigDict) -> Iterator[None]:
    """Turns jax's error, of the compiler or of a device, into OutOfMemoryError with remedies."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        found = '\n'.join(f'  - {remedy}' for remedy in remedies(config))
        raise OutOfMemoryError(
            f'out of memory: {str(error)[:1000]}\nWhat would take less:\n{found}'
        ) from error


def keep_freed_memory() -> None:
    """Lets glibc keep what XLA:CPU frees for the next step, instead of returning it to the system
    and faulting it in again page by page: that took a third of a matmul's time. The price is that
    the process holds its peak. On other C libraries nothing changes.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)
