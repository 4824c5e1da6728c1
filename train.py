"""Trains a model.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py --config.optimizer.peak_lr=1e-3
    python train.py --config=configs/tiny.py --cpu_devices=8 --config.mesh.fsdp=4 --config.mesh.tp=2

The workdir receives config.json, metrics.jsonl, one object a logged step, and checkpoints/. The
same command goes on from the newest checkpoint there, however the run ended before; SIGTERM or
Ctrl-C save one first. --init_from=WORKDIR starts a new run from another one's parameters.
"""

import ctypes
import functools
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from absl import app, flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, config_flags

import data
from checkpoint import Checkpointer, CheckpointError
from generate import TOKENIZER, make_sampler, tokenizer_record
from model import flops_per_token
from parallel import Array, P, Tree, count, make_mesh
from resume import (
    StopSignals,
    first_step,
    keep_records,
    load_params,
    restore_state,
    write_file,
)
from steps import abstract_state, init_state, lower_train_step, make_eval_step, put_batch
from tokenizer import token_bytes
from validation import declared_params, model_config, validate

# Dense bfloat16 FLOP/s of one jax device, by device_kind: the vendors' data sheets.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def peak_flops(config: ConfigDict, mesh: Mesh) -> tuple[float, str]:
    """FLOP/s of the whole mesh, and where the figure comes from."""
    device = mesh.local_devices[0]
    if config.peak_flops:
        return config.peak_flops * mesh.size, 'config.peak_flops'
    if device.platform != 'cpu':
        if device.device_kind not in PEAK_FLOPS:
            raise ValueError(
                f'the peak of {device.device_kind!r} is unknown; set --config.peak_flops to the '
                f'FLOP/s of one device'
            )
        return PEAK_FLOPS[device.device_kind] * mesh.size, f'data sheet of {device.device_kind}'
    n = 2048
    x = jax.device_put(np.ones((n, n), np.float32), device)
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds), f'float32 matmul of {n} x {n} on this CPU, all cores'


class Writer:
    """metrics.jsonl in the workdir, continued after the step `start`; only process 0 writes."""

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        self.active = jax.process_index() == 0
        self.path = os.path.join(workdir, 'metrics.jsonl')
        if not self.active:
            return
        os.makedirs(workdir, exist_ok=True)
        keep_records(self.path, start)
        write_file(os.path.join(workdir, 'config.json'), config.to_json(indent=2) + '\n')

    def keep(self, name: str, content: str) -> None:
        if self.active:
            write_file(os.path.join(os.path.dirname(self.path), name), content)

    def write(self, **record: Any) -> None:
        if self.active:
            with open(self.path, 'a') as f:
                f.write(json.dumps(record) + '\n')

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)


def make_evaluation(
    config: ConfigDict, mesh: Mesh, encoding: tiktoken.Encoding
) -> Callable[[Tree, data.EvaluationSet], dict[str, float]]:
    """(params, a fixed evaluation set) -> mean loss (nats a token) and bits a byte of its text."""
    step = make_eval_step(config, mesh)
    bytes_V = np.zeros(config.model.vocab_size, np.int32)
    bytes_V[: encoding.n_vocab] = token_bytes(encoding)
    bytes_V = jax.device_put(bytes_V, NamedSharding(mesh, P()))

    def evaluate(params: Tree, batches: data.EvaluationSet) -> dict[str, float]:
        put = functools.partial(put_batch, config=config, mesh=mesh)
        sums = [step(params, put(batches.batch_at, i), bytes_V) for i in range(batches.n_batches)]
        nats, targets, n_bytes = (
            sum(float(s[name]) for s in sums) for name in ('nats', 'targets', 'bytes')
        )
        return {'eval_loss': nats / targets, 'eval_bits_per_byte': nats / np.log(2) / n_bytes}

    return evaluate


def zlib_bits_per_byte(batches: data.EvaluationSet, encoding: tiktoken.Encoding) -> float:
    """What zlib at level 9 makes of the very text that evaluation predicts."""
    targets = np.concatenate(
        [batches.batch_at(i)[:, 1:].reshape(-1) for i in range(batches.n_batches)]
    )
    targets = targets[targets >= 0]
    text = encoding.decode_bytes(targets[token_bytes(encoding)[targets] > 0].tolist())
    return 8 * len(zlib.compress(text, 9)) / len(text)


