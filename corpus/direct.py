"""Training data straight from the token files of Megatron-LM, llm.c and nanoGPT, without a copy.

    --config.data.path=megatron:FOLDER/prefix
    --config.data.path='llmc:fineweb_train_*.bin,validation=fineweb_val_*.bin'
    --config.data.path=nanogpt:train.bin,validation=val.bin,dtype=uint16

Several files are named by a glob, or one after the other with commas.

The stream of a `DirectSplit` is the one that `python data.py --format=...` would write: the same
documents in the same order, each followed by one end-of-text token, wherever and whether at all
the files have it. But no document is moved to a split that the hashes leave empty. Files are
mapped into memory; a table says where each document lies.

Before the first use all ids are checked and the table is made, which reads the files once. It is
kept in the cache folder under the paths, sizes and times of the files, so that another start reads
the table alone. The digest of a split is that of all its tokens.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tiktoken

from config import ConfigError
from corpus.files import File, split_inputs
from corpus.hashes import digest_of
from corpus.records import Piece
from corpus.shards import UnreadableError
from corpus.token_documents import (
    byte_lengths,
    count_bytes,
    cut,
    hashes,
    held_out,
    in_place,
    runs,
    split_bad,
)
from corpus.token_files import (
    FORMATS,
    TokenOptions,
    blocks,
    checked_options,
    cut_tokens,
    find_token_files,
)
from corpus.token_flat import Flat
from machine.progress import track
from storage.stores import cache_folder, expanded
from tokenizer import END_OF_TEXT, cached_token_bytes, end_of_text, fingerprint, get_encoding

DIRECT = ('megatron', 'llmc', 'nanogpt')  # formats whose tokens lie in one piece, in local files
OPTIONS = ('validation', 'validation_share', 'dtype', 'end_of_text', 'borders')
PART_BYTES = 32 << 20  # that a thread checks at a time
TABLE_VERSION = 1
SHARE = 0.01  # of the documents held out, as data.py's


class DirectPath(NamedTuple):
    """The parts of a path 'FORMAT:FILES,option=value,...'."""

    files: str
    validation: str  # files of the validation split; '': a share of the documents
    share: float
    options: TokenOptions


def is_direct(path: str) -> bool:
    """Returns whether a path names token files as they lie."""
    name, colon, rest = path.partition(':')
    return name in DIRECT and bool(colon) and not rest.startswith('//')


def parsed_path(path: str) -> DirectPath:
    """Returns the parts of a path. Raises ConfigError for options that are unknown or wrong."""
    name, _, rest = path.partition(':')
    files, *given = rest.split(',')
    values: dict[str, str] = {}
    for part in given:
        key, equals, value = part.partition('=')
        if equals and key in OPTIONS:
            values[key] = value
        elif values or re.match('[a-z_]+=', part):
            raise ConfigError(f'{part!r} is no option; the options are {", ".join(OPTIONS)}')
        else:
            files += f',{part}'  # of a file's name
    if not files:
        raise ConfigError(f'no file is named; use {name}:FILES')
    if 'validation' in values and 'validation_share' in values:
        raise ConfigError('validation= and validation_share= are both given; leave one out')
    try:
        share = float(values.get('validation_share', SHARE))
        end = int(values.get('end_of_text', -1))
    except ValueError as error:
        raise ConfigError(f'an option is no number ({error})') from error
    if not 0 <= share < 1:
        raise ConfigError(f'validation_share lies in [0, 1), but is {share}: use 0.01, or 0')
    options = TokenOptions(name, '', values.get('dtype', ''), end, values.get('borders', ''))
    validation = values.get('validation', '')
    return DirectPath(
        expanded(files),
        expanded(validation),
        0.0 if validation else share,
        checked_options(options),
    )


def direct_splits(path: str, tokenizer: str) -> tuple['DirectSplit', 'DirectSplit | None']:
    """Opens the training and the validation split of a path; None if nothing is held out.

    Raises ConfigError if the files are not what the format says, or an id is beyond the vocabulary.
    """
    parsed, enc = parsed_path(path), get_encoding(tokenizer)
    if end_of_text(enc) is None:
        raise ConfigError(
            f'data.tokenizer={tokenizer} has no {END_OF_TEXT}, which ends each document: name '
            'another one'
        )
    table = _table(parsed.files, parsed.share, parsed.options, tokenizer, enc)
    tables = {'train': table, 'validation': table}
    if parsed.validation:
        tables['validation'] = _table(parsed.validation, 0.0, parsed.options, tokenizer, enc)
    digest = digest_of([tables[name].digest for name in ('train', 'validation')])
    splits = {}
    for name, found in tables.items():
        chosen = found.in_validation == (name == 'validation' and not parsed.validation)
        if chosen.any():
            splits[name] = DirectSplit(path, name, found, chosen, tokenizer, enc, digest)
    if 'train' not in splits:
        raise ConfigError(
            f'data.path={path!r} has no document for training: it has '
            f'{len(table.starts):,} in all; change validation_share={parsed.share}'
        )
    return splits['train'], splits.get('validation')


# ---------------------------------------------------------------------------------------------
# The table of documents
# ---------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """The places of the documents of files, in order."""

    flats: list[Flat]
    files: np.ndarray  # int32 [n], index of the document's file
    starts: np.ndarray  # int64 [n], its first token in the file
    lengths: np.ndarray  # int64 [n], without its end
    ended: np.ndarray  # bool [n], the vocabulary's end-of-text token lies behind it in the file
    in_validation: np.ndarray  # bool [n]
    n_bytes: np.ndarray  # int64 [2], bytes of text for training and for validation
    digest: str


ARRAYS = ('files', 'starts', 'lengths', 'ended', 'in_validation', 'n_bytes')


def _table(
    pattern: str, share: float, options: TokenOptions, tokenizer: str, enc: tiktoken.Encoding
) -> Table:
    """Returns the table of the files of a pattern, from the cache if they have not changed."""
    patterns = split_inputs([pattern])
    if '://' in pattern:
        raise ConfigError(
            f'{pattern} is not local, so it cannot be mapped into memory: copy it here, or prepare '
            f'it with python data.py --format={options.format}'
        )
    files = find_token_files(patterns, options, 'data.path: ')
    flats = [FORMATS[options.format].flat(file, options) for file in files]
    places = [(os.path.abspath(f.path), f.name, f.size, f.version) for f in files]
    about = [TABLE_VERSION, share, dataclasses.astuple(options), fingerprint(enc)]
    path = os.path.join(cache_folder(), f'tokens-{digest_of([about, places])}.npz')
    unreadable = contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)
    with unreadable, np.load(path) as kept:
        return Table(flats, *(kept[name] for name in ARRAYS), str(kept['digest']))
    table = _made_table(files, flats, share, options, tokenizer, enc)
    _keep(path, table)
    return table


def _made_table(
    files: Sequence[File],
    flats: list[Flat],
    share: float,
    options: TokenOptions,
    tokenizer: str,
    enc: tiktoken.Encoding,
) -> Table:
    """Reads all files, checks their ids, and returns the table of their documents."""
    number = {file: i for i, file in enumerate(files)}
    lengths = byte_lengths(cached_token_bytes(enc), options.ends(enc.eot_token))
    pieces = [piece for part in cut_tokens(files, options, PART_BYTES) for piece in part]
    check = functools.partial(
        _checked_piece, number=number, share=share, options=options, tokenizer=tokenizer, enc=enc,
        lengths=lengths,
    )  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count() or 1, 'check') as threads:
        found = list(track(threads.map(check, pieces), 'checking token files', len(pieces)))
    columns = zip(*(arrays for arrays, _ in found), strict=True)
    *arrays, n_bytes = [np.concatenate(column) for column in columns] or [np.zeros(0)] * 6
    about = [dataclasses.astuple(options), fingerprint(enc), share]
    named = [(file.name, file.size) for file in files]
    digest = digest_of([about, named, [digest for _, digest in found]])
    return Table(flats, *arrays, n_bytes.reshape(-1, 2).sum(axis=0), digest)


def _checked_piece(
    piece: Piece,
    number: dict[File, int],
    share: float,
    options: TokenOptions,
    tokenizer: str,
    enc: tiktoken.Encoding,
    lengths: np.ndarray,
) -> tuple[list[np.ndarray], str]:
    """Returns the columns of the table for a piece, and a digest of its tokens.

    Raises ConfigError for an id beyond the vocabulary.
    """
    digest = hashlib.blake2b(digest_size=16)
    end, ends = enc.eot_token, options.ends(enc.eot_token)
    rows: list[list[np.ndarray]] = [[] for _ in ARRAYS]
    for block in blocks(piece, options, ends):
        digest.update(np.ascontiguousarray(block.tokens))
        documents, _ = cut(block, ends)
        documents, bad = split_bad(block, documents, enc.n_vocab, piece.file.name, tokenizer)
        if bad:
            raise ConfigError(
                f'{bad[0].message(piece.file.path)}, or name the vocabulary that the files were '
                f'made with by data.tokenizer'
            )
        out = held_out(hashes(piece.file.name, documents.numbers), share)
        n_bytes = [0, 0]
        for start, stop, validation in runs(out):
            text = block.tokens[documents.starts[start] : documents.stops[stop - 1]]
            n_bytes[int(validation)] += count_bytes(text, lengths)
        columns = (
            np.full(len(out), number[piece.file], np.int32), documents.starts + block.at,
            documents.stops - documents.starts, in_place(block.tokens, documents, end), out,
            np.array(n_bytes, np.int64),
        )  # fmt: skip
        for row, column in zip(rows, columns, strict=True):
            row.append(column)
    empty = [np.zeros(0, t) for t in (np.int32, np.int64, np.int64, bool, bool, np.int64)]
    return [
        np.concatenate([e, *row]) for e, row in zip(empty, rows, strict=True)
    ], digest.hexdigest()


def _keep(path: str, table: Table) -> None:
    """Writes a table to the cache, all or nothing. Says so on stderr if that cannot be done."""
    content = {name: getattr(table, name) for name in ARRAYS}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, name = tempfile.mkstemp(dir=os.path.dirname(path), suffix='.new')
        try:
            with os.fdopen(handle, 'wb') as f:
                np.savez(f, digest=np.array(table.digest), **content)
            os.rename(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        print(
            f'{path} cannot be written ({error.strerror}), so the next start checks the files '
            'again; JAXFORMER_CACHE names another folder',
            file=sys.stderr,
        )


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


class DirectSplit:
    """The token stream of one split, read from the files: stands for a `Split` of token shards.

    Attributes as those of `Split`; `digest` is that of all tokens of both splits.
    """

    def __init__(
        self,
        path: str,
        name: str,
        table: Table,
        chosen: np.ndarray,
        tokenizer: str,
        enc: tiktoken.Encoding,
        digest: str,
    ):
        """Takes the documents of the table that are `chosen`, bool [n]."""
        self.name, self.tokenizer, self.digest = name, tokenizer, digest
        self.fingerprint, self.end_of_text = fingerprint(enc), enc.eot_token
        self.n_bytes = int(table.n_bytes[int(table.in_validation[chosen][0])])
        self._path, self._encoding, self._flats = path, enc, table.flats
        self._states = [_state(flat.file.path) for flat in table.flats]
        self._lengths = table.lengths[chosen] + 1
        self.n_documents, self.n_tokens = len(self._lengths), int(self._lengths.sum())
        file, starts, ended = (a[chosen] for a in (table.files, table.starts, table.ended))
        # Stretches of documents that lie in the file as in the stream, with their ends.
        follows = ended[:-1] & (file[1:] == file[:-1])
        follows &= starts[1:] == starts[:-1] + self._lengths[:-1]
        first = np.flatnonzero(np.concatenate([[True], ~follows]))
        last = np.concatenate([first[1:], [len(file)]]) - 1
        behind = np.cumsum(self._lengths)
        self._file, self._from = file[first], starts[first]
        self._starts = behind[first] - self._lengths[first]  # in the stream
        self._stops = behind[last]
        self._added = ~ended[last]  # the last end is not in the file

    def encoding(self) -> tiktoken.Encoding:
        """Returns the tokenizer."""
        return self._encoding

    def document_lengths(self) -> np.ndarray:
        """Returns the tokens of each document with its end, int64 [n_documents], in order."""
        return self._lengths

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens start..stop-1 of the stream, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f'[{start}, {stop}) is no range of the {self.n_tokens} tokens')
        return self.read_windows([start], stop - start)[0]

    def read_windows(self, starts: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Returns `length` tokens from each start on, int32 [len(starts), length].

        Beyond the last token of the stream the rows hold -1. Raises UnreadableError if a file has
        changed since it was checked.
        """
        out = np.full((len(starts), length), -1, np.int32)
        for i, (flat, state) in enumerate(zip(self._flats, self._states, strict=True)):
            # Reading a mapped file that was cut would end the process.
            if _state(flat.file.path) != state:
                raise UnreadableError(
                    f'{flat.file.path}, file {i} of data.path={self._path!r}, has changed since it '
                    'was checked: start again'
                )
        for row, origin in zip(out, map(int, starts), strict=True):
            start, stop = origin, min(origin + length, self.n_tokens)
            k = int(np.searchsorted(self._starts, start, 'right')) - 1
            while start < stop:
                first, after = int(self._starts[k]), int(self._stops[k])
                end = min(stop, after)
                in_file = min(end, after - int(self._added[k]))
                at = int(self._from[k]) - first
                flat = self._flats[self._file[k]]
                row[start - origin : in_file - origin] = flat.read(start + at, in_file + at)
                row[in_file - origin : end - origin] = self.end_of_text
                start, k = end, k + 1
        return out


def _state(path: str) -> tuple[int, int] | None:
    """Returns the size and the time of a file, None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
