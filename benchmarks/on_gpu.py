"""What one GPU reaches, beside what plan.py expects: two models, and kernels against others.

    bash benchmarks/on_gpu.sh                  # on one GPU, at most 9 minutes with the tests
    python benchmarks/on_gpu.py --small --json # any machine: the same with small sizes

A dense model of 350M parameters and a mixture of experts of 1.1B (of which a token meets 350M):
tokens per second, the share of the chip's peak (MFU) by the fastest step, the peak of memory, and
what plan.py expects of both; with --fp8 once more with model.matmul_type='fp8'. Then forward and
backward of kernels that stand for each other, in turns: attention by cuDNN and blockwise, experts
by Pallas and by ragged_dot; the best of each. A figure that the machine has no means to measure
(MFU without a known peak, memory that the platform does not report) is left out. A part that fails
says why as its figure, so that those after it are measured all the same.
"""

import functools
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from common import Figures
from ml_collections import ConfigDict

from config import FP8, ConfigError
from configs import default
from layers.attention_kernels import ATTENTION_KERNELS
from layers.expert_kernels import BLOCK, EXPERT_KERNELS, grouped_swiglu
from layers.kernels import Kernels
from machine.chips import chip_of
from machine.memory import memory_use
from model import flops_per_token, model_for
from parallel import AXES, P, count, global_sum, make_mesh, varying
from planning.expected import expectation
from planning.roofline import estimate
from runtime.config_checks import validate
from train_step import init_state, lower_train_step, put_batch, setup

FLAGS = flags.FLAGS
STEPS = 10


def config_of(name: str, matmul_type: str) -> ConfigDict:
    """Returns the config of the dense model or of the one with experts."""
    c, small = default.get_config(), FLAGS.small
    c.batch_size, c.seq_len = (2, 64) if small else (16, 2048)
    c.microbatches = 1 if small else 4
    c.compute_dtype, c.check_vma = 'bfloat16', False
    c.model.update(
        vocab_size=512 if small else 32_768, d_model=64 if small else 1024, attention='gqa',
        n_layers=2 if small else 24, n_heads=4 if small else 16, n_kv_heads=4 if small else 16,
        head_dim=16 if small else 64, d_ff=128 if small else 2816, remat='dots',
        attention_block=32 if small else 512, loss_chunk=64 if small else 2048,
        block=('dense',) if name == 'dense' else ('moe',), n_experts=8, experts_per_token=2,
        n_shared_experts=0, d_expert=64 if small else 1408, matmul_type=matmul_type,
    )  # fmt: skip
    validate(c, 1, needs_data=False)
    return c


def measure_model(name: str, matmul_type: str) -> Figures:
    """Returns tokens per second, MFU and peak memory of a model's training step, and the plan's."""
    config = config_of(name, matmul_type)
    s = setup(config, make_mesh({}, jax.devices()[:1]))
    B, T, V = config.batch_size, config.seq_len, config.model.vocab_size
    tokens = np.random.default_rng(0).integers(0, V, (B, T + 1), np.int32)
    batch, state = put_batch(lambda _, rows: tokens[rows], 0, s), init_state(s)
    compiling, step = common.timed(lower_train_step(s).compile)
    seconds = []
    for _ in range(STEPS):
        taken, (state, metrics) = common.timed_until_ready(step, state, batch)
        seconds.append(taken)
    assert np.isfinite(float(metrics['loss']))
    best, memory = min(seconds[1:]), step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    figures: Figures = {
        'parameters': count(s.declared),
        'tokens_per_second': B * T / best,
        'compile_seconds': compiling,
        'compiled_gb': (held + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9,
    }
    if peak := memory_use().get('device_bytes'):
        figures['peak_gb_so_far'] = peak / 1e9
    if chip := chip_of(jax.devices()[0].device_kind):
        e = estimate(config, chip)
        flops = B * T * flops_per_token(s.model, T)
        figures |= {
            'mfu': flops / best / chip.flops,
            'expected_tokens_per_second': B * T / expectation(e).seconds.value,
            'expected_gb': e.memory.peak / 1e9,
        }
    return figures


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


def on_one_device(f: Callable) -> Callable:
    """Returns f, jitted, inside shard_map on a mesh of one device."""

    def body(*args: jax.Array) -> jax.Array:
        return jax.tree.map(global_sum, f(*jax.tree.map(lambda x: varying(x, AXES), args)))

    mesh = make_mesh({}, jax.devices()[:1])
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped)


