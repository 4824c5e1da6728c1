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
the manifests (corpus/batches.py): training resumes from a step number, on any number of processes,
and each process reads only its own rows.
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
from typing import Any, NamedTuple, TypeVar

import numpy as np
import tiktoken
from absl import flags
from ml_collections import ConfigDict

from config import ConfigError, Phase, divisors, phases, schedule_entries
from corpus.batches import Loader, Mixture, check_sizes
from corpus.direct import DirectSplit, direct_splits, is_direct, parsed_path
from corpus.files import KINDS, find_files, split_inputs
from corpus.inspection import inspect
from corpus.order import whole_shares
from corpus.packing import PackedWindows
from corpus.prepare import Job, prepare
from corpus.records import Bad
from corpus.shards import CACHE_BYTES, Split, read_manifest
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

T = TypeVar('T')


# ---------------------------------------------------------------------------------------------
# Training batches
# ---------------------------------------------------------------------------------------------


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
        check_sizes(batch_size, seq_len)
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


def schedule_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for schedules of batch_size and seq_len that cannot be kept."""
    for name in ('batch_size', 'seq_len'):
        try:
            values = [value for _, value in schedule_entries(name, config.schedule[name])]
        except ConfigError as error:
            yield str(error)
            continue
        written = f'schedule.{name}={tuple(config.schedule[name])}'
        if 0 in values:
            yield f'{written} holds a 0; use 1 or more'
        elif values and max(values) != config[name]:
            yield (
                f'{written} goes up to {max(values)}, and {name}={config[name]}, which evaluation '
                f'takes, is the largest one; use {name}={max(values)}'
            )
        uneven = [x for x in dict.fromkeys(values) if x and config[name] % x]
        if name == 'seq_len' and uneven:
            yield (
                f'{written} holds {uneven[0]}, which does not divide seq_len={config.seq_len}, of '
                f'whose windows shorter rows are parts; use one of {divisors(config.seq_len)}'
            )


def packing_errors(config: ConfigDict) -> Iterator[str]:
    """Yields errors for choices that do not go with data.packing."""
    d = config.data
    if d.packing != 'best_fit':
        if d.max_documents:
            yield (
                f'data.max_documents={d.max_documents} limits the documents of packed windows, and '
                f"data.packing={d.packing!r}; use 0, or 'best_fit'"
            )
        return
    if not d.isolate_documents:
        yield (
            "data.packing='best_fit' puts documents into windows that have nothing to do with each "
            'other, and data.isolate_documents=False lets attention cross their borders; use True'
        )
    if config.schedule.seq_len:
        yield (
            f"data.packing='best_fit' keeps documents whole, and schedule.seq_len="
            f"{tuple(config.schedule.seq_len)} cuts windows; use data.packing='stream', or no "
            f'schedule.seq_len (one of batch_size goes with both)'
        )


class Source(NamedTuple):
    """One source of the training data, with its own evaluation set."""

    name: str
    share: float  # of the training rows
    train: Split | DirectSplit
    evaluation: EvaluationSet | None  # None: no document was held out
    packed: PackedWindows | None = None  # of `train`; None: a plain stream


def open_sources(
    sources: Sequence[tuple[str, str, float]],
    tokenizer: str,
    batch_size: int,
    seq_len: int,
    seed: int,
    eval_batches: int,
    packing: str = 'stream',
    max_documents: int = 0,
    phases: Sequence[Phase] = (),
) -> tuple[Loader | Mixture, list[Source]]:
    """Opens (name, path, weight) sources: their training stream, and their evaluation sets.

    An evaluation set takes at most `eval_batches` batches; 0 takes its whole validation split. A
    source without validation documents has none; the others are plain streams, whatever the
    `packing` of the training data. The path 'stdlib' stands for Python's standard library, prepared
    with `tokenizer`, and one as 'megatron:PREFIX' for token files as they lie.
    """
    names, paths, weights = zip(*sources, strict=True)
    paths = [stdlib_corpus(tokenizer) if path == 'stdlib' else path for path in paths]
    splits = [_open_splits(path, tokenizer, CACHE_BYTES // len(paths)) for path in paths]
    train = [split for split, _ in splits]
    packed: list[PackedWindows | None] = [None] * len(train)
    if packing == 'best_fit':
        packed = [PackedWindows(split, seq_len, max_documents) for split in train]
    if len(sources) == 1:
        loader = Loader(train[0], batch_size, seq_len, seed, packed[0], phases)
    else:
        loader = Mixture(train, weights, batch_size, seq_len, seed, packed, phases)
    counts = whole_shares(weights)
    opened = []
    for name, count, (split, validation), windows in zip(
        names, counts, splits, packed, strict=True
    ):
        evaluation = None
        if validation:
            evaluation = EvaluationSet(validation, batch_size, seq_len, eval_batches)
        opened.append(Source(name, count / sum(counts), split, evaluation, windows))
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


def open_data(
    config: ConfigDict, training: bool = True
) -> tuple[Loader | Mixture, list[Source], tiktoken.Encoding]:
    """Opens a config's data: the training stream, its sources with evaluation sets, the tokenizer.

    Where it is not for `training`, nothing is packed, which can take a while.
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
        d.packing if training else 'stream',
        d.max_documents,
        phases(config),
    )
    without = [p for (_, p, _), source in zip(named, sources, strict=True) if not source.evaluation]
    if without and config.eval.every:
        remedy = (
            'name files by validation=FILES or a larger validation_share= behind the path'
            if all(map(is_direct, without))
            else 'prepare the data again, into another folder, with a --validation_share above 0'
        )
        raise ConfigError(
            f'eval.every={config.eval.every}, but nothing is held out for validation in '
            f'{", ".join(without)}: use --config.eval.every=0, or {remedy}'
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
        'input', None, f'Paths, folders, globs, URLs, also as words: {" ".join(KINDS)}.'
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
    flags.DEFINE_string('text_field', 'text', 'Field of the text; doc.text: nested.')
    flags.DEFINE_enum(
        'format', None, list(FORMATS), 'Files of token ids instead of text, written by others.'
    )
    flags.DEFINE_string(
        'token_field', '', 'Column of token ids; by default tokens for mds, else input_ids.'
    )
    flags.DEFINE_string('token_dtype', '', 'Type of ids, for nanogpt and for bytes in mds: uint16.')
    flags.DEFINE_integer(
        'end_of_text',
        None,
        "Id that separates documents in the files, if not the vocabulary's own.",
        lower_bound=0,
    )
    flags.DEFINE_enum(
        'borders',
        '',
        ['', *BORDERS],
        'A document is a record, or what lies between end-of-text tokens across records.',
    )
    flags.DEFINE_float('max_bad_share', 0.001, 'Share of bad records above which the job stops.')
    command.DEFINE_path('inspect', None, 'Prepared folder or URL to verify and describe.')
    flags.DEFINE_integer('samples', 3, 'Documents that --inspect shows.', lower_bound=0)
    rare = ('token_field', 'token_dtype', 'end_of_text', 'borders', 'max_bad_share', 'samples')
    command.mark_rare(*rare)


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
    end = -1 if args.end_of_text is None else args.end_of_text
    options = TokenOptions(args.format or '', args.token_field, args.token_dtype, end, args.borders)
    if args.format:
        if args.text_field != 'text' or args.extensions or args.as_text:
            raise ConfigError(
                '--text_field, --extensions and --as_text are of text: leave them out, or --format'
            )
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
