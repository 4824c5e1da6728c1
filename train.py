"""Trains a model.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    python train.py --config=configs/tiny.py --config.optimizer.peak_lr=1e-3
    python train.py --config=configs/tiny.py --cpu_devices=8 --config.mesh.fsdp=4 --config.mesh.tp=2

The workdir receives config.json and metrics.jsonl, one object a logged step.
"""

import ctypes
import functools
import json
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from absl import app, flags
from jax import lax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict, config_flags

import data
from model import (
    ATTENTION,
    FEED_FORWARD,
    REMAT,
    ModelConfig,
    flops_per_token,
    loss,
    model_params,
)
from optimizer import OptimizerConfig, adamw, adamw_init, clip_by_global_norm, learning_rate
from parallel import (
    AXES,
    BATCH,
    PP,
    TP,
    Array,
    P,
    Tree,
    count,
    free_axes,
    global_sum,
    init_params,
    make_mesh,
    map_params,
    psum,
    specs,
    sum_gradients,
    varying,
)
from tokenizer import token_bytes

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
# Configuration
# ---------------------------------------------------------------------------------------------


def model_config(config: ConfigDict) -> ModelConfig:
    return ModelConfig(compute_dtype=config.compute_dtype, **config.model)


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    return OptimizerConfig(steps=config.steps, **config.optimizer)


def divisors(n: int) -> str:
    small = [str(d) for d in range(1, min(n, 64) + 1) if n % d == 0]
    return ', '.join(small[:-1]) + (' or ' if small[:-1] else '') + small[-1]


def division_errors(config: ConfigDict) -> Iterator[str]:
    """What does not divide, with what would."""
    m, mesh = config.model, config.mesh
    tp = {'model.n_heads': m.n_heads, 'model.d_ff': m.d_ff, 'model.vocab_size': m.vocab_size}
    fsdp = {'model.d_model': m.d_model}
    if m.attention == 'mla':
        fsdp |= {'model.kv_rank': m.kv_rank} | ({'model.q_rank': m.q_rank} if m.q_rank else {})
    elif m.n_kv_heads > 1:
        tp['model.n_kv_heads'] = m.n_kv_heads
    for axis, sizes in (('tp', tp | {'seq_len': config.seq_len}), ('fsdp', fsdp)):
        for name, size in sizes.items():
            if size % mesh[axis]:
                yield (
                    f'{name}={size} is not divisible by mesh.{axis}={mesh[axis]}; '
                    f'use a {axis} of {divisors(size)}'
                )
    shards = mesh.dp * mesh.fsdp * mesh.ep * config.microbatches
    if config.batch_size % shards:
        yield (
            f'batch_size={config.batch_size} is not divisible by mesh.dp * mesh.fsdp * mesh.ep * '
            f'microbatches={shards}; use a multiple of {shards}'
        )
    if m.n_layers % len(m.block):
        yield (
            f'model.n_layers={m.n_layers} is not a multiple of the {len(m.block)} layers of '
            f'model.block={tuple(m.block)}; use a multiple of {len(m.block)}'
        )
    if m.attention == 'gqa' and m.n_heads % m.n_kv_heads:
        yield (
            f'model.n_heads={m.n_heads} is not divisible by model.n_kv_heads={m.n_kv_heads}; '
            f'use {divisors(m.n_heads)} key/value heads'
        )
    if config.seq_len % min(m.attention_block, config.seq_len):
        yield (
            f'seq_len={config.seq_len} is not a multiple of model.attention_block='
            f'{m.attention_block}; use a block of {divisors(config.seq_len)}'
        )
    rotary = 'rope_dim' if m.attention == 'mla' else 'head_dim'
    if m[rotary] % 2:
        yield f'model.{rotary}={m[rotary]} is odd, but rotation takes pairs; use {m[rotary] + 1}'


