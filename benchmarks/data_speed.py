"""Throughput of preparing data and of reading batches, beside tiktoken's own in the same run.

    python benchmarks/data_speed.py
    python benchmarks/data_speed.py --tokenizer=cl100k_base --megabytes=200 --json

The corpus is the source of Python's standard library, cut into documents of 3,000 characters and
repeated in other orders, as Parquet where pyarrow is there and as .jsonl otherwise. `raw` is
tiktoken alone in one process on texts that lie in memory, the faster of its two calls. A job's
time holds all of it: start of the processes, reading, writing, reading back. The clock of a shared
machine drifts, so all are measured in turn, several times, and the best of each counts. Figures by
CPU time, of all processes together, depend less on what else the machine does.
"""

import importlib.util
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import tiktoken
from absl import app, flags

from data import Job, Loader, Split, find_files, prepare
from tokenizer import get_encoding, stdlib_files

FLAGS = flags.FLAGS


def make_texts(megabytes: float) -> list[str]:
    pieces = []
    for _, path in stdlib_files()[0]:
        with open(path, encoding='utf-8') as f:
            text = f.read()
        pieces += [text[i : i + 3000] for i in range(0, len(text), 3000)]
    rng, texts, size = random.Random(0), [], 0
    while size < megabytes * 1e6:
        rng.shuffle(pieces)
        for piece in pieces:
            texts.append(piece)
            size += len(piece)
            if size >= megabytes * 1e6:
                break
    return texts


def write_corpus(folder: str, texts: list[str]) -> str:
    """Writes the texts in 4 files; returns their glob."""
    parquet = importlib.util.find_spec('pyarrow')
    for i in range(4):
        mine = texts[i::4]
        if parquet:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({'id': list(range(len(mine))), 'text': mine})
            pq.write_table(table, f'{folder}/{i}.parquet', row_group_size=1000)
        else:
            with open(f'{folder}/{i}.jsonl', 'w') as f:
                f.writelines(json.dumps({'text': text}) + '\n' for text in mine)
    return f'{folder}/*.{"parquet" if parquet else "jsonl"}'


class Cost:
    """The least seconds of wall clock and of CPU time, with child processes that have ended, that
    something took; a unit of work is a token."""

    def __init__(self):
        self.wall = self.cpu = float('inf')

    def measure(self, fn: Callable[[], int]) -> None:
        """Runs fn, which returns the number of tokens."""
        used, started = cpu_seconds(), time.perf_counter()
        tokens = fn()
        self.wall = min(self.wall, (time.perf_counter() - started) / tokens)
        self.cpu = min(self.cpu, (cpu_seconds() - used) / tokens)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def raw(enc: tiktoken.Encoding, texts: list[str], to_numpy: bool) -> int:
    if to_numpy:
        return sum(len(enc.encode_to_numpy(text, disallowed_special=())) for text in texts)
    return sum(len(enc.encode_ordinary(text)) for text in texts)


def raw_seconds(tokenizer: str, texts: list[str]) -> tuple[float, int]:
    enc = get_encoding(tokenizer)
    started = time.perf_counter()
    n = raw(enc, texts, to_numpy=True)
    return time.perf_counter() - started, n


def job(pattern: str, folder: str, workers: int) -> int:
    output = f'{folder}/out-{workers}'
    shutil.rmtree(output, ignore_errors=True)
    files = find_files([pattern])
    manifest = prepare(files, Job(output, FLAGS.tokenizer), workers, part_bytes=4 << 20)
    return sum(split['tokens'] for split in manifest['splits'].values())


_naive: dict = {}


def naive_start(tokenizer: str) -> None:
    _naive['encoding'] = get_encoding(tokenizer)


def naive_encode(text: str) -> list[int]:
    return [*_naive['encoding'].encode_ordinary(text), _naive['encoding'].eot_token]


def naive(pattern: str, folder: str, workers: int) -> int:
    """A pool, a document at a time, a Python list that becomes an array."""
    from corpus import cut_into_parts, documents

    parts = cut_into_parts(find_files([pattern]), 1 << 40)
    texts = (d.text for part in parts for piece in part for d in documents(piece))
    ids: list[int] = []
    pool = multiprocessing.get_context('spawn').Pool(workers, naive_start, (FLAGS.tokenizer,))
    for found in pool.imap(naive_encode, texts):
        ids.extend(found)
    pool.close()
    pool.join()
    np.save(f'{folder}/naive.npy', np.array(ids, np.uint32))
    return len(ids)


