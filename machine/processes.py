"""The processes of a run: how they find each other, and how one that fails leaves the others.

    python train.py --config=... --coordinator=HOST:PORT --num_processes=2 --process_id=0  # or 1

Each process runs the same command and holds its own devices. On SLURM and on GKE's TPU slices the
environment says who they are; on Cloud TPU VMs `--coordinator=auto` asks the machine
(docs/hosts.md). The batch, the seed and the numbers do not depend on how many processes there are.
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

AUTO = 'auto'


SLURM = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
)  # what jax reads of it


HEARTBEAT_SECONDS = 100  # where no config says otherwise


SHUTDOWN_SECONDS = 60  # a process that ends waits so long for the others to end, too


def choose_platform(cpu_devices: int) -> None:
    """Before anything asks jax for devices: so many simulated ones on the CPU, or 0 for those that
    are there, without a word of platforms that are not."""
    logging.getLogger('jax').setLevel(logging.WARNING)
    if cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', cpu_devices)


def several_offered(environment: Mapping[str, str]) -> bool:
    """Whether the environment is that of one of several processes: of an `srun`, or on GKE."""
    if all(name in environment for name in SLURM):
        return int(environment['SLURM_NTASKS']) > 1
    slices = int(environment.get('MEGASCALE_NUM_SLICES') or 1)
    return slices > 1 or ',' in environment.get('TPU_WORKER_HOSTNAMES', '')


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int
) -> None:
    """Joins the other processes, if there are any; before anything else asks jax for devices.

    `coordinator` is the address of process 0, the same for all; AUTO leaves all three to jax, as
    does an environment that offers them. A process whose heartbeat is missed for `heartbeat`
    seconds counts as dead, and the others end. Raises ValueError if only some of the three are
    given.
    """
    given = (num_processes is not None) + (process_id is not None)
    explicit = bool(coordinator) and coordinator != AUTO
    if given != (2 if explicit else 0):
        raise ValueError(
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
    """Compiled programs are kept in config.compilation_cache, if it is set, for the next start."""
    if config.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 1)


def fail(message: str, code: int = 1) -> NoReturn:
    """Ends this process, at once where there are several.

    A regular end would wait for the others, who may wait in a collective for this one.
    """
    print(message, file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def all_processes(flag: bool) -> bool:
    """Whether the flag is set on every process; all have to call this, on the main thread."""
    return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))


def from_process_0(value: int) -> int:
    """The int32 that process 0 gave; all have to call this, on the main thread."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