def value_errors(config: ConfigDict) -> Iterator[str]:
    """Values out of range and names that do not exist."""
    may_be_zero = {
        'seed', 'eval.every', 'eval.batches', 'log.every', 'optimizer.warmup_steps',
        'optimizer.decay_steps', 'model.q_rank',
    }  # fmt: skip
    flat = dict(config)
    for group in ('model', 'mesh', 'data', 'optimizer', 'eval', 'log'):
        flat |= {f'{group}.{k}': v for k, v in flat.pop(group).items()}
    for name, value in flat.items():
        least = 0 if name in may_be_zero else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            yield f'{name}={value} is below {least}; use {least} or more'
        if isinstance(value, float) and value < 0:
            yield f'{name}={value} is negative; use 0 or more'
    choices = {
        'compute_dtype': ('float32', 'bfloat16'),
        'model.attention': ATTENTION,
        'model.remat': REMAT,
        'model.rope_scaling': ('none', 'linear', 'yarn'),
        'optimizer.schedule': ('cosine', 'wsd'),
    }
    for name, allowed in choices.items():
        if flat[name] not in allowed:
            yield f'{name}={flat[name]!r} is unknown; use one of {", ".join(allowed)}'
    for kind in flat['model.block']:
        if kind not in FEED_FORWARD:
            yield f'model.block has the unknown kind {kind!r}; use {", ".join(FEED_FORWARD)}'
    if not flat['model.block']:
        yield "model.block=() is empty; use at least one kind of layer, as in ('dense',)"
    if flat['model.dropout'] >= 1:
        yield f'model.dropout={flat["model.dropout"]} drops everything; use a share below 1'
    if flat['model.rope_factor'] < 1:
        yield f'model.rope_factor={flat["model.rope_factor"]} shortens the context; use 1 or more'
    for name in ('optimizer.b1', 'optimizer.b2'):
        if flat[name] >= 1:
            yield f'{name}={flat[name]} never forgets; use a value below 1'
    for axis in ('pp', 'ep'):
        if flat[f'mesh.{axis}'] > 1:
            yield f'mesh.{axis}={flat[f"mesh.{axis}"]}: this axis is not built yet; use 1'


def source_errors(config: ConfigDict) -> Iterator[str]:
    """What is wrong with data.path and data.sources."""
    d = config.data
    if not d.path and not d.sources:
        yield "data.path is empty; use a folder that data.py wrote, or 'stdlib'"
    if d.path and d.sources:
        yield f'data.path={d.path!r} and data.sources are both set; leave one of them empty'
    if d.isolate_documents:
        yield 'data.isolate_documents=True: this is not built yet; use False'
    form = "use ((name, path, weight), ...), as in (('web', 'tokens/web', 0.7), ...)"
    for source in d.sources:
        if not isinstance(source, tuple) or len(source) != 3:
            yield f'data.sources holds {source!r}; {form}'
            return
        name, path, weight = source
        if not isinstance(name, str) or not name or not isinstance(path, str) or not path:
            yield f'data.sources holds {source!r}, whose name or path is no text; {form}'
        if not isinstance(weight, int | float) or not 0 < weight < float('inf'):
            yield f'data.sources holds {source!r}, whose weight is not above 0; {form}'
    names = [source[0] for source in d.sources]
    if len(set(names)) < len(names):
        yield f'data.sources names {names} twice; use a name of its own for each source'


def validate(config: ConfigDict, n_devices: int) -> None:
    """Raises one ValueError with all that is wrong: each rule, its values, and the remedy."""
    errors = [*value_errors(config), *source_errors(config)]
    if not errors:
        errors += division_errors(config)
        needed = int(np.prod([config.mesh[axis] for axis in AXES]))
        if needed > n_devices:
            errors.append(
                f'the mesh takes {needed} devices and {n_devices} are there; use a smaller mesh, '
                f'or --cpu_devices={needed} to simulate them'
            )
    if errors:
        raise ValueError('the config cannot run:\n' + '\n'.join(f'  - {e}' for e in errors))


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------


def state_specs(declared: Tree) -> Tree:
    p = specs(declared)
    return {'params': p, 'moments': {'m': p, 'v': p}, 'step': P()}


def init_state(config: ConfigDict, mesh: Mesh) -> Tree:
    """Parameters, moments and the step number, on their devices."""
    declared = model_params(model_config(config))
    params = init_params(jax.random.key(config.seed), declared, mesh)
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, P()))
    return {'params': params, 'moments': adamw_init(params), 'step': step}


def gradients(
    params: Tree, tokens_MBT: Array, key: Array, declared: Tree, cfg: ModelConfig
) -> tuple[Tree, dict[str, Array]]:
    """Gradient of the mean loss over all valid targets of the step's global batch, and metrics.

    tokens_MBT: int32, this device's rows of each microbatch. The microbatches run one after the
    other and their gradients add up in float32; then, once, those of the devices do.
    """
    tokens_MBT = varying(tokens_MBT, (PP, TP))
    params = map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)
    n_targets = psum(jnp.sum(tokens_MBT[..., 1:] >= 0), BATCH).astype(jnp.float32)

    def loss_share(params: Tree, tokens_BT: Array, i: Array) -> tuple[Array, Array]:
        total, nll = loss(params, tokens_BT, cfg, jax.random.fold_in(key, i))
        return total / n_targets, nll / n_targets

    def accumulate(carry: tuple[Tree, Array], microbatch: tuple[Array, Array]):
        grads, nll_sum = carry
        (_, nll), new = jax.value_and_grad(loss_share, has_aux=True)(params, *microbatch)
        return (jax.tree.map(jnp.add, grads, new), nll_sum + nll), None

    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(n_targets))
    microbatches = (tokens_MBT, jnp.arange(tokens_MBT.shape[0]))
    (grads, nll), _ = lax.scan(accumulate, start, microbatches)
    return sum_gradients(grads, declared), {'loss': global_sum(nll)}


