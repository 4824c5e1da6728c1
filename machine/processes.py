"""The processes of a run: joining, agreeing on values, and ending after a failure.

    python train.py --config=... --coordinator=HOST:PORT --num_processes=2 --process_id=0  # or 1

Each process runs the same command and holds its own devices. On SLURM and on GKE's TPU slices jax
reads the three values from the environment; on Cloud TPU VMs `--coordinator=auto` has it ask the
machine (docs/hosts.md). Batches and results do not depend on the number of processes.
"""

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from config import ConfigError

T = TypeVar('T')

AGAIN = os.EX_TEMPFAIL  # 75, the exit code that asks for the same command again

AUTO = 'auto'
# The variables of SLURM that jax reads.
SLURM = (
    'SLURM_JOB_ID',
    'SLURM_STEP_NODELIST',
    'SLURM_NTASKS',
    'SLURM_PROCID',
    'SLURM_LOCALID',
)
# Of a job's step, by srun: in an interactive one it is 1, while SLURM_NTASKS is the allocation's.
STEP_TASKS = 'SLURM_STEP_NUM_TASKS'
JOIN_SECONDS = 300  # for all processes to meet
WORD_SECONDS = 0.5  # after which it is said for whom a process waits
HEARTBEAT_SECONDS = 100  # for commands without config.guard
BIND_ADDRESS = 'JAX_COORDINATOR_BIND_ADDRESS'  # of jax, where a user has decided
SHUTDOWN_SECONDS = 60  # for which a process that ends waits for the others to end
THREADS = 'NPROC'  # of XLA:CPU: how many threads run all simulated devices


def choose_platform(cpu_devices: int) -> None:
    """Simulates this many devices on the CPU; with 0, leaves the choice to jax.

    To be called before anything asks jax for devices. Silences jax's messages on platforms that
    the machine lacks.
    """
    logging.getLogger('jax').setLevel(logging.WARNING)
    if cpu_devices:
        # A device waits in one thread for each of its collectives that may run at once, and XLA
        # (jaxlib 0.10) starts one thread a device: a step of Muon on 8 of them stood still. Four a
        # device cost about a tenth of the speed.
        os.environ.setdefault(THREADS, str(4 * max(cpu_devices, 4)))
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', cpu_devices)


def several_offered(environment: Mapping[str, str]) -> bool:
    """Returns True if the environment is that of one of several processes, by srun or on GKE.

    Raises ConfigError if a number there is none.
    """
    if all(name in environment for name in SLURM):
        for name in ('SLURM_JOB_ID', 'SLURM_PROCID', 'SLURM_LOCALID'):
            _number(environment, name)
        return slurm_tasks(environment) > 1
    slices = _number(environment, 'MEGASCALE_NUM_SLICES') or 1
    return slices > 1 or ',' in environment.get('TPU_WORKER_HOSTNAMES', '')


def slurm_tasks(environment: Mapping[str, str]) -> int:
    """Returns the number of processes that srun has started together with this one."""
    return _number(environment, STEP_TASKS) or _number(environment, 'SLURM_NTASKS')


def _number(environment: Mapping[str, str], name: str) -> int:
    """Returns the value of a variable that counts something, 0 if it is not set."""
    text = environment.get(name) or '0'
    if not text.isdecimal():
        raise ConfigError(f'{name}={text} in the environment is no number; to run alone, unset it')
    return int(text)


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int
) -> None:
    """Joins the other processes, if there are any.

    To be called before anything asks jax for devices. `coordinator` is the address of process 0,
    the same for all; with AUTO, jax finds all three values, as it does without any in an
    environment that has them. A process whose heartbeat is missing for `heartbeat` seconds counts
    as dead, and the others end: by an exception where a collective fails first, else jax aborts
    them. Where not all have come within JOIN_SECONDS, this process ends with AGAIN.

    Raises ConfigError if only some of the three are given, or the address cannot be used.
    """
    given = (num_processes is not None) + (process_id is not None)
    explicit = bool(coordinator) and coordinator != AUTO
    if given != (2 if explicit else 0):
        raise ConfigError(
            f'--coordinator={coordinator}, --num_processes={num_processes} and '
            f'--process_id={process_id} belong together; give all three, --coordinator={AUTO} '
            f'alone, or none of them'
        )
    if not coordinator and not several_offered(os.environ):
        return
    options = {}
    if explicit:
        if process_id >= num_processes:
            raise ConfigError(
                f'--process_id={process_id} is not below --num_processes={num_processes}; they '
                f'count from 0'
            )
        address_of(coordinator)
        options = {
            'coordinator_address': coordinator,
            'num_processes': num_processes,
            'process_id': process_id,
        }
        if process_id == 0 and BIND_ADDRESS not in os.environ:
            options['coordinator_bind_address'] = bind_address(coordinator)
    elif not coordinator and STEP_TASKS in os.environ:
        options = {'num_processes': slurm_tasks(os.environ)}
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    # It would take SIGTERM from the handler of the run.
    with contextlib.suppress(AttributeError):  # where jax has no such service
        jax.config.update('jax_enable_preemption_service', False)
    with said_while_joining(waits_for(coordinator, num_processes, process_id)):
        jax.distributed.initialize(
            **options,
            initialization_timeout=2 * JOIN_SECONDS,  # then jax would abort the process
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )


