"""The numbers of a run: metrics.jsonl, the lines of the terminal, and the speed in both."""

import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from machine.chips import peak_flops
from machine.memory import memory_use
from model import flops_per_token
from parallel import Array, Tree
from runtime.terminal import Terminal
from runtime.workdir import CONFIG, METRICS, add_entry, keep_records
from runtime.writers import WRITERS
from storage.stores import Lines, write_text
from train_step import Setup


class Writer:
    """Writes the numbers of a run: to metrics.jsonl and log.writers, continued after the step
    `start`, and to the terminal.

    Only process 0 writes. Raises ConfigError if the package of a writer is missing.
    """

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        self.active = jax.process_index() == 0
        self.workdir, self.path = workdir, os.path.join(workdir, METRICS)
        self.terminal = Terminal(config.steps, self.active)
        self._others: list[Any] = []
        if not self.active:
            return
        self._others = [WRITERS[name](workdir, config, start) for name in config.log.writers]
        keep_records(self.path, start)
        self._lines = Lines(self.path)
        write_text(os.path.join(workdir, CONFIG), config.to_json(indent=2) + '\n')

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_: Any) -> None:
        self.terminal.close()
        self.flush()
        for writer in self._others:
            writer.close()

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
        self._lines.add(json.dumps(finite, allow_nan=False))
        for writer in self._others:
            writer.write(record)

    def flush(self) -> None:
        """Returns when all that was written is there, also in a bucket."""
        if self.active:
            self._lines.flush()

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

    def __init__(self, s: Setup, writer: Writer):
        self.config, self.writer = s.config, writer
        self.step_tokens = s.config.batch_size * s.config.seq_len
        self.step_flops = self.step_tokens * flops_per_token(s.model, s.config.seq_len)
        self.peak, source = peak_flops(s.config, s.mesh)
        self._pending: tuple[int, dict[str, Array]] | None = None
        writer.say(f'mesh {dict(s.config.mesh)} · peak {self.peak / 1e12:.3g} TFLOP/s: {source}')
        self.start(0)

    def start(self, step: int) -> None:
        """Counts time from now on, `step` steps being done."""
        self.last_time, self.last_step = time.perf_counter(), step

    def keep(self, step: int, metrics: dict[str, Array]) -> None:
        """Notes the metrics of a step that may still be running."""
        self._pending = step, metrics

    def log(self) -> None:
        """Fetches and writes the metrics that were noted, if any; waits for their step."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        self.writer.terminal.catch_up(step)
        metrics = jax.device_get(metrics)
        stats = metrics.pop('router')
        values = {name: float(value) for name, value in metrics.items()}
        every = self.config.log.loads_every
        values |= router_metrics(stats, self.config, loads=bool(every) and step % every == 0)
        seconds = (time.perf_counter() - self.last_time) / (step - self.last_step)
        self.start(step)
        speed = {
            'tokens_per_second': self.step_tokens / seconds,
            'mfu': self.step_flops / seconds / self.peak,
        }
        memory = memory_use()
        tokens = step * self.step_tokens
        self.writer.write(step=step, tokens=tokens, **values, **speed, **memory)
        skipped = f'{values["skipped"]:.0f} skipped  ' if values['skipped'] else ''
        gigabytes = memory.get('device_bytes', memory['host_bytes']) / 1e9
        self.writer.terminal.log(
            step,
            f'loss {values["loss"]:.4f}  {skipped}grad norm {values["grad_norm"]:.3f}  '
            f'{speed["tokens_per_second"]:,.0f} tokens/s  MFU {speed["mfu"]:.1%}  '
            f'{gigabytes:.1f} GB',
            seconds,
        )

    def log_evaluation(self, step: int, evaluation: dict[str, float], seconds: float) -> None:
        """Writes an evaluation, whose seconds do not count as training."""
        self.last_time += seconds
        self.writer.write(step=step, tokens=step * self.step_tokens, **evaluation)
        self.writer.say(
            f'step {step}/{self.config.steps}  eval loss {evaluation["eval_loss"]:.4f}  '
            f'{evaluation["eval_bits_per_byte"]:.4f} bits/byte'
        )

    def log_samples(self, step: int, samples: list[dict[str, str]], seconds: float) -> None:
        """Writes continuations of the prompts, whose seconds do not count as training."""
        self.last_time += seconds
        self.writer.write(step=step, tokens=step * self.step_tokens, samples=samples)
        for sample in samples:
            self.writer.say(f'step {step}/{self.config.steps}  {sample["prompt"]}{sample["text"]}')
