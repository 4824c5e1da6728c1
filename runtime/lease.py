"""The lease of a workdir: one run at a time writes there.

lease.json names the process that holds the workdir, and changes every BEAT_SECONDS while that one
lives. A start is refused while another holds it, and takes over what a dead one left behind: at
once if the process was of this machine and is gone, otherwise once the file has not changed for
STALE_SECONDS by this machine's clock, so that clocks need not agree. All changes are conditional
on what was read before, so that of two starts at the same time one wins.
"""

import datetime
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import tensorstore as ts

from checkpoint import Checkpointer, CheckpointError
from config import ConfigError
from machine.processes import all_processes, from_process_0
from runtime.workdir import LEASE
from storage.stores import local_folder, open_store

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a change, after which the holder counts as dead
POLL_SECONDS = 0.5  # between looks at the lease of a process that cannot be asked for
HELD, REFUSED, WAITING = range(3)


class LeaseLostError(CheckpointError):
    """Another run has taken the workdir over; this one writes nothing more."""


# ---------------------------------------------------------------------------------------------
# The holder
# ---------------------------------------------------------------------------------------------


def this_machine() -> str:
    """Returns what a process number is unique in: on Linux a boot and a namespace of processes."""
    try:
        with open('/proc/sys/kernel/random/boot_id') as f:
            return f'{f.read().strip()} {os.readlink("/proc/self/ns/pid")}'
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """Returns when a process of this machine started, '' if it is gone, None if unknown."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            state, *fields = f.read().rpartition(')')[2].split()
        return '' if state in 'ZX' else fields[18]  # a zombie has ended, but was not waited for
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # no number of a process is that large
        return ''
    except OSError:
        pass
    return None


def this_process() -> dict[str, Any]:
    """Returns the entry of a lease for this process."""
    return {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'since': datetime.datetime.now().astimezone().isoformat(' ', 'seconds'),
        'started': process_start(os.getpid()),
        'machine': this_machine(),
        'id': secrets.token_hex(8),
    }


def parse(content: bytes) -> dict[str, Any]:
    """Returns the holder that a lease names; {} if the file is damaged."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def alive(holder: dict[str, Any]) -> bool | None:
    """Returns True if the process lives, False if it is gone, None if this machine cannot tell."""
    pid = holder.get('pid')
    if holder.get('machine') != this_machine() or not isinstance(pid, int) or pid <= 0:
        return None
    started = process_start(pid)
    if not started:
        return False if started == '' else None
    return started == holder.get('started')


def named(holder: dict[str, Any]) -> str:
    """Names a holder in messages."""
    pid, host, since = (holder.get(name, 'unknown') for name in ('pid', 'host', 'since'))
    return f'pid {pid} on {host} since {since}'


def held_by_living(workdir: str) -> bool:
    """Returns True if a living process of this machine holds the workdir, or may do so."""
    try:
        found = open_store(workdir).read(LEASE).result()
    except (OSError, ValueError):
        return True
    return found.state == 'value' and alive(parse(found.value)) is True


# ---------------------------------------------------------------------------------------------
# The lease
# ---------------------------------------------------------------------------------------------


