"""Rate of reading a Megatron .bin into shards beside `cp`, and the loader's share of a tiny step.

    python benchmarks/token_files_speed.py
    python benchmarks/token_files_speed.py --megabytes=200 --workers=1 --json

The file holds uint16 ids of documents of 200 to 1,800 tokens, each with its end-of-text token. `cp`
and the job, with 1 % of the documents held out, take turns, both from and to files that the
operating system keeps in memory; a job also checks all ids, counts the bytes of their text, reads
back what it has written and waits until it is on the disk. Figures are medians, ratios medians of
the ratios of a round; those by CPU time depend less on what else the machine does. The loader reads
300 batches of configs/tiny.py from the same file without a copy.
"""

import os
import shutil
import subprocess
import tempfile

import common
import numpy as np
from absl import flags
from data_speed import measured, tiny_step

from corpus.direct import direct_splits
from corpus.prepare import Job, prepare
from corpus.token_files import TokenOptions, checked_options, find_token_files
from corpus.token_flat import MEGATRON_MAGIC
from data import Loader
from tokenizer import get_encoding

FLAGS = flags.FLAGS


def write_megatron(prefix: str, n_tokens: int, n_vocab: int, end: int) -> None:
    """Writes a .bin and its .idx as Megatron's IndexedDatasetBuilder does."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(200, 1800, n_tokens // 1000)
    stops = np.cumsum(lengths)
    pattern = rng.integers(0, n_vocab - 1, 1 << 24).astype('<u2')
    pattern[pattern == end] = n_vocab - 1
    ids = np.resize(pattern, stops[-1])
    ids[stops - 1] = end
    ids.tofile(f'{prefix}.bin')
    with open(f'{prefix}.idx', 'wb') as f:
        f.write(MEGATRON_MAGIC + np.array(1, '<u8').tobytes() + b'\x08')
        f.write(np.array([len(lengths), len(lengths) + 1], '<u8').tobytes())
        f.write(lengths.astype('<i4').tobytes() + (2 * (stops - lengths)).astype('<i8').tobytes())
        f.write(np.arange(len(lengths) + 1, dtype='<i8').tobytes())


def job(prefix: str, output: str) -> int:
    """Reads the file into shards, anew, and returns the number of tokens."""
    options = checked_options(TokenOptions('megatron'))
    files = find_token_files([prefix], options)
    manifest = prepare(files, Job(output, FLAGS.tokenizer, tokens=options), FLAGS.workers)
    return sum(split['tokens'] for split in manifest['splits'].values())


def copy(prefix: str, output: str) -> int:
    """Copies the file by `cp` and returns its number of tokens."""
    subprocess.run(['cp', f'{prefix}.bin', output], check=True)
    return os.path.getsize(output) // 2


def one_round(folder: str) -> dict[str, float]:
    """Returns the figures of reading, measured once."""
    prefix, size = f'{folder}/tokens', os.path.getsize(f'{folder}/tokens.bin')
    shutil.rmtree(f'{folder}/out', ignore_errors=True)
    if os.path.exists(f'{folder}/copy'):
        os.unlink(f'{folder}/copy')
    cp = measured(copy, prefix, f'{folder}/copy')
    read = measured(job, prefix, f'{folder}/out')
    return {
        'cp_gigabytes_per_second': size / cp.wall / 1e9,
        'job_gigabytes_per_second': size / read.wall / 1e9,
        'job_over_cp': cp.wall / read.wall,
        'cp_cpu_seconds_per_gigabyte': cp.cpu / size * 1e9,
        'job_cpu_seconds_per_gigabyte': read.cpu / size * 1e9,
    }


def loader_figures(prefix: str) -> dict[str, float]:
    """Returns how long checking the file, opening it again and a batch take."""
    path = f'megatron:{prefix}'
    check, (train, _) = common.timed(direct_splits, path, FLAGS.tokenizer)
    again, (train, _) = common.timed(direct_splits, path, FLAGS.tokenizer)
    step, batch_size, seq_len = tiny_step()
    loader = Loader(train, batch_size, seq_len, seed=0)

    def read() -> None:
        for i in range(300):
            loader.batch_at(i)

    batch = common.best_seconds({'read': read}, rounds=3)['read'] / 300
    return {
        'check_seconds': check,
        'open_again_seconds': again,
        'batch_seconds': batch,
        'tiny_step_seconds': step,
        'loader_share_of_tiny_step': batch / step,
    }


def main() -> common.Figures:
    with tempfile.TemporaryDirectory() as folder:
        os.environ['JAXFORMER_CACHE'] = f'{folder}/cache'
        enc = get_encoding(FLAGS.tokenizer)
        n_tokens = int(FLAGS.megabytes * 1e6) // 2
        write_megatron(f'{folder}/tokens', n_tokens, min(enc.n_vocab, 1 << 16), enc.eot_token)
        rounds = [one_round(folder) for _ in range(FLAGS.repeats)]
        return common.medians(rounds) | loader_figures(f'{folder}/tokens')


if __name__ == '__main__':
    flags.DEFINE_string('tokenizer', 'vocab/stdlib-4096.tiktoken', 'As for data.py.')
    flags.DEFINE_float('megabytes', 1000.0, 'Size of the .bin, in millions of bytes.')
    flags.DEFINE_integer('workers', os.cpu_count(), 'Threads of a job.', lower_bound=1)
    flags.DEFINE_integer('repeats', 3, 'Rounds of copying and reading.', lower_bound=1)
    common.run(main)
