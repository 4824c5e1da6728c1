"""The command in several processes: the numbers of one, and an end for all when one is lost."""

import functools
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import pytest
from common_runs import records
from training_worker import small_run

import optimizer
import train
import train_step
from checkpoint import CheckpointError
from config import ConfigError
from configs import default
from machine import processes
from machine.memory import OutOfMemoryError
from runtime import agreement, guards
from runtime.config_checks import check_all_devices

ROOT = pathlib.Path(train.__file__).parent
TIMEOUT = 300  # seconds, for what would otherwise hang


SRUN = dict.fromkeys(processes.SLURM, '0')


@pytest.mark.parametrize(
    ('environment', 'several'),
    [
        ({}, False),
        (SRUN | {'SLURM_NTASKS': '4'}, True),
        (SRUN | {'SLURM_NTASKS': '1'}, False),
        ({'SLURM_JOB_ID': '1', 'SLURM_NTASKS': '4'}, False),  # sbatch without srun
        ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
        ({'TPU_WORKER_HOSTNAMES': 'a'}, False),
        ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True),
    ],
    ids=str,
)
def test_the_environment_says_whether_there_are_others(environment, several):
    assert processes.several_offered(environment) == several


def test_what_the_environment_offers_is_left_to_jax(monkeypatch):
    calls = []
    monkeypatch.setattr(processes.jax.distributed, 'initialize', lambda **k: calls.append(k))
    monkeypatch.setattr(processes.jax.config, 'update', lambda *_: None)
    monkeypatch.delenv(processes.BIND_ADDRESS, raising=False)
    times = {
        'initialization_timeout': 2 * processes.JOIN_SECONDS,
        'heartbeat_timeout_seconds': 9,
        'shutdown_timeout_seconds': processes.SHUTDOWN_SECONDS,
    }
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
    processes.start(None, None, None, 9)
    assert not calls
    processes.start('auto', None, None, 9)
    processes.start(address, 2, 0, 9)
    monkeypatch.setattr(processes.os, 'environ', SRUN | {'SLURM_NTASKS': '4'})
    processes.start(None, None, None, 9)
    given = {'coordinator_address': address, 'num_processes': 2, 'process_id': 0}
    given['coordinator_bind_address'] = address
    assert calls == [times, times | given, times]
    for partial in [('a:1', 2, None), ('a:1', None, None), (None, 2, 1), ('auto', 2, 1)]:
        with pytest.raises(ValueError, match=r'belong together'):
            processes.start(*partial, 9)


