"""Reads a prepared folder as a whole: checks every shard, and prints statistics and samples."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from corpus.lengths import read_lengths
from corpus.shards import (
    CHECKSUMS,
    Split,
    array_spec,
    check_array,
    checksums_of,
    digest_of,
    read_blocks,
    read_checksums,
    read_manifest,
)
from machine.progress import Progress
from storage.stores import open_store

SAMPLE_TOKENS = 200  # at most, of a document that --inspect shows


def inspect(path: str, n_samples: int = 3) -> list[str]:
    """Reads and checks all shards; returns a line for each damaged one.

    Prints the manifest, statistics of the tokens, and `n_samples` documents of each split; the
    latter two only as long as no shard is damaged.
    """
    store = open_store(path)
    manifest = read_manifest(store, path)
    summary = json.loads(json.dumps(manifest))
    for split in summary['splits'].values():
        split['shards'] = len(split['shards'])
    print(json.dumps(summary, indent=1))
    tokens = sum(split['tokens'] for split in manifest['splits'].values())
    with Progress('checking', tokens) as progress:
        damage = _check_splits(path, manifest, n_samples, progress)
    print(f'\n{len(damage)} damaged shards' if damage else '\nall shards are as the manifest says')
    return damage


def _check_splits(
    path: str, manifest: dict[str, Any], n_samples: int, progress: Progress
) -> list[str]:
    """Checks and describes the splits; returns a line for each damaged shard."""
    store, damage = open_store(path), []
    for name, split in manifest['splits'].items():
        if not split['tokens']:
            print(f'\n{name}: empty')
            continue
        counts = np.zeros(manifest['tokenizer']['n_vocab'], np.int64)
        lengths: list[np.ndarray] = []
        for shard in split['shards']:
            try:
                _check_shard(store, shard, manifest, counts, lengths, progress)
            except (ValueError, OSError) as error:
                damage.append(f'{path}/{shard["path"]} is damaged: {error}')
        progress.close()
        if not damage:
            whole = Split(path, name)
            _print_statistics(whole, counts, np.concatenate(lengths))
            _print_samples(whole, np.concatenate(lengths), n_samples)
    return damage


def _check_shard(
    store: ts.KvStore,
    shard: dict[str, Any],
    manifest: dict[str, Any],
    counts: np.ndarray,
    lengths: list[np.ndarray],
    progress: Progress,
) -> None:
    """Adds the shard's ids to `counts` [n_vocab] and the lengths of its documents to `lengths`.

    Raises ValueError or OSError if the shard is not as the manifest says.
    """
    ends, n = [], 0

    def blocks() -> Iterator[np.ndarray]:
        """Yields the shard's tokens, counted."""
        nonlocal counts, n
        for tokens in read_blocks(store, shard['path']):
            new = np.bincount(tokens, minlength=len(counts))
            if len(new) > len(counts):
                raise ValueError(f'id {len(new) - 1} is beyond the vocabulary of {len(counts)}')
            counts += new
            ends.append(n + np.flatnonzero(tokens == manifest['tokenizer']['end_of_text']))
            n += len(tokens)
            progress.add(len(tokens))
            yield tokens

    array = ts.open(array_spec(store, shard['path']), read=True).result()
    check_array(array, shard, manifest['dtype'])
    digest = digest_of(blocks())
    ends = np.concatenate(ends)
    if (n, len(ends)) != (shard['tokens'], shard['documents']):
        raise ValueError(
            f'it holds {n:,} tokens and {len(ends):,} documents, the manifest says '
            f'{shard["tokens"]:,} and {shard["documents"]:,}'
        )
    if shard.get('digest', digest) != digest:
        raise ValueError('its tokens are not those that the manifest is about')
    for which in CHECKSUMS:
        found = checksums_of(read_checksums(store, shard['path'], array, which))
        if shard.get(which, found) != found:
            raise ValueError(f'it was written anew: its {which} are others than the manifest says')
    lengths.append(np.diff(ends, prepend=-1))
    if 'lengths' in shard and not np.array_equal(read_lengths(store, shard), lengths[-1]):
        raise ValueError('the lengths of its documents are others than its tokens say')


def _print_statistics(split: Split, counts: np.ndarray, lengths: np.ndarray) -> None:
    """Prints totals, lengths of documents and the most frequent ids of a split."""
    quantiles = np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1]).astype(int)
    print(
        f'\n{split.name}: {split.n_documents:,} documents, {split.n_tokens:,} tokens, '
        f'{split.n_bytes:,} bytes, {split.n_bytes / split.n_tokens:.3f} bytes per token\n'
        f'  tokens per document: mean {lengths.mean():,.0f}; minimum, 10 %, median, 90 %, maximum: '
        f'{", ".join(f"{q:,}" for q in quantiles)}\n'
        f'  {np.count_nonzero(counts):,} of {len(counts):,} ids occur; the most frequent:'
    )
    enc = split.encoding()
    for i in np.argsort(-counts, kind='stable')[: min(10, np.count_nonzero(counts))]:
        print(f'  {counts[i] / counts.sum():7.2%}  {i:6}  {enc.decode_single_token_bytes(i)!r}')


def _print_samples(split: Split, lengths: np.ndarray, n: int) -> None:
    """Prints n documents at even distances, the first SAMPLE_TOKENS tokens of each."""
    enc = split.encoding()
    starts = np.cumsum(lengths) - lengths
    for i in np.unique(np.linspace(0, len(lengths) - 1, n).astype(int)) if n else ():
        kept = min(lengths[i] - 1, SAMPLE_TOKENS)
        text = enc.decode(split.read(starts[i], starts[i] + kept).tolist())
        print(f'\n--- {split.name} document {i}, {lengths[i] - 1:,} tokens ---\n{text}')