def waits_for(coordinator: str | None, num_processes: int | None, process_id: int | None) -> str:
    """Returns a line for a process that joins: for whom it waits, where, and how to run alone."""
    if coordinator == AUTO:
        return (
            'waiting for the other hosts of this TPU slice; to run alone, leave --coordinator out'
        )
    if coordinator:
        whom = 'the others' if process_id == 0 else 'process 0 and the others'
        return (
            f'process {process_id} of {num_processes} is waiting for {whom} at {coordinator}; to '
            f'run alone, leave --coordinator, --num_processes and --process_id out'
        )
    if all(name in os.environ for name in SLURM):
        return (
            f'task {os.environ["SLURM_PROCID"]} of {slurm_tasks(os.environ)} of SLURM job '
            f'{os.environ["SLURM_JOB_ID"]} is waiting for the others, on '
            f'{os.environ["SLURM_STEP_NODELIST"]}; to run alone, unset SLURM_NTASKS'
        )
    hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
    return f'waiting for the other hosts of this TPU slice, {hosts}, and for other slices'


@contextlib.contextmanager
def said_while_joining(line: str) -> Iterator[None]:
    """Says the line if the body takes longer than WORD_SECONDS; after JOIN_SECONDS, ends the
    process with AGAIN."""
    joined = threading.Event()

    def watch() -> None:
        if joined.wait(WORD_SECONDS):
            return
        print(f'{line} (up to {JOIN_SECONDS} s)', file=sys.stderr, flush=True)
        if not joined.wait(JOIN_SECONDS - WORD_SECONDS):
            text = f'not all processes have come within {JOIN_SECONDS} s: this one ends'
            print(text, file=sys.stderr, flush=True)
            os._exit(AGAIN)

    threading.Thread(target=watch, name='joining', daemon=True).start()
    try:
        yield
    finally:
        joined.set()


def address_of(coordinator: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT. Raises ConfigError if it is none."""
    host, colon, port = coordinator.rpartition(':')
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f'--coordinator={coordinator} is no address; use HOST:PORT, with a free port of '
            f'process 0, from 1024 to 65535'
        )
    return host.removeprefix('[').removesuffix(']'), int(port)


def bind_address(coordinator: str) -> str:
    """Returns the address on which process 0 listens.

    That is the coordinator's, and all interfaces where it is no address of this machine (behind
    NAT), or a name that only here stands for the machine itself (127.0.1.1 in /etc/hosts). Raises
    ConfigError if the port is taken: jax would end in a segmentation fault.
    """
    host, port = address_of(coordinator)
    reason = ''
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        found, reason = [], f'cannot be resolved here ({error.strerror})'
    addresses = [(family, address) for family, _, _, _, address in found]
    loops = [
        ipaddress.ip_address(address[0].partition('%')[0]).is_loopback for _, address in addresses
    ]
    can_bind = [_can_bind(*address) for address in addresses]  # all: any port may be taken
    if host != 'localhost' and not _is_literal(host) and loops and all(loops):
        reason = 'stands for this machine alone'
    elif addresses and not any(can_bind):
        reason = 'is no address of this machine'
    if not reason:
        return coordinator
    print(f'--coordinator={coordinator}: {host} {reason}; listening on all interfaces',
          file=sys.stderr, flush=True)  # fmt: skip
    _can_bind(socket.AF_INET, ('', port))
    return f'[::]:{port}'


def _is_literal(host: str) -> bool:
    """Returns True for the digits of an address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _can_bind(family: socket.AddressFamily, address: tuple) -> bool:
    """Returns True if this process can listen there, False if it is another machine's address."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of a run that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise ConfigError(
                    f'process 0 cannot listen on port {address[1]} ({error.strerror}): use another '
                    f'port in --coordinator, from 1024 on, for all processes'
                ) from error
            return False
    return True


def use_cache(config: ConfigDict) -> None:
    """Keeps compiled programs in the folder config.compilation_cache, if set, for later starts."""
    if config.compilation_cache:
        folder = os.path.expanduser(config.compilation_cache)
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 1)


def fail(message: str, code: int = 1) -> NoReturn:
    """Prints the message to stderr and ends this process with `code`.

    One of several processes ends immediately: a regular exit would wait for the others, which may
    be waiting in a collective for this one.
    """
    with contextlib.suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    if jax.process_count() > 1:
        os._exit(code)
    sys.exit(code)


def all_processes(flag: bool) -> bool:
    """Returns True if the flag is set on every process. All have to call it, on the main thread."""
    return bool(np.all(multihost_utils.process_allgather(np.int32(flag))))


def agreed(f: Callable[[], T], doing: str = 'start') -> T:
    """Returns f(), which may fail on one process alone, as where a disk is full.

    Raises ConfigError on all processes if f raises OSError or ConfigError on any. All have to call
    this, on the main thread; one that is alone gets f's own error. `doing` names, for the others,
    what one of them cannot do.
    """
    if jax.process_count() == 1:
        return f()
    result, error = None, None
    try:
        result = f()
    except (OSError, ConfigError) as e:
        error = e
    if not all_processes(error is None):
        if error is None:
            raise ConfigError(f'another process cannot {doing}, see its message')
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    return result


def from_process_0(value: int) -> int:
    """Returns the int32 of process 0. All processes have to call it, on the main thread."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
