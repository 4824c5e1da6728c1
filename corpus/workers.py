"""Runs the tasks of a job in order: in this process, in several, or on a Ray cluster."""

import importlib
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any

from config import ConfigError
from corpus.files import INSTALL

# The project's modules that a task's code comes from, for machines that do not have them.
SHIPPED = (
    'config', 'configs.default', 'corpus.compression', 'corpus.csv_files', 'corpus.documents',
    'corpus.files', 'corpus.hashes', 'corpus.hub_tokenizer', 'corpus.lengths', 'corpus.prepare',
    'corpus.records', 'corpus.rows', 'corpus.shards', 'corpus.tally', 'corpus.tar_files',
    'corpus.text_files', 'corpus.token_documents', 'corpus.token_files', 'corpus.token_flat',
    'corpus.token_import', 'corpus.token_rows', 'corpus.vocabulary_files', 'corpus.workers',
    'machine.command', 'machine.config_flag', 'machine.progress', 'storage.stores', 'tokenizer',
)  # fmt: skip

# What a worker has when it is forked. Not tensorstore, which starts a thread as it is imported: a
# forked child would lack it.
PRELOADED = ('corpus.documents', 'tokenizer')

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# The path of a socket has at most 107 bytes, of which the names of a session take this away:
# /ray/session_2026-01-31_12-00-00_123456_1234567/sockets/plasma_store.1 and a margin.
RAY_TMPDIR_LENGTH = 107 - 70


class WorkerError(RuntimeError):
    """A worker process ended without a result."""


def run(
    fn: Callable[..., Any],
    shared: Any,
    tasks: Sequence[tuple],
    workers: int,
    ray: str | None,
    threads: bool = False,
) -> Iterator[Any]:
    """Yields fn(shared, *task) for each task, in their order.

    `shared` is sent once to each process. `ray` is the address of a Ray cluster that does the work
    in place of `workers` processes. `threads`, which start at once, take the place of processes
    for a fn that spends its time outside the interpreter. Raises what fn raises; WorkerError if a
    process is killed; ConfigError if there is no such cluster.
    """
    if ray and tasks:
        yield from _run_on_ray(fn, shared, tasks, ray)
    elif workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield fn(shared, *task)
    elif threads:
        yield from _run_in_threads(fn, shared, tasks, workers)
    else:
        yield from _run_in_processes(fn, shared, tasks, workers)


def _run_in_threads(
    fn: Callable[..., Any], shared: Any, tasks: Sequence[tuple], workers: int
) -> Iterator[Any]:
    pool = ThreadPoolExecutor(workers, 'part')
    try:
        for result in [pool.submit(fn, shared, *task) for task in tasks]:
            yield result.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------


def _run_in_processes(
    fn: Callable[..., Any], shared: Any, tasks: Sequence[tuple], workers: int
) -> Iterator[Any]:
    context, others = start_server(), multiprocessing.active_children()
    given = (dict(os.environ), fn, shared)
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, given)
    # Not pool.map, which cancels futures that the pool sets when the workers are ended.
    futures, yielded = [pool.submit(_work, task) for task in tasks], 0
    try:
        for future in futures:
            result = future.result()
            yielded += 1
            yield result
    except BrokenProcessPool as error:
        raise WorkerError(
            'a worker was killed, most likely for want of memory: start again with fewer workers; '
            'the parts that are done stay'
        ) from error
    except BaseException:  # Ctrl-C, or an error: what the workers are at is not waited for
        for child in multiprocessing.active_children() if yielded < len(tasks) else ():
            if child not in others:
                child.terminate()
        raise
    finally:
        pool.shutdown()


def start_server() -> BaseContext:
    """Starts the process that worker processes are forked from, if there is none yet.

    A child that this process forked would inherit the locks of tensorstore's threads without the
    threads. The server has only imported PRELOADED, once for all workers: 0.3 s of CPU time each.
    Returns the context of multiprocessing; one that starts each worker anew where processes cannot
    be forked.
    """
    if 'forkserver' not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(PRELOADED))
    # The server ignores the path that it is given, and imports that fail.
    before = os.environ.get('PYTHONPATH')
    os.environ['PYTHONPATH'] = os.pathsep.join([PROJECT, *([before] if before else [])])
    # Ctrl-C reaches all processes; this one ends the workers, which inherit that they hear nothing.
    resource_tracker.ensure_running()  # which lets signals through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ['PYTHONPATH']
        else:
            os.environ['PYTHONPATH'] = before
    return context


_given: list[Any] = []  # in a worker process: fn and shared


def _start_worker(environment: dict[str, str], fn: Callable[..., Any], shared: Any) -> None:
    """Prepares a worker process, which ends when its parent does.

    A worker that outlived a killed parent would write into the work of the next job. The server has
    the environment variables of its start: they may have changed, as those that name a bucket's
    server.
    """
    os.environ.clear()
    os.environ.update(environment)
    _given[:] = fn, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it was started anew
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: tuple) -> Any:
    fn, shared = _given
    return fn(shared, *task)


# ---------------------------------------------------------------------------------------------
# Ray
# ---------------------------------------------------------------------------------------------


def _run_on_ray(
    fn: Callable[..., Any], shared: Any, tasks: Sequence[tuple], address: str
) -> Iterator[Any]:
    """Yields the results of tasks that a Ray cluster works on.

    The code and `shared` are sent along, so its machines need only the packages that they import.
    """
    try:
        import ray
        from ray import cloudpickle
    except ImportError as error:
        raise ConfigError(f'--ray needs Ray: {INSTALL}') from error
    ship_code(cloudpickle)
    started = not ray.is_initialized()
    if started:
        try:
            host, _, port = address.rpartition(':')
            # Asks first, because Ray waits for minutes for a cluster that does not answer.
            if port.isdigit() and '://' not in address:
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, log_to_driver=False, logging_level='warning')
        except Exception as error:  # each layer of Ray raises its own classes
            raise ConfigError(_no_cluster(address, error)) from error
    try:
        remote = ray.remote(num_cpus=1)(fn)
        reference = ray.put(shared)
        pending = [remote.remote(reference, *task) for task in tasks]
        for result in pending:
            yield ray.get(result)
    finally:
        if started:
            ray.shutdown()


def _no_cluster(address: str, error: Exception) -> str:
    """Returns the message that Ray could not be reached or started."""
    if address != 'local':
        return (
            f'no Ray cluster answers at --ray={address} ({error}): start one with `ray start '
            '--head`, or use --ray=local for one on this machine alone'
        )
    folder = os.environ.get('RAY_TMPDIR') or tempfile.gettempdir()
    if len(folder) > RAY_TMPDIR_LENGTH:
        return (
            f'Ray cannot make its sockets below {folder} ({error}): name a folder with a short '
            'path, as in RAY_TMPDIR=/tmp'
        )
    return (
        f'Ray could not start on this machine ({type(error).__name__}: {error}): if the machine is '
        'slow or busy, start it by hand with `ray start --head`, wait until it is up, and use '
        '--ray=auto; or use --workers without Ray'
    )


def ship_code(cloudpickle: types.ModuleType) -> None:
    """Makes `cloudpickle` send the SHIPPED modules' functions as code, not only by their names."""
    for name in SHIPPED:
        cloudpickle.register_pickle_by_value(importlib.import_module(name))
