"""Speed of the training step, beside this machine's own float32 matmul rate in the same run.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --block=dense,moe --attention=mla --cpu_devices=8 --mesh=2,2,2

The model: D 256, 4 heads, 8 layers, T 256, vocabulary 8192, tied head; 4,096 tokens a step. Layers
with experts have 8 of width 512, of which a token meets 2, and a shared one. FLOP/s are the model's
useful ones (model.flops_per_token). Their share of the matmul rate is the median over rounds that
each measure a matmul, steps, and the matmul again, since the clock drifts by a third.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from absl import app, flags

import train_step
from configs import default
from machine.chips import peak_flops
from machine.memory import keep_freed_memory
from model import flops_per_token, model_params
from parallel import count, make_mesh
from runtime import config_checks

FLAGS = flags.FLAGS


def configure(n_layers: int, mesh: list[int]):
    c = default.get_config()
    c.batch_size, c.seq_len, c.data.path = 16, 256, 'none'
    c.compute_dtype, c.microbatches = FLAGS.dtype, FLAGS.microbatches
    c.model.update(vocab_size=8192, d_model=256, n_layers=n_layers, d_ff=FLAGS.d_ff)
    c.model.update(attention=FLAGS.attention, remat=FLAGS.remat, block=tuple(FLAGS.block))
    c.model.update(n_experts=8, experts_per_token=2, n_shared_experts=1, d_expert=512)
    c.model.update(attention_block=FLAGS.attention_block, loss_chunk=FLAGS.loss_chunk)
    c.mesh.update(dp=mesh[0], fsdp=mesh[1], tp=mesh[2])
    config_checks.validate(c, jax.device_count())
    return c


def compile_step(config, mesh):
    state = train_step.init_state(config, mesh)
    tokens = np.random.default_rng(0).integers(0, 8192, (16, 257), np.int32)
    batch = train_step.put_batch(lambda _, rows: tokens[rows], 0, config, mesh)
    start = time.perf_counter()
    lowered = train_step.make_train_step(config, mesh).lower(state, batch)
    compiled = lowered.compile()
    return compiled, state, batch, time.perf_counter() - start, lowered.as_text().count('\n')


def main(_):
    if FLAGS.keep_freed_memory:
        keep_freed_memory()
    if FLAGS.cpu_devices:
        jax.config.update('jax_num_cpu_devices', FLAGS.cpu_devices)
    sizes = [int(x) for x in FLAGS.mesh.split(',')]
    config = configure(8, sizes)
    mesh = make_mesh(config.mesh)
    step, state, batch, compile_s, lines = compile_step(config, mesh)
    cfg = config.model_config(config)
    flops = 4096 * flops_per_token(cfg, 256)
    peaks, rounds = [peak_flops(config, mesh)[0]], []
    for _ in range(FLAGS.repeats):
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - start)
        rounds.append(seconds)
        peaks.append(peak_flops(config, mesh)[0])
    around = (np.array(peaks[1:]) + np.array(peaks[:-1])) / 2
    best = float(np.min(rounds))
    result = {
        'parameters': count(model_params(cfg)),
        'tokens_per_second': 4096 / best,
        'median_tokens_per_second': 4096 / float(np.median(rounds)),
        'model_gflops': flops / best / 1e9,
        'matmul_gflops': max(peaks) / 1e9,
        'share_of_matmul_rate': float(np.median(flops / np.min(rounds, axis=1) / around)),
        'compile_seconds': compile_s,
        'program_lines': lines,
        'temp_mb': step.memory_analysis().temp_size_in_bytes / 1e6,
    }
    if FLAGS.depths:
        for n_layers in (4, 16):
            _, _, _, s, n = compile_step(configure(n_layers, sizes), mesh)
            result |= {f'compile_seconds_{n_layers}_blocks': s, f'program_lines_{n_layers}': n}
    for name, value in result.items():
        print(f'{name:>30}  {value:,.3f}' if isinstance(value, float) else f'{name:>30}  {value:,}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_string('attention', 'gqa', 'gqa or mla.')
    flags.DEFINE_list('block', ['dense'], 'model.block.')
    flags.DEFINE_string('dtype', 'float32', 'Compute type.')
    flags.DEFINE_integer('microbatches', 1, 'Gradient accumulation.')
    flags.DEFINE_string('remat', 'none', 'none, dots or full.')
    flags.DEFINE_string('mesh', '1,1,1', 'dp,fsdp,tp.')
    flags.DEFINE_integer('attention_block', 256, 'model.attention_block.')
    flags.DEFINE_integer('loss_chunk', 1024, 'model.loss_chunk.')
    flags.DEFINE_integer('d_ff', 688, 'SwiGLU width; 8/3 D costs what a GELU of 4 D does.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulated devices.')
    flags.DEFINE_integer('repeats', 5, 'Rounds of three steps between two matmuls.')
    flags.DEFINE_boolean('keep_freed_memory', True, 'As train.py does; off to compare.')
    flags.DEFINE_boolean('depths', False, 'Also compile 4 and 16 blocks.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    app.run(main)
