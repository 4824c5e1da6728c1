"""Throughput of preparing data and of reading batches, beside a bare tokenizer in the same run.

    python benchmarks/data_speed.py
    python benchmarks/data_speed.py --tokenizer=cl100k_base --megabytes=200 --json
    python benchmarks/data_speed.py --tokenizer=DIR/tokenizer.json

The corpus is the source of Python's standard library, cut into documents of 3,000 characters and
repeated in other orders, as Parquet where pyarrow is there and as .jsonl otherwise. `raw` is
tiktoken alone (tokenizers, for a tokenizer.json) in one process on texts that lie in memory, the
faster of its two calls. A job's time holds all of it: start of the processes, reading, writing,
reading back; `beyond_start` leaves out what a job over a few documents takes, which a corpus of
some size does not notice. The clock of a shared machine drifts, so all are measured in turn,
several times; the figures are medians, and ratios medians of the ratios of a round. Figures by CPU
time, of all processes together, depend less on what else the machine does.
"""

import contextlib
import glob
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import common
import numpy as np
import tiktoken
from absl import flags

from corpus.documents import cut_into_parts, documents
from corpus.files import find_files
from corpus.prepare import Job, prepare
from corpus.shards import Split
from data import Loader
from tokenizer import get_encoding, stdlib_files

FLAGS = flags.FLAGS

# ---------------------------------------------------------------------------------------------
# The corpus
# ---------------------------------------------------------------------------------------------


def make_texts(megabytes: float) -> list[str]:
    """Returns documents of 3,000 characters at most, this many million characters together."""
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
    """Writes the texts to 4 files of a new folder."""
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


# ---------------------------------------------------------------------------------------------
# Time used
# ---------------------------------------------------------------------------------------------


class Used(NamedTuple):
    """The tokens that a call made, and the seconds that it took: of the clock, and of CPU time,
    including that of child processes that have ended."""

    tokens: int
    wall: float
    cpu: float

    def beyond(self, other: 'Used') -> 'Used':
        """Returns what this call made and took more than another one."""
        return Used(*(mine - its for mine, its in zip(self, other, strict=True)))

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.wall

    @property
    def cpu_rate(self) -> float:
        """Tokens per second of CPU time."""
        return self.tokens / self.cpu


def measured(f: Callable[..., int], *args: Any) -> Used:
    """Calls f(*args), which returns the number of its tokens, and returns what it used."""
    used = cpu_seconds()
    wall, tokens = common.timed(f, *args)
    return Used(tokens, wall, cpu_seconds() - used)


def cpu_seconds() -> float:
    """Returns the CPU time of this process and its children.

    Of the children that run, like the server that workers are forked from, with that of their own
    children that have ended, as far as /proc tells.
    """
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
    for path in glob.glob('/proc/self/task/*/children'):
        for child in pathlib.Path(path).read_text().split():
            with contextlib.suppress(OSError):
                fields = pathlib.Path(f'/proc/{child}/stat').read_text().rpartition(')')[2].split()
                seconds += sum(map(int, fields[11:15])) / os.sysconf('SC_CLK_TCK')
    return seconds


def tokenizing_seconds(f: Callable[..., int], *args: Any) -> tuple[Used, float]:
    """Returns what f(*args) used, and the seconds of it that the encoding took: both are of the
    same moments, so their ratio does not depend on the drift of the clock."""
    kind = type(get_encoding(FLAGS.tokenizer))
    original, seconds = kind.encode_to_numpy, []

    def encode_timed(*args: Any, **kwargs: Any) -> np.ndarray:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    kind.encode_to_numpy = encode_timed
    try:
        return measured(f, *args), sum(seconds)
    finally:
        kind.encode_to_numpy = original


# ---------------------------------------------------------------------------------------------
# Ways to tokenize
# ---------------------------------------------------------------------------------------------


def bare_calls(name: str) -> list[Callable[[str], Sequence[int]]]:
    """Returns the calls by which the library alone gives the ids of a text."""
    if name.endswith('.json'):
        import tokenizers

        bare = tokenizers.Tokenizer.from_file(name)
        return [
            lambda text: bare.encode_batch_fast([text], add_special_tokens=False)[0].ids,
            lambda text: bare.encode(text, add_special_tokens=False).ids,
        ]
    enc = get_encoding(name)
    return [
        lambda text: enc.encode_to_numpy(text, disallowed_special=()),
        enc.encode_ordinary,
    ]


def raw(call: Callable[[str], Sequence[int]], texts: list[str]) -> int:
    """Tokenizes texts by the library alone and returns the number of tokens."""
    return sum(len(call(text)) for text in texts)


def faster_raw(texts: list[str]) -> Used:
    """Returns what the faster of the library's two calls used."""
    both = [measured(raw, call, texts) for call in bare_calls(FLAGS.tokenizer)]
    return max(both, key=lambda used: used.rate)


def raw_rate(tokenizer: str, texts: list[str]) -> float:
    """Returns the library's tokens per second, for a process of its own."""
    seconds, n_tokens = common.timed(raw, bare_calls(tokenizer)[0], texts)
    return n_tokens / seconds


def job(folder: str, output: str, workers: int, part_bytes: int = 8 << 20) -> int:
    """Prepares the files of a folder anew, as `python data.py` does, and returns the number of
    tokens."""
    shutil.rmtree(output, ignore_errors=True)
    files = find_files([f'{folder}/*'])
    manifest = prepare(files, Job(output, FLAGS.tokenizer), workers, part_bytes)
    return sum(split['tokens'] for split in manifest['splits'].values())


_naive: dict[str, tiktoken.Encoding] = {}  # of a worker process