class Lease:
    """Holds a workdir while entered, for a run whose process 0 alone writes the lease.

    With several processes all enter it and call `hold`. Raises ConfigError on entering if another
    run is using the workdir.
    """

    def __init__(
        self, workdir: str, say: Callable[[str], None] = print, context: ts.Context | None = None
    ):
        """`say` prints why a start waits. `context` is as for a Checkpointer."""
        self.workdir, self._say = workdir, say
        self.lost = False
        self._now = 'in use by another run, see the message of process 0'  # once it is lost
        self._store = open_store(workdir, context)
        self._entry, self._beats = this_process(), 0
        self._generation = b''  # of the lease that was read or written last
        self._seen: tuple[bytes, float] | None = None  # what another's lease is, and since when
        self._problem: Exception | None = None  # why there is no lease of this process yet
        self._written = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name='lease', daemon=True)
        folder = local_folder(workdir)
        self._made = folder if folder and not os.path.exists(folder) else None

    def __enter__(self) -> 'Lease':
        # A look at a time, so that the processes do not wait for minutes in one collective.
        while (state := from_process_0(self._look())) == WAITING:
            continue
        if state == REFUSED:
            raise ConfigError(
                str(self._problem or f'{self.workdir} cannot be used, see the message of process 0')
            )
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if not self._written:
            return
        self._thread.join(BEAT_SECONDS)
        try:
            self._store.write(LEASE, None, if_equal=self._generation).result()
            if self._made:
                os.rmdir(self._made)  # a start that was refused leaves no folder behind
        except (ValueError, OSError):
            pass  # the process ends, which a later start finds out

    def hold(self) -> None:
        """Writes the lease if that was impossible on entering, as on a full disk.

        To be called after unfinished files have made room, and before anything else is written.
        Raises ConfigError on all processes if it is impossible still.
        """
        first = jax.process_index() == 0
        if first and not self._written and not self._write():
            self._problem = self._problem or RuntimeError('another run was first')
        if not all_processes(self._written or not first):
            raise ConfigError(
                f'{self.workdir} cannot be written: {self._problem or "see process 0"}; mend the '
                f'access or make room, or use another --workdir'
            )

    def check(self) -> None:
        """Raises LeaseLostError if the workdir is no longer this run's; for any thread.

        Reads the lease, on process 0 alone.
        """
        if jax.process_index() != 0:
            return
        found = self._store.read(LEASE).result()
        holder = parse(found.value)
        mine = holder.get('id') == self._entry['id']
        if not (mine if self._written else found.stamp.generation == self._generation):
            self._lose(holder)
            raise self.error()

    def error(self) -> LeaseLostError:
        """Returns the error of a run that has lost its lease."""
        return LeaseLostError(
            f'{self.workdir} is {self._now}: this run has lost it, ends, and writes nothing more. '
            f'One run at a time may use a --workdir.'
        )

    def _lose(self, holder: dict[str, Any]) -> None:
        self._now = f'in use by {named(holder)}' if holder else f'without its {LEASE}'
        self.lost = True

    def _look(self) -> int:
        """Reads the lease, and takes it if it is free. Returns HELD, REFUSED or WAITING."""
        if jax.process_index() != 0:
            return HELD
        try:
            found = self._store.read(LEASE).result()
        except (ValueError, OSError) as error:
            self._problem = ConfigError(f'{self.workdir} cannot be read: {error}')
            return REFUSED
        self._generation = found.stamp.generation
        if found.state == 'value' and (state := self._judge(found.value)) != HELD:
            return state
        if self._write() or self._problem:
            return HELD  # or to be held by `hold`
        time.sleep(POLL_SECONDS)  # another start was first
        return WAITING

    def _judge(self, content: bytes) -> int:
        """Returns HELD if this lease of another process may be taken over, REFUSED or WAITING."""
        holder, now = parse(content), time.monotonic()
        lives = alive(holder)
        if lives is None and self._seen and self._seen[0] != content:
            lives = True
        if lives:
            self._problem = ConfigError(
                f'{self.workdir} is in use by {named(holder)}: stop that run first, or use another '
                f'--workdir'
            )
            return REFUSED
        if lives is False:
            return HELD
        if self._seen is None:
            self._seen = content, now
            self._say(
                f'{self.workdir} was in use by {named(holder)}, which cannot be asked from here: '
                f'waiting {STALE_SECONDS:g} s for a sign of life'
            )
        if now - self._seen[1] >= STALE_SECONDS:
            return HELD
        time.sleep(POLL_SECONDS)
        return WAITING

    def _write(self) -> bool:
        """Writes the lease over the one that was read last; returns False if it is another now.

        An error is kept for `hold`: on a full disk unfinished files have to go first.
        """
        content = json.dumps(self._entry | {'beat': self._beats}).encode() + b'\n'
        try:
            stamp = self._store.write(LEASE, content, if_equal=self._generation).result()
        except (ValueError, OSError) as error:
            self._problem = error
            return False
        self._problem = None
        if not stamp.generation:
            return False
        self._generation, self._beats = stamp.generation, self._beats + 1
        if not self._written:
            self._written = True
            self._thread.start()
        return True

    def _beat(self) -> None:
        """Changes the lease from time to time, until it is given back or lost."""
        while not self._done.wait(BEAT_SECONDS):
            try:
                if self._write() or self._problem:
                    continue
                # The answer to an earlier write may have been lost on its way.
                found = self._store.read(LEASE).result()
            except (ValueError, OSError):
                continue  # the store may answer the next time
            holder = parse(found.value)
            if holder.get('id') != self._entry['id']:
                return self._lose(holder)
            self._generation = found.stamp.generation


class OwnedSaves:
    """The saves of a run, for the loop to ask after each step: they fail once its lease is lost."""

    def __init__(self, lease: Lease, checkpoints: Checkpointer):
        self._lease, self._checkpoints = lease, checkpoints

    def failed(self) -> bool:
        """Returns True if a save under way has failed or the lease is lost, as far as is known."""
        return self._lease.lost or self._checkpoints.failed()

    def wait(self) -> None:
        """Waits for the save under way; raises CheckpointError, on all processes, if `failed` on
        any."""
        self._checkpoints.wait()
        if not all_processes(not self._lease.lost):
            raise self._lease.error()
