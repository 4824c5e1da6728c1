"""The processes of a run: joining, agreeing on values, and ending after a failure.

    python train.py --config=... --coordinator=HOST:PORT --num_processes=2 --process_id=0  # or 1

Each process runs the same command and holds its own devices. On SLURM and on GKE's TPU slices jax
reads the three values from the environment; on Cloud TPU VMs `--coordinator=auto` has it ask the
machine (docs/hosts.md). Batches and results do not depend on the number of processes.
"""

import logging
import os
import sys
from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from config import ConfigError

AUTO = 'auto'
# The variables of SLURM that jax reads.
SLURM = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
)
HEARTBEAT_SECONDS = 100  # for commands without config.guard
SHUTDOWN_SECONDS = 60  # for which a process that ends waits for the others to end


def choose_platform(cpu_devices: int) -> None:
    """Simulates this many devices on the CPU; with 0, leaves the choice to jax.

    To be called before anything asks jax for devices. Silences jax's messages on platforms that
    the machine lacks.
    """
    logging.getLogger('jax').setLevel(logging.WARNING)
    if cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', cpu_devices)


def several_offered(environment: Mapping[str, str]) -> bool:
    """Returns True if the environment is that of one of several processes, by srun or on GKE."""
    if all(name in environment for name in SLURM):
        return int(environment['SLURM_NTASKS']) > 1
    slices = int(environment.get('MEGASCALE_NUM_SLICES') or 1)
    return slices > 1 or ',' in environment.get('TPU_WORKER_HOSTNAMES', '')


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int
) -> None:
    """Joins the other processes, if there are any.

    To be called before anything asks jax for devices. `coordinator` is the address of process 0,
    the same for all; with AUTO, jax finds all three values, as it does without any in an
    environment that has them. A process whose heartbeat is missing for `heartbeat` seconds counts
    as dead, and the others end. Raises ConfigError if only some of the three are given.
    """
    given = (num_processes is not None) + (process_id is not None)
    explicit = bool(coordinator) and coordinator != AUTO
    if given != (2 if explicit else 0):
        raise ConfigError(
            f'the config cannot run: --coordinator={coordinator}, --num_processes={num_processes} '
            f'and --process_id={process_id} belong together; give all three, --coordinator={AUTO} '
            f'alone, or none of them'
        )
    if not coordinator and not several_offered(os.environ):
        return
    where = (coordinator, num_processes, process_id) if explicit else ()
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(
        *where, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=SHUTDOWN_SECONDS
    )


def use_cache(config: ConfigDict) -> None:
    """Keeps compiled programs in the folder config.compilation_cache, if set, for later starts."""
    if config.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 1)


def fail(message: str, code: int = 1) -> NoReturn:
    """Prints the message to stderr and ends this process with `code`.

    One of several processes ends immediately: a regular exit would wait for the others, which may
    be waiting in a collective for this one.
    """
    print(message, file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def all_processes(flag: bool) -> bool:
    """Returns True if the flag is set on every process. All have to call it, on the main thread."""
    return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))


def from_process_0(value: int) -> int:
    """Returns the int32 of process 0. All processes have to call it, on the main thread."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
