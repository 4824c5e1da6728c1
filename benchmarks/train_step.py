"""Speed of the training step, beside this machine's own float32 matmul rate in the same run.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --block=dense,moe --attention=mla --cpu_devices=8 --mesh=2,2,2

The model: D 256, 4 heads, 8 layers, T 256, vocabulary 8192, tied head; 4,096 tokens per step.
Layers with experts have 8 of width 512, of which a token meets 2, and a shared one. FLOP/s are the
model's useful ones (model.flops_per_token). Their share of the matmul rate is the median over
rounds that each measure a matmul, steps, and the matmul again, since the clock drifts by a third.
"""

from collections.abc import Callable
from typing import NamedTuple

import common
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import default
from machine.chips import peak_flops
from model import flops_per_token
from parallel import Array, Tree, count, make_mesh
from runtime.config_checks import validate
from train_step import Setup, init_state, lower_train_step, put_batch, setup

FLAGS = flags.FLAGS
B, T, V = 16, 256, 8192


class Compiled(NamedTuple):
    """A compiled training step, and what it took."""

    setup: Setup
    step: Callable[[Tree, Array], tuple[Tree, dict[str, Array]]]
    seconds: float
    program_lines: int
    temp_bytes: int


def configure(n_layers: int) -> ConfigDict:
    c = default.get_config()
    c.batch_size, c.seq_len = B, T
    c.compute_dtype, c.microbatches = FLAGS.dtype, FLAGS.microbatches
    c.model.update(vocab_size=V, d_model=256, n_layers=n_layers, d_ff=FLAGS.d_ff)
    c.model.update(attention=FLAGS.attention, remat=FLAGS.remat, block=tuple(FLAGS.block))
    c.model.update(n_experts=8, experts_per_token=2, n_shared_experts=1, d_expert=512)
    c.model.update(attention_block=FLAGS.attention_block, loss_chunk=FLAGS.loss_chunk)
    c.mesh.dp, c.mesh.fsdp, c.mesh.tp = map(int, FLAGS.mesh)
    validate(c, jax.device_count(), needs_data=False)
    return c


def compile_step(n_layers: int) -> Compiled:
    """Compiles the step of a model of so many layers."""
    config = configure(n_layers)
    s = setup(config, make_mesh(config.mesh))
    lowering, lowered = common.timed(lower_train_step, s)
    compiling, compiled = common.timed(lowered.compile)
    lines, memory = lowered.as_text().count('\n'), compiled.memory_analysis()
    return Compiled(s, compiled, lowering + compiling, lines, memory.temp_size_in_bytes)


def measure(compiled: Compiled, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the seconds of steps, [rounds, 3], and the FLOP/s of the matmuls around the rounds,
    [rounds + 1]."""
    s = compiled.setup
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    batch, state = put_batch(lambda _, rows: tokens[rows], 0, s), init_state(s)
    seconds, peaks = [], [peak_flops(s.config, s.mesh)[0]]
    for _ in range(rounds):
        for _ in range(3):
            taken, (state, _) = common.timed_until_ready(compiled.step, state, batch)
            seconds.append(taken)
        peaks.append(peak_flops(s.config, s.mesh)[0])
    return np.array(seconds).reshape(rounds, 3), np.array(peaks)


def main() -> common.Figures:
    common.prepare_devices(FLAGS.cpu_devices, FLAGS.keep_freed_memory)
    compiled = compile_step(8)
    seconds, peaks = measure(compiled, FLAGS.repeats)
    flops = B * T * flops_per_token(compiled.setup.model, T)
    best = float(np.min(seconds))
    around = (peaks[1:] + peaks[:-1]) / 2
    figures: common.Figures = {
        'parameters': count(compiled.setup.declared),
        'tokens_per_second': B * T / best,
        'median_tokens_per_second': B * T / float(np.median(seconds)),
        'model_gflops': flops / best / 1e9,
        'matmul_gflops': float(np.max(peaks)) / 1e9,
        'share_of_matmul_rate': float(np.median(flops / np.min(seconds, axis=1) / around)),
        'compile_seconds': compiled.seconds,
        'program_lines': compiled.program_lines,
        'temp_mb': compiled.temp_bytes / 1e6,
    }
    for n_layers in (4, 16) if FLAGS.depths else ():
        other = compile_step(n_layers)
        figures[f'compile_seconds_{n_layers}_blocks'] = other.seconds
        figures[f'program_lines_{n_layers}'] = other.program_lines
    return figures


if __name__ == '__main__':
    flags.DEFINE_string('attention', 'gqa', 'gqa or mla.')
    flags.DEFINE_list('block', ['dense'], 'model.block.')
    flags.DEFINE_string('dtype', 'float32', 'Compute type.')
    flags.DEFINE_integer('microbatches', 1, 'Gradient accumulation.')
    flags.DEFINE_string('remat', 'none', 'none, dots or full.')
    flags.DEFINE_list('mesh', ['1', '1', '1'], 'dp,fsdp,tp.')
    flags.register_validator(
        'mesh', lambda sizes: len(sizes) == 3 and all(x.isdecimal() for x in sizes), 'as 1,2,4'
    )
    flags.DEFINE_integer('attention_block', 256, 'model.attention_block.')
    flags.DEFINE_integer('loss_chunk', 1024, 'model.loss_chunk.')
    flags.DEFINE_integer('d_ff', 688, 'SwiGLU width; 8/3 D costs what a GELU of 4 D does.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulated devices.')
    flags.DEFINE_integer('repeats', 5, 'Rounds of three steps between two matmuls.', lower_bound=1)
    flags.DEFINE_boolean('keep_freed_memory', True, 'As train.py does; off to compare.')
    flags.DEFINE_boolean('depths', False, 'Also compile 4 and 16 blocks.')
    common.run(main)
