"""The numbers of a run: metrics.jsonl, the lines of the terminal, and the speed in both."""

import json
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from config import phases
from machine.chips import is_measured, peak_flops
from machine.memory import memory_use
from model import flops_per_token
from parallel import Array, Tree
from runtime.guards import TrainingError
from runtime.terminal import SEPARATOR, Terminal
from runtime.workdir import CONFIG, METRICS, add_entry
from runtime.writers import WRITERS
from storage.stores import Lines, write_text
from train_step import Setup


class Writer:
    """Writes the numbers of a run: to metrics.jsonl and log.writers, continued after the step
    `start`, and to the terminal.

    Only process 0 writes. Raises ConfigError if the package of a writer is missing. While the run
    goes on, what cannot be written ends nothing: it is said once. Lines of metrics.jsonl are kept
    and tried again with the next ones, since a disk that is full may have room later; a writer of
    log.writers that fails is left out from then on.
    """

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        self.active = jax.process_index() == 0
        self.workdir, self.path = workdir, os.path.join(workdir, METRICS)
        self.terminal = Terminal(config.steps, self.active)
        self._others: list[Any] = []
        self._problem: Exception | None = None  # why the last lines are not in metrics.jsonl
        if not self.active:
            return
        self._others = [WRITERS[name](workdir, config, start) for name in config.log.writers]
        self._lines = Lines(self.path)
        write_text(os.path.join(workdir, CONFIG), config.to_json(indent=2) + '\n')

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        """Raises TrainingError if lines of metrics.jsonl could not be written, and nothing else
        ends the run."""
        self.terminal.close()
        self.flush()
        for writer in list(self._others):
            self._guarded(writer, writer.close)
        if self._problem and error is None:
            raise TrainingError(
                f'{self.path} lacks lines, which could not be written: {self._problem}\nThe '
                f'checkpoints are complete.'
            ) from self._problem

    def keep(self, name: str, content: str) -> None:
        """Writes a file of the workdir."""
        if self.active:
            write_text(os.path.join(self.workdir, name), content)

    def record_start(self, entry: dict[str, Any]) -> None:
        if self.active:
            add_entry(self.workdir, entry)

    def write(self, **record: Any) -> None:
        if not self.active:
            return
        # NaN and infinity, which JSON has no numbers for, as null.
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None
                  for k, v in record.items()}  # fmt: skip
        self._try(self._lines.add, json.dumps(finite, allow_nan=False))
        for writer in list(self._others):
            self._guarded(writer, writer.write, record)

    def flush(self) -> None:
        """Returns when all that was written is there, also in a bucket, or cannot be written."""
        if self.active and self._try(self._lines.flush) and self._problem:
            self.say(f'{self.path} is written again')
            self._problem = None

    def _try(self, write: Callable[..., None], *args: Any) -> bool:
        """Calls a method of `Lines`, which keeps the lines that it could not write; returns False
        if it fails."""
        try:
            write(*args)
        except (OSError, ValueError) as error:
            if self._problem is None:
                self.say(f'{self.path} cannot be written ({error}): its lines are kept for later')
            self._problem = error
            return False
        return True

    def _guarded(self, writer: Any, call: Callable[..., None], *args: Any) -> None:
        """Calls a method of one of log.writers; drops the writer if it fails."""
        try:
            call(*args)
        except Exception as error:  # of any kind: they are other projects' services
            self._others.remove(writer)
            self.say(f'log.writers: {type(writer).__name__} has failed and is left out: {error!r}')

    def say(self, text: str) -> None:
        self.terminal.say(text)


def router_metrics(stats: Tree, config: ConfigDict, loads: bool) -> dict[str, Any]:
    """Returns metrics of each MoE layer, by its number in the model: the largest load over the mean
    one, the share of choices dropped, the router's mean entropy in nats; with `loads` each expert's
    share of the choices."""
    metrics: dict[str, Any] = {}
    kinds, first = config.model.block, config.model.first_dense
    for name, layer_stats in stats.items():
        # Pipeline stages of several chunks have them in front: [chunks, blocks, ...].
        s = {k: np.asarray(v, np.float64) for k, v in layer_stats.items()}
        s = {k: v.reshape(-1, v.shape[-1]) if k == 'load' else v.reshape(-1) for k, v in s.items()}
        for block, load in enumerate(s['load']):
            layer = f'moe/{first + block * len(kinds) + int(name.partition("_")[0])}'
            metrics[f'{layer}/load_max_over_mean'] = load.max() / load.mean()
            metrics[f'{layer}/dropped'] = s['dropped'][block] / load.sum()
            metrics[f'{layer}/entropy'] = s['entropy'][block] / s['tokens'][block]
            if loads:
                metrics[f'{layer}/load'] = (load / load.sum()).tolist()
    return metrics


