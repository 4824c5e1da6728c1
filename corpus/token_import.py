"""Writes the token ids of other codebases' files into token shards, a part of a job at a time."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from corpus.records import Piece
from corpus.shards import ArrayWriter
from corpus.tally import add_bad
from corpus.token_documents import (
    Cut,
    byte_lengths,
    count_bytes,
    cut,
    hashes,
    held_out,
    joined,
    runs,
    split_bad,
    tail_start,
)
from corpus.token_files import blocks
from tokenizer import cached_token_bytes

if TYPE_CHECKING:
    from corpus.prepare import Job, Move


def write_tokens(
    enc: tiktoken.Encoding,
    job: 'Job',
    piece: Piece,
    move: 'Move | None',
    arrays: Mapping[str, ArrayWriter],
    result: dict[str, Any],
) -> None:
    """Adds the documents of a piece to the arrays of their splits, and counts them in `result`.

    A document with an id beyond the vocabulary is a bad record. Raises as `blocks` and ArrayWriter.
    """
    name, end = piece.file.name, enc.eot_token
    ends = job.tokens.ends(end)
    lengths = byte_lengths(cached_token_bytes(enc), ends)
    for block in blocks(piece, job.tokens, ends):
        documents, n_empty = cut(block, ends)
        documents, bad = split_bad(block, documents, enc.n_vocab, name, job.tokenizer)
        result['empty'] += n_empty
        result['records'] += n_empty + len(documents.starts)
        for item in bad:
            add_bad(result, item)
        ranks = hashes(name, documents.numbers)
        in_validation = held_out(ranks, job.validation_share)
        _keep_first(result, block.tokens, documents, name, ranks, lengths)
        if move:
            documents, in_validation = _moved(documents, in_validation, name, move, job)
        tokens, behind = joined(block.tokens, documents, end)
        for start, stop, validation in runs(in_validation):
            begin = behind[start - 1] if start else 0
            taken = tokens[begin : behind[stop - 1]]
            sizes = np.diff(behind[start:stop], prepend=begin)
            array = arrays['validation' if validation else 'train']
            array.append_ended(taken, sizes, count_bytes(taken, lengths))


def _keep_first(
    result: dict[str, Any],
    tokens: np.ndarray,
    documents: Cut,
    name: str,
    ranks: np.ndarray,
    lengths: np.ndarray,
) -> None:
    """Keeps (hash, id, bytes) of the two documents with the smallest hashes in the result."""
    found = [tuple(first) for first in result['first']]
    smallest = np.argpartition(ranks, 1)[:2] if len(ranks) > 2 else np.arange(len(ranks))
    for i in smallest:
        text = tokens[documents.starts[i] : documents.stops[i]]
        n_bytes = count_bytes(text, lengths)
        found.append((f'{int(ranks[i]):016x}', f'{name}:{documents.numbers[i]}', n_bytes))
    result['first'] = sorted(found)[:2]


def _moved(
    documents: Cut, in_validation: np.ndarray, name: str, move: 'Move', job: 'Job'
) -> tuple[Cut, np.ndarray]:
    """Returns the documents and which are held out, with the moved one, or its end, moved."""
    file, _, number = move.document.rpartition(':')
    chosen = documents.numbers == int(number) if file == name else np.zeros(0, bool)
    if not chosen.any():
        return documents, in_validation
    in_validation = in_validation.copy()
    i = int(np.argmax(chosen))  # of a record that end-of-text tokens cut, its first document alone
    in_validation[i] = move.to == 'validation'
    if not move.tail:
        return documents, in_validation
    start, stop = documents.starts[i], documents.stops[i]
    at = start + tail_start(int(stop - start), job.validation_share)
    in_validation[i] = False
    if at == stop:
        return documents, in_validation
    starts, stops = np.insert(documents.starts, i + 1, at), np.insert(documents.stops, i, at)
    numbers = np.insert(documents.numbers, i, documents.numbers[i])
    return Cut(starts, stops, numbers), np.insert(in_validation, i + 1, True)
