"""The speed of packing documents into windows, and of reading a batch of packed windows.

    python benchmarks/packing_speed.py
    python benchmarks/packing_speed.py --documents=10000000 --seq_len=4096 --max_documents=16

The lengths are drawn from a log-normal distribution of the given mean, as those of web pages are,
roughly. `read_seconds` is the time of a batch of 64 packed windows, over arrays in memory, so that
what counts is the putting together; `padding` is the share of positions without a target, and
`bytes_a_document` what is held of the packing. All run in one thread, so seconds are of CPU time,
which other work on the machine changes little.
"""

import time

import common
import numpy as np
from absl import flags

from corpus.batches import Loader
from corpus.packing import PackedWindows, pack

FLAGS = flags.FLAGS
BATCH = 64


class InMemory:
    """A split of documents of these lengths: of one id, and the end of each."""

    end_of_text = 0

    def __init__(self, lengths: np.ndarray):
        self._lengths, self.n_tokens = lengths, int(lengths.sum())
        self._tokens = np.ones(self.n_tokens, np.uint16)
        self._tokens[np.cumsum(lengths) - 1] = 0

    def document_lengths(self) -> np.ndarray:
        return self._lengths

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        out = np.full((len(starts), length), -1, np.int32)
        for row, start in zip(out, starts.tolist(), strict=True):
            found = self._tokens[start : start + length]
            row[: len(found)] = found
        return out


def drawn_lengths(rng: np.random.Generator, n: int) -> np.ndarray:
    drawn = rng.lognormal(np.log(FLAGS.mean) - 0.5, 1.0, n)
    return np.maximum(2, drawn).astype(np.int64)


def measure() -> common.Figures:
    rng = np.random.default_rng(0)
    lengths = drawn_lengths(rng, FLAGS.documents)
    started = time.process_time()
    pieces = pack(lengths, FLAGS.seq_len, FLAGS.max_documents)
    seconds = time.process_time() - started
    held = sum(x.nbytes for x in pieces)
    del pieces
    few = InMemory(drawn_lengths(rng, min(FLAGS.documents, 100_000)))
    packed = PackedWindows(few, FLAGS.seq_len, FLAGS.max_documents)
    loader = Loader(few, BATCH, FLAGS.seq_len, 0, packed)
    reads = []
    for step in range(20):
        started = time.process_time()
        loader.batch_at(step)
        reads.append(time.process_time() - started)
    return {
        'documents_per_second': FLAGS.documents / seconds,
        'seconds': seconds,
        'bytes_a_document': held / FLAGS.documents,
        'padding': packed.padding,
        'read_seconds': min(reads),
    }


if __name__ == '__main__':
    flags.DEFINE_integer('documents', 1 << 20, 'Documents to pack.', lower_bound=1)
    flags.DEFINE_integer('mean', 1000, 'Their mean length in tokens.', lower_bound=2)
    flags.DEFINE_integer('seq_len', 1024, 'Targets of a window.', lower_bound=1)
    flags.DEFINE_integer('max_documents', 0, 'Most documents of a window; 0: any.', lower_bound=0)
    common.run(measure)