def naive_start(tokenizer: str) -> None:
    """Opens the vocabulary of a worker process."""
    _naive['encoding'] = get_encoding(tokenizer)


def naive_encode(text: str) -> list[int]:
    """Returns the tokens of a document and its end."""
    return [*_naive['encoding'].encode_ordinary(text), _naive['encoding'].eot_token]


def naive(folder: str, output: str, workers: int) -> int:
    """Prepares a folder with a pool that gets one document at a time and returns Python lists,
    which become an array. Returns the number of tokens."""
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


# ---------------------------------------------------------------------------------------------
# Preparation
# ---------------------------------------------------------------------------------------------


def one_round(folder: str, sample: list[str], pool: ProcessPoolExecutor) -> dict[str, float]:
    """Returns all figures of the preparation, measured once."""
    raws = [faster_raw(sample)]
    one, tokenizing = tokenizing_seconds(job, f'{folder}/text', f'{folder}/1', 1)
    raws.append(faster_raw(sample))
    two = measured(job, f'{folder}/text', f'{folder}/2', 2)
    start = measured(job, f'{folder}/crumbs', f'{folder}/0', 2, 1)
    raws.append(faster_raw(sample))
    pool_of_two = measured(naive, f'{folder}/text', folder, 2)
    runs = [pool.submit(raw_rate, FLAGS.tokenizer, sample) for _ in range(2)]
    pair = sum(run.result() for run in runs)
    alone = float(np.mean([used.rate for used in raws]))
    cpu_alone = float(np.mean([used.cpu_rate for used in raws]))
    running = two.beyond(start)
    return {
        'raw_tokens_per_second': alone,
        'raw_tokens_per_second_2_processes': pair,
        'job_tokens_per_second_1_worker': one.rate,
        'job_tokens_per_second_2_workers': two.rate,
        'naive_tokens_per_second_2_workers': pool_of_two.rate,
        'start_seconds_2_workers': start.wall,
        'job_share_of_raw_1_worker': one.rate / alone,
        'tokenizing_share_of_job_1_worker': tokenizing / one.wall,
        'job_share_of_raw_per_worker_2_workers': two.rate / alone / 2,
        'beyond_start_share_of_raw_per_worker_2_workers': running.rate / alone / 2,
        'beyond_start_share_of_raw_2_processes': running.rate / pair,
        'job_2_workers_over_1': two.rate / one.rate,
        'beyond_start_2_workers_over_1': running.rate / one.rate,
        'job_over_naive_2_workers': two.rate / pool_of_two.rate,
        'cpu_time_job_share_of_raw_1_worker': one.cpu_rate / cpu_alone,
        'cpu_time_job_share_of_raw_2_workers': two.cpu_rate / cpu_alone,
        'cpu_time_job_over_naive_2_workers': two.cpu_rate / pool_of_two.cpu_rate,
    }


def preparation(folder: str) -> dict[str, float]:
    """Returns the medians over the rounds, of ratios too, and leaves a split in `folder`/1."""
    texts = make_texts(FLAGS.megabytes)
    write_corpus(f'{folder}/text', texts)
    write_corpus(f'{folder}/crumbs', texts[:8])
    # Copies, since the same few strings over and over would lie in the processor's caches.
    sample = [text.encode().decode() for text in texts[: len(texts) // 4]]
    with ProcessPoolExecutor(2, multiprocessing.get_context('spawn')) as pool:
        rounds = [one_round(folder, sample, pool) for _ in range(FLAGS.repeats)]
    return common.medians(rounds)


# ---------------------------------------------------------------------------------------------
# Reading batches
# ---------------------------------------------------------------------------------------------


def loader_seconds(path: str, batch_size: int, seq_len: int) -> float:
    """Returns the seconds per batch over 300 of them, after the data has been read once."""
    loader = Loader(Split(path, 'train'), batch_size, seq_len, seed=0)

    def read() -> None:
        for step in range(300):
            loader.batch_at(step)

    return common.best_seconds({'read': read}, rounds=3)['read'] / 300


def tiny_step() -> tuple[float, int, int]:
    """Returns the seconds of a training step of configs/tiny.py, its batch size and sequence
    length."""
    # Imported here, since the workers of a job import this file.
    from configs import tiny
    from parallel import make_mesh
    from train_step import init_state, make_train_step, put_batch, setup

    common.prepare_devices()
    config = tiny.get_config()
    s = setup(config, make_mesh(config.mesh))
    shape = config.batch_size, config.seq_len + 1
    tokens = np.random.default_rng(0).integers(0, 4096, shape).astype(np.int32)
    batch = put_batch(lambda _, rows: tokens[rows], 0, s)
    state, step, seconds = init_state(s), make_train_step(s), []
    for _ in range(8):
        taken, (state, _) = common.timed_until_ready(step, state, batch)
        seconds.append(taken)
    return min(seconds), config.batch_size, config.seq_len


def main() -> common.Figures:
    with tempfile.TemporaryDirectory() as folder:
        figures: common.Figures = dict(preparation(folder))
        step, batch_size, seq_len = tiny_step()
        batch = loader_seconds(f'{folder}/1', batch_size, seq_len)
    return figures | {
        'loader_tokens_per_second': batch_size * seq_len / batch,
        'tiny_step_seconds': step,
        'loader_share_of_tiny_step': batch / step,
    }


if __name__ == '__main__':
    flags.DEFINE_string('tokenizer', 'vocab/stdlib-4096.tiktoken', 'As for data.py.')
    flags.DEFINE_float('megabytes', 100.0, 'Text of the corpus, in millions of characters.')
    flags.DEFINE_integer('repeats', 3, 'Rounds of all measurements.', lower_bound=1)
    common.run(main)
