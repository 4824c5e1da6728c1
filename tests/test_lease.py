"""One run at a time holds a workdir: refused while it is fresh, taken over when its holder died."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import tensorstore as ts
from servers import leads_to, serve_bucket, serve_s3
from training_worker import small_run

import train
from checkpoint import Checkpointer, CheckpointError
from config import ConfigError
from runtime import lease as leases
from runtime.lease import (
    Lease,
    LeaseLostError,
    OwnedSaves,
    alive,
    held_by_living,
    parse,
    process_start,
    this_process,
)


@pytest.fixture
def quick(monkeypatch):
    """Makes beats and staleness take moments."""
    monkeypatch.setattr(leases, 'BEAT_SECONDS', 0.05)
    monkeypatch.setattr(leases, 'STALE_SECONDS', 0.4)
    monkeypatch.setattr(leases, 'POLL_SECONDS', 0.02)


def content(workdir) -> dict:
    return json.loads((workdir / 'lease.json').read_text())


def ended_process() -> tuple[int, str]:
    """Returns number and start of a process that has ended."""
    with subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as process:
        started = process_start(process.pid)
        process.kill()
        process.wait()
    return process.pid, started


def leave(workdir, **changes) -> None:
    """Leaves a lease as a killed run would."""
    pid, started = ended_process()
    entry = this_process() | {'pid': pid, 'started': started, 'id': 'another'} | changes
    (workdir / 'lease.json').write_text(json.dumps(entry))


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with Lease(str(tmp_path)) as lease:
        lease.hold()
        lease.check()
        with pytest.raises(ConfigError) as caught, Lease(str(tmp_path)):
            pass
        held = content(tmp_path)
        assert f'{tmp_path} is in use by pid {os.getpid()} on {held["host"]} since 2' in str(
            caught.value
        )
        assert 'another --workdir' in str(caught.value)
        lease.check()
    assert os.listdir(tmp_path) == []
    with Lease(str(tmp_path)):
        pass


@pytest.mark.parametrize('changes', [{}, {'pid': os.getpid()}], ids=['dead', 'number_taken_again'])
def test_what_a_killed_run_of_this_machine_left_is_taken_over_at_once(changes, tmp_path):
    leave(tmp_path, **changes)
    start = time.monotonic()
    with Lease(str(tmp_path), say=None) as lease:
        assert content(tmp_path)['pid'] == os.getpid()
        lease.check()
    assert time.monotonic() - start < 1


def test_a_zombie_has_ended():
    with subprocess.Popen([sys.executable, '-c', '']) as process:
        while process_start(process.pid):
            time.sleep(0.01)
        assert alive(this_process() | {'pid': process.pid, 'started': '1'}) is False


def test_a_lease_that_no_run_wrote_ends_no_start(tmp_path):
    assert alive(this_process() | {'pid': 2**31}) is False
    assert parse(b'[' * 100_000) == {}
    (tmp_path / 'lease.json').symlink_to('lease.json')  # cannot be read
    assert held_by_living(str(tmp_path))


@pytest.mark.parametrize('left', [{'machine': 'another'}, {'machine': 'another', 'pid': 'x'}, None])
def test_a_silent_lease_of_another_machine_is_taken_over_after_a_while(left, quick, tmp_path):
    if left:
        leave(tmp_path, **left)
    else:
        (tmp_path / 'lease.json').write_text('{"pid": 3')
    said, start = [], time.monotonic()
    with Lease(str(tmp_path), said.append) as lease:
        assert time.monotonic() - start >= leases.STALE_SECONDS
        lease.check()
    assert len(said) == 1
    assert 'waiting 0.4 s for a sign of life' in said[0]


def test_a_beating_lease_of_another_machine_is_refused(quick, tmp_path, monkeypatch):
    with Lease(str(tmp_path)):
        monkeypatch.setattr(leases, 'this_machine', lambda: 'another')
        start = time.monotonic()
        with pytest.raises(ConfigError, match='is in use by pid'), Lease(str(tmp_path)):
            pass
        assert time.monotonic() - start < leases.STALE_SECONDS


def test_the_lease_beats(quick, tmp_path):
    with Lease(str(tmp_path)) as lease:
        first = content(tmp_path)['beat']
        deadline = time.monotonic() + 5
        while content(tmp_path)['beat'] < first + 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not lease.lost


@pytest.mark.parametrize('now', ['another', 'gone'])
def test_a_run_that_lost_its_lease_notices_and_leaves_the_new_one(now, quick, tmp_path):
    with Lease(str(tmp_path)) as lease:
        if now == 'another':
            leave(tmp_path, pid=1)
        else:
            (tmp_path / 'lease.json').unlink()
        with pytest.raises(LeaseLostError, match='has lost it, ends, and writes nothing more'):
            lease.check()
        deadline = time.monotonic() + 5
        while lease._thread.is_alive():  # the beat gives up, too
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert (tmp_path / 'lease.json').exists() == (now == 'another')


def winners(make) -> int:
    """Returns how many of several leases that are entered at the same time are held."""
    barrier, done, held = threading.Barrier(4), threading.Barrier(4), []

    def enter() -> None:
        lease = make()
        barrier.wait()
        try:
            with lease:
                held.append(lease)
                lease.check()
                done.wait()
        except ConfigError:
            done.wait()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(held)


@pytest.mark.parametrize('left', [False, True])
def test_of_simultaneous_starts_one_wins(left, quick, tmp_path):
    for i in range(10):
        folder = tmp_path / str(i)
        folder.mkdir()
        if left:
            leave(folder)
        assert winners(lambda folder=folder: Lease(str(folder))) == 1


def test_leases_in_memory(quick):
    context = ts.Context()
    assert winners(lambda: Lease('memory://run', context=context)) == 1
    with Lease('memory://run', context=context) as lease:
        lease.check()


def test_leases_in_s3(quick, monkeypatch):
    with serve_s3() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with Lease('s3://bucket/run') as lease:
            time.sleep(0.2)
            lease.check()
            assert not lease.lost
            with pytest.raises(ConfigError, match='is in use by'), Lease('s3://bucket/run'):
                pass
        with Lease('s3://bucket/run'):
            pass


def test_leases_in_a_bucket_without_conditions(quick, monkeypatch):
    with serve_bucket() as store:
        for name, value in leads_to(store).items():
            monkeypatch.setenv(name, value)
        with Lease('gs://bucket/run') as lease:
            time.sleep(0.2)
            lease.check()
            assert parse(store.objects['run/lease.json'])['beat'] > 0
            with pytest.raises(ConfigError, match='is in use by'), Lease('gs://bucket/run'):
                pass
        assert store.objects == {}


def test_without_room_the_lease_is_held_once_there_is_some(tmp_path, monkeypatch):
    leave(tmp_path)
    with Lease(str(tmp_path)) as other:
        store = other._store
    real, full = store.__class__.write, True

    class Disk:
        """A store that is full, for a while."""

        def read(self, *args):
            return store.read(*args)

        def write(self, *args, **more):
            if full:
                raise ValueError('RESOURCE_EXHAUSTED: No space left on device')
            return real(store, *args, **more)

    monkeypatch.setattr(leases, 'open_store', lambda *_: Disk())
    with Lease(str(tmp_path)) as lease:
        lease.check()  # nobody else has it
        with pytest.raises(ConfigError, match=r'cannot be written: .*No space left.*make room'):
            lease.hold()
        full = False
        lease.hold()
        lease.check()
        assert content(tmp_path)['pid'] == os.getpid()


def test_a_run_whose_workdir_was_taken_over_commits_and_removes_nothing(
    tokens, tmp_path, monkeypatch
):
    """The other run, of another machine, has taken over what was silent for a minute."""
    original = Checkpointer.save

    def save(self: Checkpointer, step: int, *args, **named) -> None:
        self.wait()
        if step == 8:
            leave(tmp_path, machine='another')
        original(self, step, *args, **named)

    monkeypatch.setattr(Checkpointer, 'save', save)
    config = small_run(tokens, checkpoint__every=4, checkpoint__keep=1, steps=20)
    with pytest.raises(CheckpointError, match=r'is in use by pid .* has lost it'):
        train.train(config, str(tmp_path))
    with Checkpointer(f'{tmp_path}/checkpoints') as checkpoints:
        assert checkpoints.steps() == [4]
    assert content(tmp_path)['id'] == 'another'


def test_between_saves_the_loop_asks_whether_the_lease_is_lost(quick, tmp_path):
    with (
        Lease(str(tmp_path)) as lease,
        Checkpointer(f'{tmp_path}/checkpoints') as checkpoints,
    ):
        saves = OwnedSaves(lease, checkpoints)
        assert not saves.failed()
        saves.wait()
        leave(tmp_path, machine='another')
        deadline = time.monotonic() + 5
        while not saves.failed():  # the beat finds out
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match=r'in use by pid .* has lost it'):
            saves.wait()


def test_a_refused_start_leaves_no_folder(tokens, tmp_path):
    config = small_run(tmp_path / 'nothing')
    with pytest.raises(ConfigError, match=r'holds no manifest\.json'):
        train.train(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_run_is_refused_before_anything_is_written(tokens, tmp_path):
    with Lease(str(tmp_path)):
        with pytest.raises(ConfigError, match='is in use by'):
            train.train(small_run(tokens), str(tmp_path))
        assert os.listdir(tmp_path) == ['lease.json']