def make_train_step(config: ConfigDict, mesh: Mesh) -> Callable[[Tree, Array], tuple[Tree, dict]]:
    """jitted (state, tokens_MBT) -> (state, metrics); the state's buffers are donated."""
    cfg, optimizer = model_config(config), optimizer_config(config)
    declared = model_params(cfg)

    def train_step(state: Tree, tokens_MBT: Array) -> tuple[Tree, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(config.seed), state['step'])
        grads, metrics = gradients(state['params'], tokens_MBT, key, declared, cfg)
        grads, norm = clip_by_global_norm(grads, declared, optimizer.clip_norm)
        params, moments = adamw(
            state['params'], grads, state['moments'], state['step'], declared, optimizer
        )
        metrics |= {'grad_norm': norm, 'lr': learning_rate(state['step'], optimizer)}
        return {'params': params, 'moments': moments, 'step': state['step'] + 1}, metrics

    sharded = jax.shard_map(
        train_step,
        mesh=mesh,
        in_specs=(state_specs(declared), P(None, BATCH)),
        out_specs=(state_specs(declared), P()),
        check_vma=config.check_vma,
    )
    return jax.jit(sharded, donate_argnums=0)


def make_eval_step(config: ConfigDict, mesh: Mesh) -> Callable[[Tree, Array, Array], dict]:
    """jitted (params, tokens_MBT, token_bytes_V) -> sums of nats, targets and text bytes."""
    cfg = ModelConfig(**(vars(model_config(config)) | {'dropout': 0.0}))
    declared = model_params(cfg)

    def eval_step(params: Tree, tokens_MBT: Array, token_bytes_V: Array) -> dict[str, Array]:
        tokens_MBT = varying(tokens_MBT, (PP, TP))
        params = map_params(lambda p, x: varying(x, free_axes(p.spec)), declared, params)
        key = jax.random.key(0)
        nll_M = lax.map(lambda tokens_BT: loss(params, tokens_BT, cfg, key)[1], tokens_MBT)
        labels = tokens_MBT[..., 1:]
        n_bytes = jnp.where(labels >= 0, token_bytes_V[jnp.maximum(labels, 0)], 0)
        alike = lax.axis_size((PP, TP))  # devices that hold the same rows
        return {
            'nats': global_sum(jnp.sum(nll_M)),
            'targets': global_sum(jnp.sum(labels >= 0)) // alike,
            'bytes': global_sum(jnp.sum(n_bytes)) // alike,
        }

    sharded = jax.shard_map(
        eval_step,
        mesh=mesh,
        in_specs=(specs(declared), P(None, BATCH), P()),
        out_specs=P(),
        check_vma=config.check_vma,
    )
    return jax.jit(sharded)


def put_batch(
    batch_at: Callable[[int, slice], np.ndarray], i: int, config: ConfigDict, mesh: Mesh
) -> Array:
    """Batch i on the mesh: int32 [microbatches, batch_size / microbatches, seq_len + 1].

    A process reads only the rows of its own devices, and each of them once.
    """
    M, B = config.microbatches, config.batch_size // config.microbatches

    @functools.cache
    def read(start: int, stop: int) -> np.ndarray:
        return np.stack([batch_at(i, slice(m * B + start, m * B + stop)) for m in range(M)])

    sharding = NamedSharding(mesh, P(None, BATCH))
    return jax.make_array_from_callback(
        (M, B, config.seq_len + 1), sharding, lambda index: read(*index[1].indices(B)[:2])
    )


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------


def peak_flops(config: ConfigDict, mesh: Mesh) -> tuple[float, str]:
    """FLOP/s of the whole mesh, and where the figure comes from."""
    device = mesh.devices.flat[0]
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
    """metrics.jsonl in the workdir; only process 0 writes."""

    def __init__(self, workdir: str, config: ConfigDict):
        self.active = jax.process_index() == 0
        self.path = os.path.join(workdir, 'metrics.jsonl')
        if not self.active:
            return
        os.makedirs(workdir, exist_ok=True)
        if os.path.exists(self.path):
            raise ValueError(f'{workdir} holds a run already; use another --workdir, or remove it')
        with open(os.path.join(workdir, 'config.json'), 'w') as f:
            f.write(config.to_json(indent=2) + '\n')

    def write(self, **record: float) -> None:
        if self.active:
            with open(self.path, 'a') as f:
                f.write(json.dumps(record) + '\n')

    def say(self, text: str) -> None:
        if self.active:
            print(text, flush=True)


