"""Throughput of preparing data and of reading batches, beside tiktoken's own in the same run.

    python benchmarks/data_speed.py
    python benchmarks/data_speed.py --tokenizer=cl100k_base --megabytes=200 --json

The corpus is the source of Python's standard library, cut into documents of 3,000 characters and
repeated in other orders, as Parquet where pyarrow is there and as .jsonl otherwise. `raw` is
tiktoken alone in one process on texts that lie in memory, the faster of its two calls. A job's
time holds all of it: start of the processes, reading, writing, reading back; `beyond_start` leaves
out what a job over a few documents takes, which a corpus of some size does not notice. The clock of
a shared machine drifts, so all are measured in turn, several times; the figures are medians, and
ratios medians of the ratios of a round. Figures by CPU time, of all processes together, depend less
on what else the machine does.
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
from typing import NamedTuple

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


def write_corpus(folder: str, texts: list[str]) -> None:
    """Writes the texts in 4 files."""
    os.mkdir(folder)
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


class Used(NamedTuple):
    """What something took for its tokens: seconds of the clock, and of CPU time, in which child
    processes count that have ended."""

    tokens: int
    wall: float
    cpu: float

    def beyond(self, other: 'Used') -> 'Used':
        return Used(*(mine - its for mine, its in zip(self, other, strict=True)))

    @property
    def rate(self) -> float:
        return self.tokens / self.wall

    @property
    def cpu_rate(self) -> float:
        return self.tokens / self.cpu


def measured(fn: Callable[[], int]) -> Used:
    """Of fn, which returns the number of tokens."""
    used, started = cpu_seconds(), time.perf_counter()
    tokens = fn()
    return Used(tokens, time.perf_counter() - started, cpu_seconds() - used)


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


def job(folder: str, output: str, workers: int, part_bytes: int = 8 << 20) -> int:
    shutil.rmtree(output, ignore_errors=True)
    files = find_files([f'{folder}/*'])
    manifest = prepare(files, Job(output, FLAGS.tokenizer), workers, part_bytes)
    return sum(split['tokens'] for split in manifest['splits'].values())


_naive: dict = {}


def naive_start(tokenizer: str) -> None:
    _naive['encoding'] = get_encoding(tokenizer)


def naive_encode(text: str) -> list[int]:
    return [*_naive['encoding'].encode_ordinary(text), _naive['encoding'].eot_token]


def naive(folder: str, output: str, workers: int) -> int:
    """A pool, a document at a time, a Python list that becomes an array."""
    from corpus.documents import cut_into_parts, documents

    parts = cut_into_parts(find_files([f'{folder}/*']), 1 << 40)
    texts = (d.text for part in parts for piece in part for d in documents(piece))
    ids: list[int] = []
    pool = multiprocessing.get_context('spawn').Pool(workers, naive_start, (FLAGS.tokenizer,))
    for found in pool.imap(naive_encode, texts):
        ids.extend(found)
    pool.close()
    pool.join()
    np.save(f'{output}/naive.npy', np.array(ids, np.uint32))
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

    import train_step
    from configs import tiny
    from machine.memory import keep_freed_memory
    from parallel import make_mesh

    keep_freed_memory()
    config = tiny.get_config()
    mesh = make_mesh(config.mesh)
    tokens = np.random.default_rng(0).integers(0, 4096, (config.batch_size, config.seq_len + 1))
    batch = train_step.put_batch(lambda _, rows: tokens[rows].astype(np.int32), 0, config, mesh)
    state, step = train_step.init_state(config, mesh), train_step.make_train_step(config, mesh)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return min(seconds), config.batch_size, config.seq_len


def tokenizing_seconds(fn: Callable[[], int]) -> tuple[Used, float]:
    """What fn takes, and how much of it tiktoken takes, which no drift of the clock touches."""
    original, seconds = tiktoken.Encoding.encode_to_numpy, 0.0

    def timed(*args, **kwargs) -> np.ndarray:
        nonlocal seconds
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds += time.perf_counter() - started

    tiktoken.Encoding.encode_to_numpy = timed
    try:
        return measured(fn), seconds
    finally:
        tiktoken.Encoding.encode_to_numpy = original


def one_round(folder: str, sample: list[str], pool: ProcessPoolExecutor) -> dict[str, float]:
    """Every figure of the preparation once; the faster of tiktoken's calls on both sides."""
    enc = get_encoding(FLAGS.tokenizer)
    faster = lambda: max(  # noqa: E731
        (measured(lambda n=n: raw(enc, sample, n)) for n in (True, False)), key=lambda u: u.rate
    )
    raws = [faster()]
    one, tokenizing = tokenizing_seconds(lambda: job(f'{folder}/text', f'{folder}/1', 1))
    raws.append(faster())
    two = measured(lambda: job(f'{folder}/text', f'{folder}/2', 2))
    start = measured(lambda: job(f'{folder}/crumbs', f'{folder}/0', 2, part_bytes=1))
    raws.append(faster())
    pool_of_two = measured(lambda: naive(f'{folder}/text', folder, 2))
    runs = [pool.submit(raw_seconds, FLAGS.tokenizer, sample) for _ in range(2)]
    pair = sum(n / seconds for seconds, n in (run.result() for run in runs))
    raw_rate = float(np.mean([used.rate for used in raws]))
    raw_cpu_rate = float(np.mean([used.cpu_rate for used in raws]))
    running = two.beyond(start)
    return {
        'raw_tokens_per_second': raw_rate,
        'raw_tokens_per_second_2_processes': pair,
        'job_tokens_per_second_1_worker': one.rate,
        'job_tokens_per_second_2_workers': two.rate,
        'naive_tokens_per_second_2_workers': pool_of_two.rate,
        'start_seconds_2_workers': start.wall,
        'job_share_of_raw_1_worker': one.rate / raw_rate,
        'tokenizing_share_of_job_1_worker': tokenizing / one.wall,
        'job_share_of_raw_per_worker_2_workers': two.rate / raw_rate / 2,
        'beyond_start_share_of_raw_per_worker_2_workers': running.rate / raw_rate / 2,
        'beyond_start_share_of_raw_2_processes': running.rate / pair,
        'job_2_workers_over_1': two.rate / one.rate,
        'beyond_start_2_workers_over_1': running.rate / one.rate,
        'job_over_naive_2_workers': two.rate / pool_of_two.rate,
        'cpu_time_job_share_of_raw_1_worker': one.cpu_rate / raw_cpu_rate,
        'cpu_time_job_share_of_raw_2_workers': two.cpu_rate / raw_cpu_rate,
        'cpu_time_job_over_naive_2_workers': two.cpu_rate / pool_of_two.cpu_rate,
    }