def hours(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{seconds:02}'


def over_sources(
    sources: list[data.Source], measure: Callable[[data.EvaluationSet], dict[str, float]]
) -> dict[str, float]:
    """What `measure` says, as the mean over the sources by their share of the training rows; with
    several sources also that of each, as name/source."""
    results = [measure(source.evaluation) for source in sources]
    shares = [source.share for source in sources]
    out = {
        name: sum(share * result[name] for share, result in zip(shares, results, strict=True))
        for name in results[0]
    }
    for source, result in zip(sources, results, strict=True):
        if len(sources) > 1:
            out |= {f'{name}/{source.name}': value for name, value in result.items()}
    return out


def open_data(
    config: ConfigDict,
) -> tuple[data.Loader | data.Mixture, list[data.Source], tiktoken.Encoding]:
    """The training stream, its sources with their evaluation sets, and their tokenizer.

    Raises ValueError if the vocabulary does not fit.
    """
    d = config.data
    loader, sources = data.open_sources(
        d.sources or (('data', d.path, 1.0),),
        d.tokenizer,
        config.batch_size,
        config.seq_len,
        config.seed,
        config.eval.batches,
    )
    encoding = sources[0].evaluation.split.encoding()
    if encoding.n_vocab > config.model.vocab_size:
        raise ValueError(
            f'model.vocab_size={config.model.vocab_size} is below the {encoding.n_vocab} tokens of '
            f'{encoding.name}; use {-(-encoding.n_vocab // 128) * 128}'
        )
    return loader, sources, encoding


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
        """Fetches the metrics of a finished step, while the next one runs."""
        stats = metrics.pop('router')
        values = {name: float(value) for name, value in metrics.items()}
        every = self.config.log.loads_every
        values |= router_metrics(stats, self.config, loads=bool(every) and step % every == 0)
        rate = (step - self.last_step) / (time.perf_counter() - self.last_time)
        self.start(step)
        speed = {
            'tokens_per_second': rate * self.step_tokens,
            'mfu': rate * self.step_flops / self.peak,
        }
        self.writer.write(step=step, tokens=step * self.step_tokens, **values, **speed)
        self.writer.say(
            f'step {step}/{self.config.steps}  loss {values["loss"]:.4f}  '
            f'grad norm {values["grad_norm"]:.3f}  {speed["tokens_per_second"]:,.0f} tokens/s  '
            f'MFU {speed["mfu"]:.1%}  ETA {hours((self.config.steps - step) / rate)}'
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


def start_state(
    config: ConfigDict, mesh: Mesh, checkpoints: Checkpointer, start: int, init_from: str
) -> Tree:
    """The state after step `start`; at 0 a new one, with the parameters of the run `init_from`."""
    if start:
        return restore_state(checkpoints, start, abstract_state(config, mesh))
    state = init_state(config, mesh)
    if init_from:
        del state['params']  # make room
        state['params'] = load_params(init_from, abstract_state(config, mesh)['params'])
    return state


def train(config: ConfigDict, workdir: str, init_from: str = '') -> dict[str, Any]:
    """The whole run, or what is left of it in the workdir; returns the summary of what was done."""
    validate(config, jax.device_count())
    path, c = os.path.join(workdir, 'checkpoints'), config.checkpoint
    with Checkpointer(path, c.keep, c.keep_every) as checkpoints, StopSignals() as stop:
        return run(config, workdir, checkpoints, stop, init_from)


def run(
    config: ConfigDict, workdir: str, checkpoints: Checkpointer, stop: StopSignals, init_from: str
) -> dict[str, Any]:
    started = time.perf_counter()
    start, where = first_step(config, workdir, checkpoints)
    writer = Writer(workdir, config, start)
    if where:
        writer.say(where)
    if start >= config.steps:
        return {}
    checkpoints.clean()
    loader, sources, encoding = open_data(config)
    if config.data.isolate_documents:
        config.model.document_end = encoding.eot_token
    writer.keep(TOKENIZER, tokenizer_record(encoding))
    sample = make_sampler(config, encoding) if config.log.sample_every else None
    mesh = make_mesh(config.mesh)
    n_params = count(declared_params(config))
    writer.say(f'{n_params:,} parameters · {loader.n_tokens:,} tokens · workdir {workdir}')
    progress = Progress(config, mesh, writer)

    put = functools.partial(put_batch, config=config, mesh=mesh)
    state = start_state(config, mesh, checkpoints, start, init_from)
    compile_start = time.perf_counter()
    train_step = lower_train_step(config, mesh).compile()
    writer.say(f'compiled in {time.perf_counter() - compile_start:.1f} s')
    evaluate = make_evaluation(config, mesh, encoding)

    evaluation: dict[str, float] = {}
    pending = None  # the metrics of the step before, fetched while the present one runs
    progress.start(start)
    batches = data.prefetch(lambda i: put(loader.batch_at, i), start, config.steps)
    for step, batch in enumerate(batches, start=start + 1):
        state, metrics = train_step(state, batch)
        if pending:
            progress.log(*pending)
        pending = (step, metrics) if progress.logs(step) else None
        stopping = stop.asked() and step < config.steps
        pauses = progress.evaluates(step) or progress.samples(step) or progress.saves(step)
        if pending and (pauses or stopping):
            progress.log(*pending)  # what a checkpoint includes is logged before it
            pending = None
        if progress.evaluates(step) and not stopping:
            jax.block_until_ready(state)
            paused = time.perf_counter()
            evaluation = over_sources(sources, functools.partial(evaluate, state['params']))
            progress.log_evaluation(step, evaluation, time.perf_counter() - paused)
        if sample and progress.samples(step) and not stopping:
            jax.block_until_ready(state)
            paused = time.perf_counter()
            samples = sample(state['params'], step)
            progress.log_samples(step, samples, time.perf_counter() - paused)
        if progress.saves(step) or stopping:
            checkpoints.save(step, state, config.to_dict())
        if stopping:
            break
    batches.close()
    if pending:
        progress.log(*pending)
    jax.block_until_ready(state)
    checkpoints.wait()
    if stopping:
        writer.say(f'stopped by a signal: step {step} is saved, the same command goes on from it')
    summary = {
        'parameters': n_params,
        'active_parameters': count(declared_params(config), active=True),
        'tokens': (step - start) * progress.step_tokens,
        'seconds': time.perf_counter() - started,
        **evaluation,
    }
    if evaluation and writer.active and not stopping:
        summary |= over_sources(
            sources, lambda batches: {'zlib_bits_per_byte': zlib_bits_per_byte(batches, encoding)}
        )
    writer.say('\n'.join(f'{name:>22}  {value:,.4g}' for name, value in summary.items()))
    return summary


def keep_freed_memory() -> None:
    """Lets glibc keep what XLA:CPU frees for the next step, instead of returning it to the system
    and faulting it in again page by page: that took a third of a matmul's time. The price is that
    the process holds its peak. On other C libraries nothing changes.
    """
    if platform.libc_ver()[0] != 'glibc':
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_arena_max, 1)


FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    keep_freed_memory()
    if FLAGS.cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', FLAGS.cpu_devices)
    name = time.strftime('runs/%Y%m%d-%H%M%S')
    try:
        train(FLAGS.config, FLAGS.workdir or name, FLAGS.init_from or '')
    except CheckpointError as error:
        sys.exit(str(error))
    except ValueError as error:
        if not str(error).startswith('the config cannot run'):
            raise
        sys.exit(str(error))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
    flags.DEFINE_string('workdir', None, 'Where the run goes; a new folder in runs/ by default.')
    flags.DEFINE_string(
        'init_from', None, 'Start from the parameters of this workdir or checkpoint folder.'
    )
    flags.DEFINE_integer('cpu_devices', 0, 'Simulate this many devices on the CPU.')
    flags.mark_flag_as_required('config')
    app.run(main)