def evaluate(
    step: Callable, params: Tree, batches: data.EvaluationSet, put: Callable, bytes_V: Array
) -> dict[str, float]:
    """Mean loss (nats a token) and bits a byte of text over the fixed evaluation set."""
    sums = [step(params, put(batches.batch_at, i), bytes_V) for i in range(batches.n_batches)]
    nats, targets, n_bytes = (
        sum(float(s[name]) for s in sums) for name in ('nats', 'targets', 'bytes')
    )
    return {'eval_loss': nats / targets, 'eval_bits_per_byte': nats / np.log(2) / n_bytes}


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


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """The whole run; returns its summary."""
    validate(config, jax.device_count())
    started = time.perf_counter()
    loader, sources, encoding = open_data(config)
    mesh = make_mesh(config.mesh)
    writer = Writer(workdir, config)
    n_params = count(model_params(model_config(config)))
    peak, peak_source = peak_flops(config, mesh)
    step_tokens = config.batch_size * config.seq_len
    step_flops = step_tokens * flops_per_token(model_config(config), config.seq_len)
    writer.say(f'{n_params:,} parameters · {loader.n_tokens:,} tokens · workdir {workdir}')
    writer.say(f'mesh {dict(config.mesh)} · peak {peak / 1e12:.3g} TFLOP/s: {peak_source}')

    put = lambda batch_at, i: put_batch(batch_at, i, config, mesh)  # noqa: E731
    state = init_state(config, mesh)
    compile_start = time.perf_counter()
    first = put(loader.batch_at, 0)
    train_step = make_train_step(config, mesh).lower(state, first).compile()
    writer.say(f'compiled in {time.perf_counter() - compile_start:.1f} s')
    eval_step = make_eval_step(config, mesh)
    bytes_V = np.zeros(config.model.vocab_size, np.int32)
    bytes_V[: encoding.n_vocab] = token_bytes(encoding)
    bytes_V = jax.device_put(bytes_V, NamedSharding(mesh, P()))

    evaluation: dict[str, float] = {}
    last_time, last_step = time.perf_counter(), 0

    def log(step: int, metrics: dict[str, Array]) -> None:
        """Fetches the metrics of a finished step, while the next one runs."""
        nonlocal last_time, last_step
        values = {name: float(metrics[name]) for name in ('loss', 'grad_norm', 'lr')}
        rate = (step - last_step) / (time.perf_counter() - last_time)
        last_time, last_step = time.perf_counter(), step
        speed = {'tokens_per_second': rate * step_tokens, 'mfu': rate * step_flops / peak}
        writer.write(step=step, tokens=step * step_tokens, **values, **speed)
        writer.say(
            f'step {step}/{config.steps}  loss {values["loss"]:.4f}  '
            f'grad norm {values["grad_norm"]:.3f}  {speed["tokens_per_second"]:,.0f} tokens/s  '
            f'MFU {speed["mfu"]:.1%}  ETA {hours((config.steps - step) / rate)}'
        )

    pending = None
    batches = data.prefetch(lambda i: put(loader.batch_at, i), 0, config.steps)
    for step, batch in enumerate(batches, start=1):
        state, metrics = train_step(state, batch)
        if pending:
            log(*pending)
            pending = None
        last = step == config.steps
        if config.log.every and (step % config.log.every == 0 or last):
            pending = (step, metrics)
        if config.eval.every and (step % config.eval.every == 0 or last):
            if pending:
                log(*pending)
                pending = None
            jax.block_until_ready(state)
            paused = time.perf_counter()
            measure = functools.partial(
                evaluate, eval_step, state['params'], put=put, bytes_V=bytes_V
            )
            evaluation = over_sources(sources, measure)
            last_time += time.perf_counter() - paused
            writer.write(step=step, tokens=step * step_tokens, **evaluation)
            writer.say(
                f'step {step}/{config.steps}  eval loss {evaluation["eval_loss"]:.4f}  '
                f'{evaluation["eval_bits_per_byte"]:.4f} bits/byte'
            )
    if pending:
        log(*pending)
    jax.block_until_ready(state)
    summary = {
        'parameters': n_params,
        'active_parameters': n_params,
        'tokens': config.steps * step_tokens,
        'seconds': time.perf_counter() - started,
        **evaluation,
    }
    if evaluation and writer.active:
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
        train(FLAGS.config, FLAGS.workdir or name)
    except ValueError as error:
        if not str(error).startswith('the config cannot run'):
            raise
        sys.exit(str(error))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'A file of configs/.', lock_config=True)
    flags.DEFINE_string('workdir', None, 'Where the run goes; a new folder in runs/ by default.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulate this many devices on the CPU.')
    flags.mark_flag_as_required('config')
    app.run(main)
