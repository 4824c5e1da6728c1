"""What a run says of itself: metrics.jsonl, the terminal, and the speed that both report."""

import json
import math
import os
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from machine.chips import peak_flops
from machine.memory import memory_use
from model import flops_per_token, model_config
from parallel import Array, Tree
from runtime.terminal import Terminal
from runtime.workdir import add_entry, keep_records
from runtime.writers import WRITERS
from storage.stores import Lines, write_text


class Writer:
    """metrics.jsonl in the workdir and log.writers, continued after the step `start`; the terminal.

    Only process 0 writes. Raises ValueError if the package of a writer is missing.
    """

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        self.active = jax.process_index() == 0
        self.workdir, self.path = workdir, os.path.join(workdir, 'metrics.jsonl')
        self.terminal = Terminal(config.steps, self.active)
        self._others: list[Any] = []
        if not self.active:
            return
        self._others = [WRITERS[name](workdir, config, start) for name in config.log.writers]
        keep_records(self.path, start)
        self._lines = Lines(self.path)
        write_text(os.path.join(workdir, 'config.json'), config.to_json(indent=2) + '\n')

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *_: Any) -> None:
        self.terminal.close()
        self.flush()
        for writer in self._others:
            writer.close()

    def keep(self, name: str, content: str) -> None:
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
        """What was written is there from now on, also in a bucket."""
        if self.active:
            self._lines.flush()

    def say(self, text: str) -> None:
        self.terminal.say(text)


def router_metrics(stats: Tree, config: ConfigDict, loads: bool) -> dict[str, Any]:
    """Of each MoE layer, by its number in the model: the largest load over the mean one, the
    share of choices dropped, the routers' mean entropy in nats; with `loads` each expert's share.
    """
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
    """Speed and metrics of the run, to the terminal and metrics.jsonl."""

    def __init__(self, config: ConfigDict, mesh: Mesh, writer: Writer):
        self.config, self.writer = config, writer
        self.step_tokens = config.batch_size * config.seq_len
        self.step_flops = self.step_tokens * flops_per_token(model_config(config), config.seq_len)
        self.peak, source = peak_flops(config, mesh)
        writer.say(f'mesh {dict(config.mesh)} · peak {self.peak / 1e12:.3g} TFLOP/s: {source}')
        self.start(0)

    def start(self, step: int) -> None:
        self.last_time, self.last_step = time.perf_counter(), step

    def logs(self, step: int) -> bool:
        every, last = self.config.log.every, step == self.config.steps
        return bool(every) and (step % every == 0 or last)

    def evaluates(self, step: int) -> bool:
        every, last = self.config.eval.every, step == self.config.steps
        return bool(every) and (step % every == 0 or last)

    def samples(self, step: int) -> bool:
        every = self.config.log.sample_every
        return bool(every) and step % every == 0

    def saves(self, step: int) -> bool:
        every, last = self.config.checkpoint.every, step == self.config.steps
        return last or (bool(every) and step % every == 0)

    def log(self, step: int, metrics: dict[str, Array]) -> None:
        """Fetches the metrics of a step, while the next one runs."""
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
        self.last_time += seconds
        self.writer.write(step=step, tokens=step * self.step_tokens, **evaluation)
        self.writer.say(
            f'step {step}/{self.config.steps}  eval loss {evaluation["eval_loss"]:.4f}  '
            f'{evaluation["eval_bits_per_byte"]:.4f} bits/byte'
        )

    def log_samples(self, step: int, samples: list[dict[str, str]], seconds: float) -> None:
        self.last_time += seconds
        self.writer.write(step=step, tokens=step * self.step_tokens, samples=samples)
        for sample in samples:
            self.writer.say(f'step {step}/{self.config.steps}  {sample["prompt"]}{sample["text"]}')
