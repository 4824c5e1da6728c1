"""Several processes together see the batches that one sees alone, also from a bucket."""

import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from common_data import ROOT, contents, prepared
from servers import leads_to, serve_bucket

import train_step
from config import ConfigError
from configs import default
from corpus.shards import Split
from data import Mixture
from machine import processes
from parallel import make_mesh

STEPS = (0, 5, 6)


def mixture_of(paths: list[str]) -> Mixture:
    return Mixture([Split(path, 'train') for path in paths], [0.6, 0.4], 32, 16, seed=3)


def held_rows(paths: list[str]) -> dict[str, list[int]]:
    """Returns the rows of the batches that this process holds, by 'step row'."""
    config = default.get_config()
    config.batch_size, config.seq_len, config.microbatches = 32, 16, 2
    config.mesh.update(dp=2, fsdp=2, tp=2)
    setup = train_step.setup(config, make_mesh(config.mesh))
    mixture = mixture_of(paths)
    rows = {}
    for step in STEPS:
        batch = train_step.put_batch(mixture.batch_at, step, setup)
        for shard in batch.addressable_shards:
            for m in range(2):
                first = shard.index[1].start or 0
                for i, row in enumerate(np.asarray(shard.data)[m]):
                    rows[f'{step} {m * 16 + first + i}'] = row.tolist()
    return rows


def rows_of_processes(n: int, paths: list[str]) -> list[dict[str, list[int]]]:
    """Returns `held_rows` of n processes that run together, each with 8 / n devices."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps([i, n, port, paths])],
            env={**os.environ, 'PYTHONPATH': ROOT},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * n
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope='module')
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp('sources')
    texts = [
        {f'{i}.txt': ''.join(chr(33 + (i * j + k) % 90) for j in range(900)) for i in range(20)}
        for k in (0, 40)
    ]
    return [prepared(folder / str(k), texts[k]) for k in (0, 1)]


@pytest.fixture
def bucket(paths, monkeypatch):
    """Returns a server with the sources as gs://bucket/0 and gs://bucket/1."""
    with serve_bucket() as store:
        for k, path in enumerate(paths):
            store.objects |= {f'{k}/{name}': content for name, content in contents(path).items()}
        for name, value in leads_to(store).items():
            monkeypatch.setenv(name, value)
        yield store


def assert_complete(rows: dict[str, list[int]], paths: list[str]) -> None:
    mixture = mixture_of(paths)
    for step in STEPS:
        expected = mixture.batch_at(step)
        np.testing.assert_array_equal([rows[f'{step} {i}'] for i in range(32)], expected)


def test_one_process_holds_all_rows(paths):
    assert_complete(held_rows(paths), paths)


def test_two_processes_share_the_rows_of_a_bucket(paths, bucket):
    first, second = rows_of_processes(2, ['gs://bucket/0', 'gs://bucket/1'])
    assert len(first) == len(second) == len(STEPS) * 16
    assert_complete(first | second, paths)
    assert bucket.reads


