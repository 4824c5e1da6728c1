"""Several processes together see the batches that one sees alone, also from a bucket."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from servers import leads_to, serve_bucket
from test_shards import contents, prepared

from corpus.shards import Split
from data import Mixture

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# Process `index` of `n`, each with 8 / n devices: prints its rows of the batches, by row number.
PROCESS = """
import json, sys
import jax
jax.config.update('jax_platforms', 'cpu')
root, index, n, port, paths = json.loads(sys.argv[1])
jax.config.update('jax_num_cpu_devices', 8 // n)
if n > 1:
    jax.distributed.initialize(f'127.0.0.1:{port}', n, index)
sys.path.insert(0, root)
import numpy as np
import train_step
from configs import default
from corpus.shards import Split
from data import Mixture
from parallel import make_mesh
config = default.get_config()
config.batch_size, config.seq_len, config.microbatches = 32, 16, 2
config.mesh.update(dp=2, fsdp=2, tp=2)
mesh = make_mesh(config.mesh)
mixture = Mixture([Split(path, 'train') for path in paths], [0.6, 0.4], 32, 16, seed=3)
rows = {}
for step in [0, 5, 6]:
    batch = train_step.put_batch(mixture.batch_at, step, config, mesh)
    for shard in batch.addressable_shards:
        for m in range(2):
            first = shard.index[1].start or 0
            for i, row in enumerate(np.asarray(shard.data)[m]):
                rows[f'{step} {m * 16 + first + i}'] = row.tolist()
print(json.dumps(rows))
"""


def run_processes(n: int, paths: list[str], environment: dict[str, str] | None = None) -> list:
    """The rows that each of n processes holds, by 'step row'."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    arguments = [json.dumps([ROOT, i, n, port, paths]) for i in range(n)]
    running = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, argument],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for argument in arguments
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


@pytest.mark.parametrize('n', [1, 2, 4])
def test_processes_see_the_batches_of_one(paths, n):
    mixture = Mixture([Split(path, 'train') for path in paths], [0.6, 0.4], 32, 16, seed=3)
    found = run_processes(n, paths)
    together: dict[str, list[int]] = {}
    for rows in found:
        # dp * fsdp = 4 shards of the rows, spread over the processes.
        assert len(rows) == 3 * 32 / min(n, 4)
        together |= rows
    for step in (0, 5, 6):
        expected = mixture.batch_at(step)
        np.testing.assert_array_equal([together[f'{step} {i}'] for i in range(32)], expected)


@pytest.fixture
def bucket(paths):
    """A server with the sources, their URLs, and the environment that leads there."""
    with serve_bucket() as store:
        for k, path in enumerate(paths):
            store.objects |= {f'{k}/{name}': content for name, content in contents(path).items()}
        yield store, ['gs://bucket/0', 'gs://bucket/1'], leads_to(store)


def test_batches_from_a_bucket(paths, bucket):
    store, urls, environment = bucket
    assert run_processes(2, urls, environment) == run_processes(2, paths)
    assert store.reads


READ_FIVE_TIMES = """
import sys
sys.path.insert(0, sys.argv[1])
from data import Split
split = Split(sys.argv[2], 'train', int(sys.argv[3]))
for _ in range(5):
    split.read(0, split.n_tokens)
"""


def test_what_is_kept_of_a_bucket_is_bounded(bucket):
    store, urls, environment = bucket
    n_reads = {}
    for cache_bytes in (4 << 20, 1 << 20, 0):
        store.reads.clear()
        command = [sys.executable, '-c', READ_FIVE_TIMES, ROOT, urls[0], str(cache_bytes)]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        n_reads[cache_bytes] = sum('/c/' in name for name, _ in store.reads)
    # 20 shards of one file of 64 KiB: 4 MiB keep them all; 1 MiB does not, and which are read again
    # depends on the order in which requests happen to return.
    assert n_reads[4 << 20] == 20
    assert 20 < n_reads[1 << 20] <= 2.5 * 20
    assert n_reads[0] >= 5 * 20
