"""Totals and progress of a preparation, and the limit on its bad records."""

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from config import ConfigError
from corpus.records import Bad, Piece
from machine.progress import Progress

REPORTS = 100  # bad records of one part that the manifest names; the others are only counted
REPORTS_SHOWN = 10  # bad records that an error message names
COUNTS = ('records', 'empty', 'bad', 'lost_bytes')  # counted for each part and the whole input


def add_bad(result: dict[str, Any], item: Bad) -> None:
    """Counts a bad record in the result of a part, and reports it unless there are many."""
    result['records'] += item.count
    result['bad'] += item.count
    result['lost_bytes'] += item.lost_bytes
    if len(result['reports']) < REPORTS:
        result['reports'].append(item._asdict())


class Tally:
    """The results of the finished parts, in order, and their totals."""

    def __init__(self, parts: list[list[Piece]], max_bad_share: float):
        self.results: list[dict[str, Any]] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.binary: Counter[str] = Counter()  # files that are left out, by their ending
        self.tokens = self.documents = self.bytes_read = self._bad_files = self._bad_bytes = 0
        self.sizes = [sum(piece.size for piece in part) for part in parts]
        self.bytes_in_all = max(1, sum(self.sizes))
        self._parts, self._max_bad_share = parts, max_bad_share

    def add(self, result: dict[str, Any]) -> None:
        """Adds the result of the next part.

        Raises ConfigError when so many records are bad that the rest cannot bring their share down
        to the limit. A single file that is not text is allowed, unless the limit is 0: of the files
        of a small folder it is a large share. It may hold up to half of all bytes.
        """
        part = self._parts[len(self.results)]
        self.bytes_read += self.sizes[len(self.results)]
        self.results.append(result)
        for name in COUNTS:
            self.counts[name] += result[name]
        self.binary.update(result.get('binary', {}))
        for shard in result['shards'].values():
            self.tokens += shard['tokens']
            self.documents += shard['documents']
        sizes = {piece.file.name: piece.size for piece in part}
        for report in result['reports']:
            if not report['place'] and not report['broken']:
                self._bad_files += 1
                self._bad_bytes += sizes[report['file']]
        limit, bad, lost = self._max_bad_share, self.counts['bad'], self.counts['lost_bytes']
        # A lone record is left to the error that there is no text.
        small = self._bad_bytes <= self.bytes_in_all / 2 or self.counts['records'] == 1
        if limit and bad == self._bad_files == 1 and small:
            bad = 0
        last = len(self.results) == len(self._parts)
        share_read = 1.0 if last else self.bytes_read / self.bytes_in_all
        expected = self.counts['records'] / max(share_read, 1e-9)  # records in the whole input
        if bad > limit * expected or lost > limit * self.bytes_in_all:
            raise ConfigError(self._too_many())

    def _too_many(self) -> str:
        """Returns the message that too many records are bad."""
        bad, lost = self.counts['bad'], self.counts['lost_bytes']
        remedy = 'a larger --max_bad_share'
        if len(self.results) == len(self._parts):
            share = max(bad / max(1, self.counts['records']), lost / self.bytes_in_all)
            remedy = f'--max_bad_share={math.ceil(share * 1000) / 1000:g}'
        return self.complaint(
            f'{bad:,} of {self.counts["records"]:,} records are bad, and {lost:,} bytes of unknown '
            f'records, more than max_bad_share={self._max_bad_share}: repair or remove what is '
            f'named here, or leave it out by {remedy}'
        )

    def complaint(self, problem: str) -> str:
        """Returns a message of the problem and, a line each, the first bad records."""
        lines, named, shown = [problem], 0, 0
        if self.binary:
            lines.append(binary_note(self.binary))
        for result, part in zip(self.results, self._parts, strict=False):
            paths = {piece.file.name: piece.file.path for piece in part}
            for report in result['reports'][: max(0, REPORTS_SHOWN - shown)]:
                shown += 1
                lines.append(Bad(**report).message(paths[report['file']]))
                named += report['count']
        if named < self.counts['bad']:
            lines.append(f'and {self.counts["bad"] - named:,} more')
        return '\n  '.join(lines)


class ProgressBar:
    """The progress of a job, which counts the bytes of its input."""

    def __init__(self, tally: Tally, done: dict[int, Any] | None):
        """`done` are the results of parts that were there before, which the speed leaves out; None
        says nothing."""
        silent, done = (math.inf, {}) if done is None else (0.0, done)
        before = sum(tally.sizes[i] for i in done)
        self._tally = tally
        self._tokens = {i: total(r['shards'].values())['tokens'] for i, r in done.items()}
        self._progress = Progress('', tally.bytes_in_all, before, silent)

    def show(self) -> None:
        """Says how far the parts are that the tally has, after one of them was done."""
        tally = self._tally
        n, n_parts = len(tally.results), len(tally.sizes)
        later = sum(tally.sizes[i] for i in self._tokens if i >= n)
        tokens = tally.tokens - sum(tokens for i, tokens in self._tokens.items() if i < n)
        line = (
            f'{n}/{n_parts} parts  {tally.documents:,} documents  {tally.tokens:,} tokens  '
            f'{tokens / self._progress.seconds / 1e6:.2f}M tokens/s'
        )
        all_done = tally.bytes_in_all if n == n_parts else tally.bytes_read + later
        self._progress.show(all_done, line)

    def close(self) -> None:
        """Ends the line on a terminal."""
        self._progress.close()


def total(shards: Collection[dict[str, Any]]) -> dict[str, Any]:
    """Returns the shards' tokens, documents and bytes of text in all."""
    return {key: sum(shard[key] for shard in shards) for key in ('tokens', 'documents', 'bytes')}


def binary_note(binary: dict[str, int]) -> str:
    """Returns a line on files that were left out because they are no text; by their ending."""
    endings = ', '.join(f'{n:,} {ending}' for ending, n in Counter(binary).most_common(8))
    return f'{sum(binary.values()):,} files left out as binary (NUL bytes, or no UTF-8): {endings}'