@pytest.fixture(scope='module')
def cache(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp('compiled')


class Command:
    """train.py as process `i` of `n`, its output in a file beside the workdir."""

    def __init__(self, tokens, cache, workdir: pathlib.Path, port: int, i: int, n: int, *more: str):
        self.file = workdir.parent / f'{workdir.name}-{i}-{time.monotonic_ns()}.txt'
        command = [
            sys.executable, 'train.py', '--config=configs/tiny.py', f'--workdir={workdir}',
            f'--config.data.path={tokens}', f'--config.compilation_cache={cache}',
            f'--cpu_devices={8 // n}', '--config.steps=20', '--config.log.every=1',
            '--config.eval.every=10', '--config.eval.batches=1', '--config.checkpoint.every=5',
            '--config.log.sample_every=10', '--config.log.sample_tokens=4',
            '--config.model.n_layers=2', '--config.model.d_model=64', '--config.seq_len=32',
            '--config.model.vocab_size=264', '--config.model.attention_block=32',
            '--config.optimizer.warmup_steps=2', '--config.batch_size=16',
            '--config.mesh.dp=2', '--config.mesh.fsdp=2', '--config.mesh.ep=2',
            '--config.peak_flops=1e12', '--config.guard.heartbeat_seconds=30', *more,
        ]  # fmt: skip
        if n > 1:
            command += [f'--coordinator=localhost:{port}', f'--num_processes={n}']
            command += [f'--process_id={i}']
        with open(self.file, 'w') as f:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self.file.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def end(self) -> int:
        return self.process.wait(TIMEOUT)


def start(n: int, tokens, cache, workdir: pathlib.Path, *more: str) -> list[Command]:
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    return [Command(tokens, cache, workdir, port, i, n, *more) for i in range(n)]


@pytest.fixture(scope='module')
def whole(tokens, cache, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    (command,) = start(1, tokens, cache, workdir)
    assert command.end() == 0, command.output
    return workdir


def assert_alike(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    found, expected = records(workdir), records(whole)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert set(a) == set(b)
        assert a.pop('samples', None) == b.pop('samples', None)
        numbers = [name for name in a if not name.startswith('moe/')]
        assert {k: a[k] for k in numbers} == pytest.approx({k: b[k] for k in numbers}, rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_stopped_by_a_signal_to_one_and_go_on_as_one(
    tokens, cache, whole, tmp_path
):
    workdir = tmp_path / 'run'
    commands = start(2, tokens, cache, workdir)
    commands[0].wait_for('step 12/20')
    commands[1].process.send_signal(signal.SIGTERM)  # after an evaluation, a sample and two saves
    for command in commands:
        assert command.end() == 0, command.output
    assert 'stopped by a signal: step 1' in commands[0].output
    assert commands[1].output.count('step ') == 0  # process 0 speaks
    (rest,) = start(1, tokens, cache, workdir)
    assert rest.end() == 0, rest.output
    assert 'going on from step 1' in rest.output
    assert_alike(workdir, whole)


@pytest.mark.slow
def test_two_processes_train_as_one(tokens, cache, whole, tmp_path):
    workdir = tmp_path / 'run'
    for command in start(2, tokens, cache, workdir):
        assert command.end() == 0, command.output
    assert_alike(workdir, whole)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_when_one_process_is_killed_the_other_ends_and_a_restart_goes_on(
    victim, tokens, cache, whole, tmp_path
):
    workdir = tmp_path / 'run'
    commands = start(2, tokens, cache, workdir)
    commands[0].wait_for('step 7/20')
    commands[victim].process.send_signal(signal.SIGKILL)
    assert commands[victim].end() == -signal.SIGKILL
    other = commands[1 - victim]
    # Its collective fails, or the heartbeats do, whatever is first.
    assert other.end() in (guards.AGAIN, -signal.SIGABRT), other.output
    assert 'of 2 ends. If another one ended first' in other.output or (
        'This most likely indicates that another task died' in other.output
    )
    commands = start(2, tokens, cache, workdir)
    for command in commands:
        assert command.end() == 0, command.output
    assert 'going on from step 5 of 20' in commands[0].output
    assert_alike(workdir, whole)


@pytest.mark.slow
def test_when_one_process_hangs_all_end(tokens, cache, tmp_path):
    more = ('--config.guard.step_seconds=5', '--config.steps=2000', '--config.eval.every=0')
    commands = start(2, tokens, cache, tmp_path / 'run', *more)
    commands[0].wait_for('step 7/2000')
    commands[1].process.send_signal(signal.SIGSTOP)
    try:
        assert commands[0].end() == guards.AGAIN, commands[0].output
    finally:
        commands[1].process.send_signal(signal.SIGKILL)
        commands[1].end()
    assert 'no progress for 5 s (guard.step_seconds), in step' in commands[0].output
    assert ' in run\n' in commands[0].output  # the stack of the main thread


@pytest.mark.parametrize(
    ('error', 'alone', 'of_two'),
    [
        (guards.TrainingError('diverged'), 'diverged', 'diverged'),
        (CheckpointError('no room'), 'no room', 'no room'),
        (ConfigError('the config cannot run: x'), 'the config cannot run: x', None),
        (OutOfMemoryError('out of memory'), 1, 1),
        (OSError('the network is gone'), OSError, guards.AGAIN),
        (ValueError('another one'), ValueError, guards.AGAIN),
    ],
    ids=str,
)
def test_exit_codes(error, alone, of_two, monkeypatch):
    """A text is an exit code of 1, with that message."""

    def fail(*_):
        raise error

    def leave(code):
        raise SystemExit(code)

    given = {'coordinator': None, 'num_processes': None, 'process_id': None, 'init_from': None}
    given |= {'plot': None, 'eval_only': None, 'profile': None, 'averaged': None}
    given |= {'config': default.get_config(), 'workdir': 'nowhere', 'cpu_devices': 0}
    given |= {'spare_devices': True}
    monkeypatch.setattr(train, 'FLAGS', types.SimpleNamespace(**given))
    monkeypatch.setattr(train, 'keep_freed_memory', lambda: None)
    monkeypatch.setattr(train, 'train', fail)
    monkeypatch.setattr(agreement, 'check_same', lambda _: None)
    monkeypatch.setattr(processes.os, '_exit', leave)
    for n, code in ((1, alone), (2, of_two or alone)):
        monkeypatch.setattr(train.jax, 'process_count', functools.partial(int, n))
        with pytest.raises(code if isinstance(code, type) else SystemExit) as caught:
            train.main([])
        if not isinstance(code, type):
            assert caught.value.code == code


@pytest.mark.parametrize('error', [OSError('no room'), ConfigError('no package')])
def test_what_fails_on_one_process_alone_ends_all(error, monkeypatch):
    def fail():
        raise error

    with pytest.raises(type(error)):  # of a process alone
        processes.agreed(fail)
    monkeypatch.setattr(processes.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(processes, 'all_processes', lambda flag: flag)
    assert processes.agreed(lambda: 3) == 3
    with pytest.raises(ConfigError, match=str(error)):
        processes.agreed(fail)
    monkeypatch.setattr(processes, 'all_processes', lambda flag: False)
    with pytest.raises(ConfigError, match='another process cannot start'):
        processes.agreed(lambda: 3)


def test_several_processes_spare_no_devices():
    config = default.get_config()
    config.data.path = 'stdlib'
    for n_processes, offered in ((1, True), (2, False)):
        with pytest.raises(ConfigError, match='takes 1 of 8 devices') as caught:
            check_all_devices(config, 8, n_processes)
        assert ('--spare_devices' in str(caught.value)) == offered


@pytest.mark.parametrize('here', [True, False])
def test_data_that_one_process_cannot_open_stops_all(here, monkeypatch):
    def open_data(*_):
        if not here:
            raise ConfigError('the cache folder cannot be written')

    monkeypatch.setattr(train, 'open_data', open_data)
    monkeypatch.setattr(processes.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(processes, 'all_processes', lambda flag: False)
    said = 'another process cannot open the data' if here else 'the cache folder'
    with pytest.raises(ConfigError, match=said):
        train.opened_data(default.get_config())


@pytest.mark.slow
def test_a_run_that_skips_too_many_steps_stops(tokens, tmp_path, monkeypatch):
    def judge(norm, history, guard):
        return optimizer.judge(jnp.where(history['counted'] < 3, norm, jnp.nan), history, guard)

    monkeypatch.setattr(train_step, 'judge', judge)
    config = small_run(tokens, guard__max_skips=2)
    with pytest.raises(guards.TrainingError, match='at step 5: 2 steps in a row were skipped'):
        train.train(config, str(tmp_path / 'run'))
    found = records(tmp_path / 'run')
    assert [r['skipped'] for r in found] == [0, 0, 0, 1, 2]
