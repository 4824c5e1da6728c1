"""Several processes together see the batches that one sees alone, also from a bucket."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from common_data import ROOT, contents, prepared
from servers import leads_to, serve_bucket

import train_step
from configs import default
from corpus.shards import Split
from data import Mixture
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
    n_reads = {}
    for cache_bytes in (4 << 20, 1 << 20, 0):
        bucket.reads.clear()
        split = Split('gs://bucket/0', 'train', cache_bytes)
        for _ in range(5):
            split.read(0, split.n_tokens)
        n_reads[cache_bytes] = sum('/c/' in name for name, _ in bucket.reads)
    # 20 shards of one file of 64 KiB: 4 MiB keep them all; 1 MiB does not, and which are read again
    # depends on the order in which requests happen to return.
    assert n_reads[4 << 20] == 20
    assert 20 < n_reads[1 << 20] <= 2.5 * 20
    assert n_reads[0] >= 5 * 20


if __name__ == '__main__':
    index, n, port, given = json.loads(sys.argv[1])
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', 8 // n)
    jax.distributed.initialize(f'127.0.0.1:{port}', n, index)
    print(json.dumps(held_rows(given)))