def preparation(folder: str) -> dict[str, float]:
    """The medians over the rounds, of ratios too."""
    texts = make_texts(FLAGS.megabytes)
    write_corpus(f'{folder}/text', texts)
    write_corpus(f'{folder}/crumbs', texts[:8])
    # Copies, since the same few strings over and over would lie in the processor's caches.
    sample = [text.encode().decode() for text in texts[: len(texts) // 4]]
    with ProcessPoolExecutor(2, multiprocessing.get_context('spawn')) as pool:
        rounds = [one_round(folder, sample, pool) for _ in range(FLAGS.repeats)]
    return {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = preparation(folder)
        step, batch_size, seq_len = tiny_step()
        batch = loader_seconds(f'{folder}/1', batch_size, seq_len)
    result |= {
        'loader_tokens_per_second': batch_size * seq_len / batch,
        'tiny_step_seconds': step,
        'loader_share_of_tiny_step': batch / step,
    }
    for name, value in result.items():
        shown = f'{value:,.0f}' if value > 1000 else f'{value:.4g}'
        print(f'{name:>46}  {shown}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_string('tokenizer', 'vocab/stdlib-4096.tiktoken', 'As for data.py.')
    flags.DEFINE_float('megabytes', 100.0, 'Text of the corpus.')
    flags.DEFINE_integer('repeats', 3, 'Rounds of all measurements.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    app.run(main)
