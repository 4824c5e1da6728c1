"""Text to token shards, as a command; token shards to batches, as a library.

    python data.py --input=input.txt --tokenizer=vocab/stdlib-4096.tiktoken --output=DIR
    python data.py --input='hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet' \\
        --tokenizer=cl100k_base --output=gs://bucket/fineweb-edu --workers=64
    python data.py --input=FILE.bin --format=megatron --tokenizer=gpt2 --output=DIR
    python data.py --inspect=DIR

The command reads documents (corpus/documents.py), tokenizes them in parts (corpus/prepare.py) and
writes token shards (corpus/shards.py). It also takes the token ids that other codebases have
written (corpus/token_files.py). An end-of-text token follows each document. A document's
split depends on its id alone, unless that leaves a split empty, and the bytes of the output on the
input alone. The same command resumes a job that was killed.

`Loader.batch_at(step)` and `Mixture.batch_at(step)` are pure functions of the seed, the step and
the manifests: training resumes from a step number, on any number of processes, and each process
reads only its own rows.
"""

if __name__ == '__main__':  # before the imports that take a second
    from machine import startup

    startup.quick_interrupts()

import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tiktoken
from absl import flags
from ml_collections import ConfigDict

from config import ConfigError
from corpus.direct import DirectSplit, direct_splits, is_direct, parsed_path
from corpus.files import KINDS, find_files, split_inputs
from corpus.inspection import inspect
from corpus.prepare import Job, prepare
from corpus.records import Bad
from corpus.shards import CACHE_BYTES, Split, mix, read_manifest
from corpus.stdlib import stdlib_corpus
from corpus.tally import binary_note
from corpus.token_files import (
    BORDERS,
    FORMATS,
    TokenOptions,
    checked_options,
    find_token_files,
)
from corpus.workers import WorkerError
from machine import command
from machine.progress import patiently
from storage.stores import open_store

MAX_PERIOD = 10_000  # at most so many samples, then the order of a mixture's sources repeats

T = TypeVar('T')


# ---------------------------------------------------------------------------------------------
# Training batches
# ---------------------------------------------------------------------------------------------


