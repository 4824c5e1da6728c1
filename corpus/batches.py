"""Training batches as pure functions of the step: of one source, or of a mixture of several."""

from collections.abc import Sequence

import numpy as np

from config import ConfigError, Phase, phase_at
from corpus.order import permute, source_order, whole_shares
from corpus.packing import PackedWindows, total_targets
from corpus.shards import Split


class Batches:
    """Training batches: pure functions of the step, in the phases of a run (`config.phases`).

    Samples are windows of seq_len + 1 tokens, numbered from 0 through all epochs in the order in
    which they are trained on. A phase of a shorter sequence takes windows in equal parts, one after
    the other as rows; one that the next phase finds begun counts as taken.
    """

    def __init__(self, batch_size: int, seq_len: int, phases: Sequence[Phase] = ()):
        """Takes batches of batch_size windows if there are no `phases`."""
        check_sizes(batch_size, seq_len)
        self.batch_size, self.seq_len = batch_size, seq_len
        self.phases = tuple(phases) or (Phase(0, batch_size, seq_len),)

    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the given rows of the global batch of this step, int32 [rows, seq_len + 1]."""
        phase = phase_at(self.phases, step)
        parts = self.seq_len // phase.seq_len
        row = (step - phase.start) * phase.batch_size + np.arange(phase.batch_size)[rows]
        sample, part = np.divmod(row, parts)
        return self.windows(phase.windows + sample, part, parts)

    def tokens_before(self, step: int) -> int:
        """Returns the targets of all steps before this one, without padding."""
        phase = phase_at(self.phases, step)
        rows = (step - phase.start) * phase.batch_size
        if self.packed:
            return self.targets_before(phase.windows + rows)
        return phase.positions + rows * phase.seq_len

    # What a subclass has, beside n_tokens:

    packed: Sequence[PackedWindows] = ()  # of each source; none of plain streams

    def windows(self, sample: np.ndarray, part: np.ndarray | int, parts: int) -> np.ndarray:
        """Returns the part, of equal `parts`, of each of these samples, with its last target."""
        raise NotImplementedError

    def targets_before(self, n: int) -> int:
        """Returns the targets of the first n samples."""
        return n * self.seq_len


class Loader(Batches):
    """Training batches of one split.

    A row is a window of seq_len + 1 tokens. In the plain stream windows start every seq_len tokens,
    so the last target of one is the first input of the next; up to seq_len - 1 tokens at the end of
    the stream, which fill no window, are not used. Or windows are packed with whole documents, and
    -1 behind them. Each epoch takes all windows in a new seeded permutation.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seq_len: int,
        seed: int,
        packed: PackedWindows | None = None,
        phases: Sequence[Phase] = (),
    ):
        """`batch_size` is the number of rows of the global batch, `seq_len` of targets per row.

        Raises ConfigError if the split is shorter than a window.
        """
        super().__init__(batch_size, seq_len, phases)
        if seed < 0:
            raise ValueError(f'the seed of the data order must be 0 or more, but is {seed}')
        self.n_windows = packed.n_windows if packed else (split.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise ConfigError(
                f'a window needs seq_len + 1 = {seq_len + 1} tokens, but the split has '
                f'{split.n_tokens}: prepare more text or take a smaller seq_len'
            )
        self.split, self.seed = split, seed
        self.n_tokens = split.n_tokens
        self.packed = (packed,) if packed else ()
        self._counted = 0, 0  # samples, and the targets of these

    def windows(self, sample: np.ndarray, part: np.ndarray | int = 0, parts: int = 1) -> np.ndarray:
        """Returns parts of the windows with these sample numbers, or all of them where parts is 1:
        int32 [len(sample), seq_len / parts + 1]."""
        window = self._window(sample)
        if self.packed:
            return self.packed[0].read(window)
        length = self.seq_len // parts
        return self.split.read_windows(window * self.seq_len + part * length, length + 1)

    def _window(self, sample: np.ndarray) -> np.ndarray:
        """Returns the numbers of windows in the split, given those of samples."""
        epoch, index = np.divmod(sample, self.n_windows)
        window = np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            window[here] = permute(index[here], self.n_windows, self.seed, int(e))
        return window

    def targets_before(self, n: int) -> int:
        """Returns the targets of the first n samples."""
        if not self.packed:
            return super().targets_before(n)
        targets, known = self.packed[0].targets, self._counted
        epochs = n // self.n_windows
        start, total = epochs * self.n_windows, epochs * total_targets(self.packed[0])
        if start < known[0] <= n:  # asked of ever larger n, as a run goes on
            start, total = known
        for i in range(start, n, 1 << 16):
            total += int(targets[self._window(np.arange(i, min(i + (1 << 16), n)))].sum())
        self._counted = n, total
        return total


class Mixture(Batches):
    """Training batches of several sources, each in the order that a Loader of it alone has.

    Sample i of the stream comes from the source that `source_order` assigns to it. Among any n
    consecutive samples, a source's number differs from its share of n by less than 2; among any
    `period` consecutive samples it is exact.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float],
        batch_size: int,
        seq_len: int,
        seed: int,
        packed: Sequence[PackedWindows | None] = (),
        phases: Sequence[Phase] = (),
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
        super().__init__(batch_size, seq_len, phases)
        self.loaders = [
            Loader(split, batch_size, seq_len, seed, windows)
            for split, windows in zip(splits, packed or [None] * len(splits), strict=True)
        ]
        self.packed = tuple(windows for loader in self.loaders for windows in loader.packed)
        self.n_tokens = sum(split.n_tokens for split in splits)
        counts = whole_shares(weights)
        self.period, self._counts = sum(counts), np.array(counts)
        self._source = source_order(counts)
        chosen = self._source[:, None] == np.arange(len(counts))
        # For each slot of a period, the number of earlier slots of the same source.
        self._earlier = (np.cumsum(chosen, axis=0) - chosen)[chosen]

    def windows(self, sample: np.ndarray, part: np.ndarray | int = 0, parts: int = 1) -> np.ndarray:
        """Returns parts of the windows with these sample numbers, as `Loader.windows` does."""
        period, slot = np.divmod(sample, self.period)
        source = self._source[slot]
        nth = period * self._counts[source] + self._earlier[slot]
        out = np.empty((len(sample), self.seq_len // parts + 1), np.int32)
        part = np.broadcast_to(part, sample.shape)
        for i in np.unique(source):
            here = source == i
            out[here] = self.loaders[i].windows(nth[here], part[here], parts)
        return out

    def targets_before(self, n: int) -> int:
        """Returns the targets of the first n samples."""
        period, slot = divmod(n, self.period)
        total = 0
        for i, loader in enumerate(self.loaders):
            of_source = period * self._counts[i] + np.count_nonzero(self._source[:slot] == i)
            total += loader.targets_before(int(of_source))
        return total


def check_sizes(batch_size: int, seq_len: int) -> None:
    """Raises ValueError for sizes that the rules of a config exclude."""
    if batch_size < 1 or seq_len < 1:
        raise ValueError(
            f'batch_size and seq_len must be 1 or more, but are {batch_size} and {seq_len}'
        )