def test_what_is_kept_of_a_bucket_is_bounded(bucket):
    """Of 20 shards of one file of 64 KiB, 4 MiB keep all and 1 MiB keeps half, but not all."""

    def reads(cache_bytes: int, share: int) -> int:
        split = Split('gs://bucket/0', 'train', cache_bytes)
        bucket.reads.clear()  # of checksums
        for _ in range(5):
            split.read(0, split.n_tokens // share)
        return sum('/c/' in name for name, _ in bucket.reads)

    half = reads(4 << 20, 2)
    assert 10 <= half <= 11
    assert reads(4 << 20, 1) == 20
    assert reads(1 << 20, 2) == half
    # How many more depends on the order in which requests return: at most all, in each pass.
    assert 20 < reads(1 << 20, 1) <= 5 * 20
    assert reads(0, 1) >= 5 * 20


def test_simulated_devices_have_threads_to_wait_in():
    program = """
import pathlib, sys
from machine.processes import choose_platform
choose_platform(int(sys.argv[1]))
import jax
jax.devices()
names = [(task / 'comm').read_text() for task in pathlib.Path('/proc/self/task').iterdir()]
print(sum(name.startswith('tf_XLAEigen') for name in names))
"""
    environment = {k: v for k, v in os.environ.items() if k != processes.THREADS}
    for n, threads in ((1, 16), (8, 32)):
        command = [sys.executable, '-c', program, str(n)]
        found = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        assert int(found.stdout) == threads


# ---------------------------------------------------------------------------------------------
# Joining
# ---------------------------------------------------------------------------------------------

SRUN = dict.fromkeys(processes.SLURM, '0')


@pytest.mark.parametrize(
    ('environment', 'several'),
    [
        # An interactive step: one process, in an allocation for eight.
        (SRUN | {'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_TASKS': '1'}, False),
        (SRUN | {'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '4'}, True),
        (SRUN | {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': ''}, True),
    ],
    ids=str,
)
def test_the_tasks_of_the_step_count(environment, several):
    assert processes.several_offered(environment) == several


@pytest.mark.parametrize(
    'wrong',
    [
        SRUN | {'SLURM_NTASKS': '4(x2)'},
        SRUN | {'SLURM_NTASKS': '4', 'SLURM_PROCID': 'first'},
        SRUN | {'SLURM_NTASKS': '4', 'SLURM_STEP_NUM_TASKS': '-1'},
        {'MEGASCALE_NUM_SLICES': 'two'},
    ],
    ids=str,
)
def test_a_variable_that_is_no_number_is_named(wrong):
    name, value = next((n, v) for n, v in reversed(wrong.items()) if not v.isdecimal())
    with pytest.raises(ConfigError) as caught:
        processes.several_offered(wrong)
    assert f'{name}={value} in the environment is no number' in str(caught.value)


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
    """Collects the calls of jax.distributed.initialize, which do nothing."""
    calls: list[dict] = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **options: calls.append(options))
    monkeypatch.setattr(jax.config, 'update', lambda *_: None)
    return calls


def test_slurm_is_asked_for_the_tasks_of_the_step(joined, monkeypatch):
    monkeypatch.setattr(os, 'environ', SRUN | {'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_TASKS': '4'})
    processes.start(None, None, None, 9)
    assert joined[0]['num_processes'] == 4


@pytest.mark.parametrize(
    'coordinator', ['host', 'host:', ':123', 'host:port', 'host:0', 'host:70000', 'host:-1']
)
def test_an_address_without_a_port_is_refused(coordinator, joined):
    with pytest.raises(ConfigError, match='is no address; use HOST:PORT'):
        processes.start(coordinator, 2, 1, 9)
    assert not joined


def test_the_number_of_a_process_is_below_their_number(joined):
    with pytest.raises(ConfigError, match='--process_id=2 is not below --num_processes=2'):
        processes.start('localhost:1234', 2, 2, 9)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_process_0_listens_where_the_others_look_for_it(joined, capfd):
    port = free_port()
    for host in ('localhost', '127.0.0.1'):
        processes.start(f'{host}:{port}', 2, 0, 9)
        assert joined[-1]['coordinator_bind_address'] == f'{host}:{port}'
    assert not capfd.readouterr().err
    processes.start(f'192.0.2.1:{port}', 2, 1, 9)  # no other process listens
    assert 'coordinator_bind_address' not in joined[-1]


@pytest.mark.parametrize(
    ('host', 'reason'),
    [
        ('192.0.2.1', 'is no address of this machine'),
        ('nowhere.invalid', 'cannot be resolved here'),
        ('this-machine', 'stands for this machine alone'),  # 127.0.1.1 in /etc/hosts
    ],
)
def test_behind_another_address_it_listens_everywhere(host, reason, joined, monkeypatch, capfd):
    resolve = socket.getaddrinfo

    def fake(name: str, *args, **kwargs):
        if name == 'nowhere.invalid':
            raise socket.gaierror(socket.EAI_NONAME, 'Name or service not known')
        return resolve('127.0.1.1' if name == 'this-machine' else name, *args, **kwargs)

    monkeypatch.setattr(socket, 'getaddrinfo', fake)
    port = free_port()
    processes.start(f'{host}:{port}', 2, 0, 9)
    assert joined[0]['coordinator_bind_address'] == f'[::]:{port}'
    assert f'{host} {reason}' in capfd.readouterr().err


@pytest.mark.parametrize('host', ['localhost', '192.0.2.1'])
def test_a_port_in_use_is_refused(host, joined):
    with socket.socket() as s:
        s.bind(('127.0.0.1' if host == 'localhost' else '0.0.0.0', 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(ConfigError, match=f'cannot listen on port {port}.*use another port'):
            processes.start(f'{host}:{port}', 2, 0, 9)
    assert not joined


def test_who_waits_says_for_whom(joined, monkeypatch, capfd):
    monkeypatch.setattr(processes, 'WORD_SECONDS', 0.05)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: time.sleep(0.5))
    processes.start('localhost:1234', 2, 1, 9)
    said = capfd.readouterr().err
    assert 'process 1 of 2 is waiting for process 0 and the others at localhost:1234' in said
    assert 'to run alone, leave --coordinator, --num_processes and --process_id out' in said
    assert said.endswith('(up to 300 s)\n')
    environment = SRUN | {'SLURM_NTASKS': '8', 'SLURM_STEP_NODELIST': 'node[1-8]'}
    monkeypatch.setattr(os, 'environ', environment)
    processes.start(None, None, None, 9)
    said = capfd.readouterr().err
    assert 'task 0 of 8 of SLURM job 0 is waiting for the others, on node[1-8]; to run' in said


def test_who_waits_in_vain_asks_to_be_started_again(joined, monkeypatch, capfd):
    monkeypatch.setattr(processes, 'WORD_SECONDS', 0.05)
    monkeypatch.setattr(processes, 'JOIN_SECONDS', 0.1)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: time.sleep(0.5))
    codes = []
    monkeypatch.setattr(processes.os, '_exit', codes.append)
    processes.start('localhost:1234', 2, 1, 9)
    assert codes == [75]
    assert 'not all processes have come within 0.1 s' in capfd.readouterr().err


if __name__ == '__main__':
    index, n, port, given = json.loads(sys.argv[1])
    processes.choose_platform(8 // n)
    jax.distributed.initialize(f'127.0.0.1:{port}', n, index)
    print(json.dumps(held_rows(given)))