class Loader:
    """Training batches of one split.

    A row is a window of seq_len + 1 tokens; windows start every seq_len tokens, so the last target
    of one is the first input of the next. Up to seq_len - 1 tokens at the end of the stream, which
    fill no window, are not used. Each epoch takes all windows in a new seeded permutation.
    """

    def __init__(self, split: Split, batch_size: int, seq_len: int, seed: int):
        """`batch_size` is the number of rows of the global batch, `seq_len` of targets per row.

        Raises ConfigError if the split is shorter than a window.
        """
        _check_sizes(batch_size, seq_len)
        if seed < 0:
            raise ValueError(f'the seed of the data order must be 0 or more, but is {seed}')
        self.n_windows = (split.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise ConfigError(
                f'a window needs seq_len + 1 = {seq_len + 1} tokens, but the split has '
                f'{split.n_tokens}: prepare more text or take a smaller seq_len'
            )
        self.split, self.batch_size, self.seq_len, self.seed = split, batch_size, seq_len, seed
        self.n_tokens = split.n_tokens

    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the given rows of the global batch of this step, int32 [rows, seq_len + 1]."""
        return self.windows(step * self.batch_size + np.arange(self.batch_size)[rows])

    def windows(self, sample: np.ndarray) -> np.ndarray:
        """Returns the windows with these sample numbers, int32 [len(sample), seq_len + 1].

        Samples are numbered from 0 through all epochs, in the order in which they are trained on.
        """
        epoch, index = np.divmod(sample, self.n_windows)
        window = np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            window[here] = permute(index[here], self.n_windows, self.seed, int(e))
        return self.split.read_windows(window * self.seq_len, self.seq_len + 1)


class Mixture:
    """Training batches of several sources, each in the order that a Loader of it alone has.

    Sample i of the stream, a row of batch i // batch_size, comes from the source that
    `source_order` assigns to it. Among any n consecutive samples, a source's number differs from
    its share of n by less than 2; among any `period` consecutive samples it is exact.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float],
        batch_size: int,
        seq_len: int,
        seed: int,
    ):
        """`weights` are in the ratio of the sources' shares of the rows.

        Raises ConfigError if a weight is not positive, or if the vocabularies differ.
        """
        if not splits or len(splits) != len(weights):
            raise ValueError(
                f'each source has a weight, but there are {len(splits)} sources and '
                f'{len(weights)} weights'
            )
        if len({split.fingerprint for split in splits}) > 1:
            names = ', '.join(split.tokenizer for split in splits)
            raise ConfigError(
                f'the sources of a mixture share one vocabulary, but were prepared with {names}: '
                'prepare them with the same one'
            )
        self.loaders = [Loader(split, batch_size, seq_len, seed) for split in splits]
        self.batch_size, self.n_tokens = batch_size, sum(split.n_tokens for split in splits)
        counts = whole_shares(weights)
        self.period, self._counts = sum(counts), np.array(counts)
        self._source = source_order(counts)
        chosen = self._source[:, None] == np.arange(len(counts))
        # For each slot of a period, the number of earlier slots of the same source.
        self._earlier = (np.cumsum(chosen, axis=0) - chosen)[chosen]

    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the given rows of the global batch of this step, int32 [rows, seq_len + 1]."""
        sample = step * self.batch_size + np.arange(self.batch_size)[rows]
        period, slot = np.divmod(sample, self.period)
        source = self._source[slot]
        nth = period * self._counts[source] + self._earlier[slot]
        out = np.empty((len(sample), self.loaders[0].seq_len + 1), np.int32)
        for i in np.unique(source):
            out[source == i] = self.loaders[i].windows(nth[source == i])
        return out


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Returns whole numbers in the ratio of the weights, exact to 1 part in MAX_PERIOD.

    Raises ConfigError if a weight is not positive, or too small a part of their sum.
    """
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(
            f'the weights of a mixture are finite and above 0, but are {list(weights)}: leave a '
            'source of weight 0 out'
        )
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [math.floor(share * MAX_PERIOD) for share in shares]
    most_cut = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_PERIOD)
    for i in most_cut[: MAX_PERIOD - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise ConfigError(
            f'a weight of a mixture is at least {1 / MAX_PERIOD:g} of their sum, but they are '
            f'{list(weights)}: leave the smallest out or raise it'
        )
    return counts


def source_order(counts: Sequence[int]) -> np.ndarray:
    """Returns an order of the indices i in which i occurs counts[i] times, int64 [sum(counts)].

    Among the first n places, for any n, the number of places of i differs from
    n * counts[i] / sum(counts) by less than 1.

    Tijdeman's algorithm (The chairman assignment problem, 1980): each place goes, among the indices
    that are behind by at least 1 / (2k - 2) of a place (k = len(counts)), to the one with the
    earliest deadline.
    """
    k, period = len(counts), sum(counts)
    weight, unit = np.array(counts, np.int64), max(1, 2 * k - 2)
    behind = np.zeros(k, np.int64)  # in units of 1 / (period * unit) places
    out = np.empty(period, np.int64)
    for n in range(period):
        behind += weight * unit
        deadline = (period * (unit - 1) - behind) / weight
        out[n] = np.argmin(np.where(behind >= period, deadline, np.inf)) if k > 1 else 0
        behind[out[n]] -= period * unit
    return out


def _check_sizes(batch_size: int, seq_len: int) -> None:
    """Raises ValueError for sizes that the rules of a config exclude."""
    if batch_size < 1 or seq_len < 1:
        raise ValueError(
            f'batch_size and seq_len must be 1 or more, but are {batch_size} and {seq_len}'
        )


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the images of `index` under a permutation of 0..n-1 that seed and epoch choose.

    int64, in the shape of `index`. A Feistel network permutes 0..4**half-1, up to the next power
    of 4. Numbers that it sends to n or beyond go through it again until they are below n, which
    makes it a permutation of 0..n-1 (cycle walking).
    """
    half = max(1, math.ceil((n - 1).bit_length() / 2))
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(6, np.uint64)
    x = np.array(index, np.uint64)
    beyond = np.ones(x.shape, bool)
    while beyond.any():
        left, right = x[beyond] >> np.uint64(half), x[beyond] & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        x[beyond] = left << np.uint64(half) | right
        beyond = x >= n
    return x.astype(np.int64)


def prefetch(fn: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yields fn(start) to fn(stop - 1), computed up to `depth` ahead in a background thread.

    Raises an exception of `fn` in place of its result. The thread ends with the generator: after
    the last result, after an exception, or when the generator is closed.
    """
    thread = ThreadPoolExecutor(1, 'prefetch')
    pending: deque = deque()
    try:
        for i in range(start, stop):
            pending.append(thread.submit(fn, i))
            if len(pending) > depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------
# Evaluation batches
# ---------------------------------------------------------------------------------------------


class EvaluationSet:
    """Evaluation batches of one split: consecutive windows in its order, always the same.

    Each token but the first is a target once. The last batch is padded with -1, which is no token,
    where the tokens of a row or the rows run out.
    """

    def __init__(self, split: Split, batch_size: int, seq_len: int, limit: int):
        """Takes at most `limit` batches; 0 takes the whole split.

        Raises ConfigError if the split has nothing to predict.
        """
        _check_sizes(batch_size, seq_len)
        if limit < 0:
            raise ValueError(f'limit counts batches, 0 for all of them, but is {limit}')
        if split.n_tokens < 2:
            raise ConfigError(
                f'the split has {split.n_tokens} token and nothing to predict: prepare more text'
            )
        n_windows = math.ceil((split.n_tokens - 1) / seq_len)
        self.n_batches = math.ceil(n_windows / batch_size)
        if limit:
            self.n_batches = min(self.n_batches, limit)
        self.split, self.batch_size, self.seq_len = split, batch_size, seq_len

    def batch_at(self, i: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the given rows of batch i < n_batches, int32 [rows, seq_len + 1]."""
        if not 0 <= i < self.n_batches:
            raise ValueError(f'there is no batch {i}, the batches are 0 to {self.n_batches - 1}')
        window = i * self.batch_size + np.arange(self.batch_size)[rows]
        batch = self.split.read_windows(window * self.seq_len, self.seq_len + 1)
        # A row that would hold the stream's last token alone has no target.
        batch[batch[:, 1] < 0] = -1
        return batch


# ---------------------------------------------------------------------------------------------
# The data of a config
# ---------------------------------------------------------------------------------------------


def source_errors(config: ConfigDict) -> Iterator[str]:
    """Yields the rules that data.path and data.sources break, each with its values and remedy."""
    d = config.data
    if not d.path and not d.sources:
        yield "data.path is empty; use a folder that data.py wrote, or 'stdlib'"
    if d.path and d.sources:
        yield f'data.path={d.path!r} and data.sources are both set; leave one of them empty'
    yield from _path_errors(d.path)
    form = "use ((name, path, weight), ...), as in (('web', 'tokens/web', 0.7), ...)"
    for source in d.sources:
        if not isinstance(source, tuple) or len(source) != 3:
            yield f'data.sources holds {source!r}; {form}'
            return
        name, path, weight = source
        if not all(isinstance(text, str) and text for text in (name, path)):
            yield f'data.sources holds {source!r}, whose name or path is no text; {form}'
        yield from _path_errors(path)
        if not isinstance(weight, int | float) or not 0 < weight < float('inf'):
            yield f'data.sources holds {source!r}, whose weight is not above 0; {form}'
    names = [source[0] for source in d.sources]
    if len(set(names)) < len(names):
        yield f'data.sources names {names} twice; use a name of its own for each source'


def _path_errors(path: Any) -> Iterator[str]:
    """Yields what is wrong with a path of token files as they lie, 'megatron:PREFIX,...'."""
    if isinstance(path, str) and is_direct(path):
        try:
            parsed_path(path)
        except ConfigError as error:
            yield f'data.path={path!r}: {error}'


class Source(NamedTuple):
    """One source of the training data, with its own evaluation set."""

    name: str
    share: float  # of the training rows
    train: Split | DirectSplit
    evaluation: EvaluationSet | None  # None: no document was held out


def open_sources(
    sources: Sequence[tuple[str, str, float]],
    tokenizer: str,
    batch_size: int,
    seq_len: int,
    seed: int,
    eval_batches: int,
) -> tuple[Loader | Mixture, list[Source]]:
    """Opens (name, path, weight) sources: their training stream, and their evaluation sets.

    An evaluation set takes at most `eval_batches` batches; 0 takes its whole validation split. A
    source without validation documents has none. The path 'stdlib' stands for Python's standard
    library, prepared with `tokenizer`, and one as 'megatron:PREFIX' for token files as they lie.
    """
    names, paths, weights = zip(*sources, strict=True)
    paths = [stdlib_corpus(tokenizer) if path == 'stdlib' else path for path in paths]
    splits = [_open_splits(path, tokenizer, CACHE_BYTES // len(paths)) for path in paths]
    train = [split for split, _ in splits]
    if len(sources) == 1:
        loader = Loader(train[0], batch_size, seq_len, seed)
    else:
        loader = Mixture(train, weights, batch_size, seq_len, seed)
    counts = whole_shares(weights)
    opened = []
    for name, count, (split, validation) in zip(names, counts, splits, strict=True):
        evaluation = None
        if validation:
            evaluation = EvaluationSet(validation, batch_size, seq_len, eval_batches)
        opened.append(Source(name, count / sum(counts), split, evaluation))
    return loader, opened


def _open_splits(
    path: str, tokenizer: str, cache_bytes: int
) -> tuple[Split | DirectSplit, Split | DirectSplit | None]:
    """Opens the training and the validation split of a path; None if nothing is held out."""
    if is_direct(path):
        return direct_splits(path, tokenizer)
    train = Split(path, 'train', cache_bytes)
    if not read_manifest(open_store(path), path)['splits']['validation']['tokens']:
        return train, None
    return train, Split(path, 'validation')


def open_data(config: ConfigDict) -> tuple[Loader | Mixture, list[Source], tiktoken.Encoding]:
    """Opens a config's data: the training stream, its sources with evaluation sets, the tokenizer.

    Raises ConfigError if the data cannot be read, if its vocabulary is larger than
    model.vocab_size, or if eval.every is above 0 and a source has no validation documents.
    """
    d = config.data
    named = d.sources or (('data', d.path, 1.0),)
    loader, sources = open_sources(
        named,
        d.tokenizer,
        config.batch_size,
        config.seq_len,
        config.seed,
        config.eval.batches,
    )
    without = [p for (_, p, _), source in zip(named, sources, strict=True) if not source.evaluation]
    if without and config.eval.every:
        raise ConfigError(
            f'eval.every={config.eval.every}, but nothing is held out for validation in '
            f'{", ".join(without)}: use --config.eval.every=0, or prepare the data again, into '
            'another folder, with a --validation_share above 0'
        )
    encoding = sources[0].train.encoding()
    if encoding.n_vocab > config.model.vocab_size:
        raise ConfigError(
            f'model.vocab_size={config.model.vocab_size} is below the {encoding.n_vocab} tokens of '
            f'{encoding.name}; use {-(-encoding.n_vocab // 128) * 128}'
        )
    return loader, sources, encoding


def vocabulary_note(vocab_size: int, encoding: tiktoken.Encoding) -> str:
    """Returns a line that says how much of the embedding no token uses; '' if it is little."""
    unused = 1 - encoding.n_vocab / vocab_size
    if unused < 0.25:
        return ''
    return (
        f'model.vocab_size is {vocab_size:,} and the tokenizer {encoding.name} has '
        f'{encoding.n_vocab:,} ids: {unused:.0%} of the embedding is unused; '
        f'--config.model.vocab_size={-(-encoding.n_vocab // 128) * 128} would do'
    )


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def _define_flags() -> None:
    flags.DEFINE_multi_string(
        'input',
        None,
        f'Paths, folders, globs, URLs: {" ".join(KINDS)}; several with commas, or as words.',
    )
    flags.DEFINE_list('extensions', [], 'Endings of further files that are text: rst,c.')
    flags.DEFINE_boolean('as_text', False, 'Read files of any ending, but binary ones, as text.')
    command.DEFINE_path(
        'tokenizer', None, "tiktoken's name, 'bytes', a .tiktoken or tokenizer.json."
    )
    command.DEFINE_path('output', None, 'Folder or URL to write.')
    flags.DEFINE_float('validation_share', 0.01, 'Share of documents held out.')
    flags.DEFINE_integer('workers', os.cpu_count(), 'Number of processes.', lower_bound=1)
    flags.DEFINE_string('ray', None, "Address of a Ray cluster, or 'auto' or 'local'.")
    flags.DEFINE_string('text_field', 'text', 'Field of the text; doc.text: inside another.')
    flags.DEFINE_enum(
        'format', None, list(FORMATS), 'Files of token ids instead of text, written by others.'
    )
    flags.DEFINE_string(
        'token_field', '', 'Column of token ids; by default tokens for mds, else input_ids.'
    )
    flags.DEFINE_string('token_dtype', '', 'Type of ids, for nanogpt and for bytes in mds: uint16.')
    flags.DEFINE_integer(
        'end_of_text', -1, "Id that separates documents in the files, if not the vocabulary's own."
    )
    flags.DEFINE_enum(
        'borders',
        '',
        ['', *BORDERS],
        'A document is a record, or what lies between end-of-text tokens across records.',
    )
    flags.DEFINE_float('max_bad_share', 0.001, 'Bad records that stop the job.')
    command.DEFINE_path('inspect', None, 'Prepared folder or URL to verify and describe.')
    flags.DEFINE_integer('samples', 3, 'Documents that --inspect shows.', lower_bound=0)


def main(words: list[str]) -> None:
    args = flags.FLAGS
    with command.messages(OSError, WorkerError):  # OSError: a file, or RemoteError
        if args.inspect:
            if words:
                command.refuse(words)
            damage = inspect(args.inspect, args.samples)
            sys.exit('\n'.join(damage) or None)
        inputs = [*split_inputs(args.input or []), *words]
        if not (inputs and args.tokenizer and args.output):
            raise ConfigError('give --input, --tokenizer and --output to prepare, or --inspect')
        tokens = _token_options(args)
        job = Job(
            args.output,
            args.tokenizer,
            args.validation_share,
            args.text_field,
            args.max_bad_share,
            tokens,
        )
        with patiently(f'looking for the files of {", ".join(inputs)} ...'):
            if tokens:
                files = find_token_files(inputs, tokens)
            else:
                files = find_files(inputs, args.extensions, args.as_text)
        manifest = prepare(files, job, args.workers, progress=True, ray=args.ray)
    for name, split in manifest['splits'].items():
        print(
            f'{args.output}/{name}: {split["documents"]:,} documents, {split["tokens"]:,} tokens, '
            f'{split["bytes"]:,} bytes of text'
        )
    if note := held_out(manifest):
        print(note)
    read = manifest['input']
    print(f'{read["empty"]:,} empty documents left out, {read["bad"]:,} bad records')
    if 'binary' in read:
        print(binary_note(read['binary']))
    for report in read['reports'][:10]:
        print('  ' + Bad(**report).message(report['file']))


def _token_options(args: Any) -> TokenOptions | None:
    """Returns how the input's token ids are read, None for text. Raises ConfigError for flags that
    do not go together."""
    options = TokenOptions(
        args.format or '', args.token_field, args.token_dtype, args.end_of_text, args.borders
    )
    if args.format:
        if args.text_field != 'text' or args.extensions:
            raise ConfigError('--text_field and --extensions are of text: leave them, or --format')
        return checked_options(options)
    if options != TokenOptions(''):
        raise ConfigError(
            '--token_field, --token_dtype, --end_of_text and --borders go with --format: add it, '
            'or leave them out'
        )
    return None


def held_out(manifest: dict[str, Any]) -> str:
    """Returns a line on what a manifest's validation split is, if that is unusual, else ''."""
    share, moved = manifest['validation_share'], manifest.get('moved')
    if not manifest['splits']['validation']['tokens']:
        return (
            f'nothing is held out for validation (--validation_share={share:g}): train with '
            '--config.eval.every=0'
        )
    if not moved:
        return ''
    if moved['tail']:
        return f'held out for validation: the end of {moved["document"]}, the only document'
    to = 'held out for validation' if moved['to'] == 'validation' else 'kept for training'
    return (
        f'{to}: {moved["document"]}, since of so few documents --validation_share={share:g} gives '
        'none'
    )


if __name__ == '__main__':
    startup.hear_interrupts()
    command.run(main, _define_flags, takes_words=True)