class Progress:
    """The speed and metrics of the run, for the terminal and metrics.jsonl.

    A step's metrics are fetched while the next one runs: `keep` notes them, `log` writes them.
    """

    def __init__(self, s: Setup, writer: Writer, tokens_before: Callable[[int], int]):
        """`tokens_before`, of `data.Loader`, counts the targets of the steps before one."""
        self.setup, self.config, self.writer = s, s.config, writer
        self._phases, self._tokens_before = phases(s.config), tokens_before
        self._flops = [flops_per_token(s.model, phase.seq_len) for phase in self._phases]
        self.peak, source = peak_flops(s.config, s.mesh)
        self._doubtful = False
        self._pending: tuple[int, dict[str, Array], bool] | None = None
        writer.say(f'mesh {dict(s.config.mesh)} · peak {self.peak / 1e12:.3g} TFLOP/s: {source}')
        self.start(0)

    def start(self, step: int) -> None:
        """Counts time from now on, `step` steps being done."""
        self.last_time, self.last_step = time.perf_counter(), step
        self.tokens = self._tokens_before(step)

    def pause(self, seconds: float) -> None:
        """Leaves out seconds in which no step ran."""
        self.last_time += seconds

    def flops(self, step: int) -> float:
        """Returns the useful FLOPs of the steps since `start`, up to `step` of them."""
        total, done = 0.0, self.tokens
        after = [*(phase.start for phase in self._phases[1:]), step]
        for stop, each in zip(after, self._flops, strict=True):
            if self.last_step < min(stop, step):
                tokens = self._tokens_before(min(stop, step))
                total, done = total + each * (tokens - done), tokens
        return total

    def keep(self, step: int, metrics: dict[str, Array], record: bool = True) -> None:
        """Notes the metrics of a step that may still be running; without `record` they are shown,
        and not written to metrics.jsonl."""
        self._pending = step, metrics, record

    def log(self) -> None:
        """Fetches and writes the metrics that were noted, if any; waits for their step."""
        if self._pending is None:
            return
        (step, metrics, record), self._pending = self._pending, None
        self.writer.terminal.catch_up(step)
        metrics = jax.device_get(metrics)
        stats = metrics.pop('router')
        values = {name: float(value) for name, value in metrics.items()}
        every = self.config.log.loads_every
        values |= router_metrics(stats, self.config, loads=bool(every) and step % every == 0)
        seconds = time.perf_counter() - self.last_time
        steps, before, flops = step - self.last_step, self.tokens, self.flops(step)
        self.start(step)
        speed = {
            'tokens_per_second': (self.tokens - before) / seconds,
            'mfu': self.mfu(flops / seconds),
        }
        memory = memory_use()
        if record:
            self.writer.write(step=step, tokens=self.tokens, **values, **speed, **memory)
        fields = [f'loss {values["loss"]:.4f}']
        if values['skipped']:
            fields.append(f'{values["skipped"]:.0f} skipped')
        fields += [
            f'grad norm {values["grad_norm"]:.3f}',
            f'{speed["tokens_per_second"]:,.0f} tokens/s',
            *([f'MFU {speed["mfu"]:.1%}'] if math.isfinite(speed['mfu']) else []),
            f'{memory.get("device_bytes", memory["host_bytes"]) / 1e9:.1f} GB',
        ]
        self.writer.terminal.log(step, SEPARATOR.join(fields), seconds / steps)

    def mfu(self, rate: float) -> float:
        """Returns the share of the peak that a rate in FLOP/s is.

        No step beats the peak: where it seems to, the peak was measured while the machine had other
        work, and NaN is returned until `check_peak` has measured again.
        """
        share = rate / self.peak
        if share > 1 and is_measured(self.config, self.setup.mesh):
            self._doubtful = True
            return math.nan
        return share

    def check_peak(self) -> None:
        """Measures the peak again if it is in doubt; to be called while the devices are idle."""
        if not self._doubtful or not self.writer.active:
            return
        start = time.perf_counter()
        self._doubtful = False
        peak, _ = peak_flops(self.config, self.setup.mesh)
        if peak > self.peak:
            self.peak = peak
            self.writer.say(f'peak measured again: {peak / 1e12:.3g} TFLOP/s')
        self.pause(time.perf_counter() - start)

    def log_evaluation(self, step: int, evaluation: dict[str, float], seconds: float) -> None:
        """Writes an evaluation, if there is one, whose seconds do not count as training."""
        self.pause(seconds)
        if not evaluation:
            return
        self.writer.write(step=step, tokens=self._tokens_before(step), **evaluation)
        self.writer.say(
            f'step {step}/{self.config.steps}  eval loss {evaluation["eval_loss"]:.4f}  '
            f'{evaluation["eval_bits_per_byte"]:.4f} bits/byte'
        )

    def log_tasks(
        self, step: int, results: dict[str, float], lines: list[str], seconds: float
    ) -> None:
        """Writes the results of tasks, whose seconds do not count as training."""
        self.pause(seconds)
        self.writer.write(step=step, tokens=self._tokens_before(step), **results)
        for line in lines:
            self.writer.say(f'step {step}/{self.config.steps}  {line}')

    def log_samples(self, step: int, samples: list[dict[str, str]], seconds: float) -> None:
        """Writes continuations of the prompts, whose seconds do not count as training."""
        self.pause(seconds)
        self.writer.write(step=step, tokens=self._tokens_before(step), samples=samples)
        for sample in samples:
            self.writer.say(f'step {step}/{self.config.steps}  {sample["prompt"]}{sample["text"]}')