def loader_seconds(path: str, batch_size: int, seq_len: int) -> float:
    """Seconds a batch over 300 of them, after the data has been read once."""
    loader = Loader(Split(path, 'train'), batch_size, seq_len, seed=0)
    best = float('inf')
    for _ in range(4):
        started = time.perf_counter()
        for step in range(300):
            loader.batch_at(step)
        best = min(best, (time.perf_counter() - started) / 300)
    return best


def tiny_step() -> tuple[float, int, int]:
    """Seconds a training step of configs/tiny.py, and its batch size and sequence length."""
    import jax

    import steps
    import train
    from configs import tiny
    from parallel import make_mesh

    train.keep_freed_memory()
    config = tiny.get_config()
    mesh = make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(0, 4096, (config.batch_size, config.seq_len + 1))
    batch = steps.put_batch(lambda _, rows: tokens[rows].astype(np.int32), 0, config, mesh)
    state, step = steps.init_state(config, mesh), steps.make_train_step(config, mesh)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return min(seconds), config.batch_size, config.seq_len


def preparation(folder: str) -> dict[str, float]:
    texts = make_texts(FLAGS.megabytes)
    pattern = write_corpus(folder, texts)
    # Copies, since the same few strings over and over would lie in the processor's caches.
    sample = [text.encode().decode() for text in texts[: len(texts) // 2]]
    enc = get_encoding(FLAGS.tokenizer)
    tasks = {
        'list': lambda: raw(enc, sample, to_numpy=False),
        'numpy': lambda: raw(enc, sample, to_numpy=True),
        'one': lambda: job(pattern, folder, 1),
        'two': lambda: job(pattern, folder, 2),
        'naive': lambda: naive(pattern, folder, 2),
    }
    costs = {name: Cost() for name in tasks}
    pair = 0.0  # tokens a second of two processes that do nothing but tokenize
    with ProcessPoolExecutor(2, multiprocessing.get_context('spawn')) as pool:
        for _ in range(FLAGS.repeats):
            for name, task in tasks.items():
                costs[name].measure(task)
            runs = [pool.submit(raw_seconds, FLAGS.tokenizer, sample) for _ in range(2)]
            pair = max(pair, sum(n / seconds for seconds, n in (run.result() for run in runs)))
    wall = {name: cost.wall for name, cost in costs.items()}
    cpu = {name: cost.cpu for name, cost in costs.items()}
    raw_wall, raw_cpu = min(wall['list'], wall['numpy']), min(cpu['list'], cpu['numpy'])
    return {
        'megabytes': FLAGS.megabytes,
        'raw_tokens_per_second': 1 / raw_wall,
        'raw_tokens_per_second_2_processes': pair,
        'job_tokens_per_second_1_worker': 1 / wall['one'],
        'job_tokens_per_second_2_workers': 1 / wall['two'],
        'naive_tokens_per_second_2_workers': 1 / wall['naive'],
        'job_share_of_raw_1_worker': raw_wall / wall['one'],
        'job_share_of_raw_per_worker_2_workers': raw_wall / wall['two'] / 2,
        'job_share_of_raw_2_processes': 1 / wall['two'] / pair,
        'job_2_workers_over_1': wall['one'] / wall['two'],
        'job_over_naive_2_workers': wall['naive'] / wall['two'],
        'cpu_time_job_share_of_raw_1_worker': raw_cpu / cpu['one'],
        'cpu_time_job_share_of_raw_2_workers': raw_cpu / cpu['two'],
        'cpu_time_job_over_naive_2_workers': cpu['naive'] / cpu['two'],
    }


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = preparation(folder)
        step, batch_size, seq_len = tiny_step()
        batch = loader_seconds(f'{folder}/out-1', batch_size, seq_len)
    result |= {
        'loader_tokens_per_second': batch_size * seq_len / batch,
        'tiny_step_seconds': step,
        'loader_share_of_tiny_step': batch / step,
    }
    for name, value in result.items():
        shown = f'{value:,.0f}' if value > 1000 else f'{value:.4g}'
        print(f'{name:>40}  {shown}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_string('tokenizer', 'vocab/stdlib-4096.tiktoken', 'As for data.py.')
    flags.DEFINE_float('megabytes', 100.0, 'Text of the corpus.')
    flags.DEFINE_integer('repeats', 2, 'Rounds of all measurements; the best of each counts.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    app.run(main)