def runnable(kernels: Kernels, names: tuple[str, ...]) -> list[str]:
    """Returns those of the kernels that are written for this platform, or for any."""
    platform = jax.default_backend()
    return [name for name in names if platform in kernels[name].platforms]


def attention_runs() -> dict[str, Callable[[], tuple]]:
    """Returns a call for each kernel of attention: the gradients of queries, keys and values."""
    B, N, T, H = (1, 2, 64, 16) if FLAGS.small else (4, 16, 4096, 128)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d = (jax.random.normal(key, (B, N, T, H), jnp.bfloat16) for key in keys)
    cfg, runs = model_for(config_of('dense', 'compute'), jax.default_backend()), {}
    for name in runnable(ATTENTION_KERNELS, ('cudnn', 'blockwise')):
        attend = ATTENTION_KERNELS[name].compute

        def gradients(q, k, v, d, attend=attend):
            def f(q, k, v):
                return attend(q[:, :, None], k, v, None, H**-0.5, cfg)[:, :, 0]

            return jax.vjp(f, q, k, v)[1](d)

        runs[f'attention_{name}'] = functools.partial(on_one_device(gradients), q, k, v, d)
    return runs


def expert_runs() -> dict[str, Callable[[], tuple]]:
    """Returns a call for each kernel of experts: the gradients of rows and matrices."""
    X, D, F, E = (64, 32, 16, 4) if FLAGS.small else (16_384, 1024, 1408, 8)
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {'w_gate': (E, D, F), 'w_up': (E, D, F), 'w_down': (E, F, D)}
    w = {
        name: (jax.random.normal(key, shape) * shape[1] ** -0.5).astype(jnp.bfloat16)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    x, d = (jax.random.normal(key, (X + BLOCK, D), jnp.bfloat16) for key in keys[3:])
    sizes, runs = jnp.full((E,), X // E), {}
    # ragged_dot is written for TPUs and runs anywhere: on a GPU, E times the FLOPs
    for name in [*runnable(EXPERT_KERNELS, ('pallas', 'blocks')), 'ragged_dot']:

        def gradients(x, w, d, sizes, name=name):
            def f(x, w):
                return grouped_swiglu(x, w, sizes, name)[:X]

            dx, dw = jax.vjp(f, x, w)[1](d[:X])
            return dx[:X], dw

        runs[f'experts_{name}'] = functools.partial(on_one_device(gradients), x, w, d, sizes)
    return runs


def measure_kernels(runs: dict[str, Callable[[], tuple]]) -> Figures:
    """Returns the milliseconds of each run, and how far results are from those of the last."""
    results = {
        name: [np.asarray(y, np.float32) for y in jax.tree.leaves(f())] for name, f in runs.items()
    }
    last = list(results.values())[-1]
    figures: Figures = {
        f'{name}_ms': 1e3 * t for name, t in common.best_seconds(runs, FLAGS.rounds).items()
    }
    for name, found in list(results.items())[:-1]:
        figures[f'{name}_error'] = max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(found, last, strict=True)
        )
    return figures


def main() -> Figures:
    common.prepare_devices()
    parts: dict[str, Callable[[], Figures]] = {}
    for matmul_type in ('compute', FP8) if FLAGS.fp8 else ('compute',):
        for name in FLAGS.models:
            part = functools.partial(measure_model, name, matmul_type)
            parts[f'{name}_' if matmul_type != FP8 else f'{name}_fp8_'] = part
    parts |= {
        '': lambda: measure_kernels(attention_runs()),
        'of_': lambda: measure_kernels(expert_runs()),
    }
    figures: Figures = {'device': jax.devices()[0].device_kind}
    for name, part in parts.items():
        try:
            figures |= {(name + key).removeprefix('of_'): x for key, x in part().items()}
        except (jax.errors.JaxRuntimeError, ConfigError) as error:
            figures[f'{name}failed'] = str(error).splitlines()[0][:200]
    return figures


if __name__ == '__main__':
    flags.DEFINE_boolean('small', False, 'Small sizes, for a machine without a GPU.')
    flags.DEFINE_boolean('fp8', False, "Also with model.matmul_type='fp8'.")
    flags.DEFINE_integer('rounds', 5, 'Rounds of the kernels, of which the best counts.', 1)
    flags.DEFINE_list('models', ['dense', 'moe'], 'Models to run.')
    flags.register_validator('models', lambda names: {*names} <= {'dense', 'moe'}, 'dense, moe')
    common.run(main)
