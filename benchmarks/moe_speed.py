"""The MoE layer beside a dense SwiGLU of the same active FLOPs, forward and backward.

    python benchmarks/moe_speed.py
    python benchmarks/moe_speed.py --sequences=64

On one device, 4,096 tokens or as many as asked for, D 256, each token meets 2 experts of width 512
(none shared): the dense layer is 1,024 wide. `time_over_dense` is the whole layer with router,
dispatch and combination; the FLOPs are the compiler's count of the parts. What grows with the
number of experts is reading their weights and writing their gradients, 1.6 MB each: the more
tokens, the less it weighs.
"""

import json
import os
import sys
import time
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
from absl import app, flags

from config import ModelConfig
from configs import default
from layers.dense import swiglu, swiglu_params
from layers.moe import dispatch, moe, moe_params
from machine.memory import keep_freed_memory
from model import model_config
from parallel import AXES, Array, P, global_sum, init_params, make_mesh, varying

FLAGS = flags.FLAGS
T, D, WIDTH, CHOICES = 256, 256, 512, 2


def configure(n_experts: int) -> ModelConfig:
    c = default.get_config()
    c.check_vma = False  # for the kernels of GPUs
    c.model.update(
        d_model=D, block=('moe',), n_experts=n_experts, experts_per_token=CHOICES,
        n_shared_experts=0, d_expert=WIDTH, d_ff=WIDTH * CHOICES,
    )  # fmt: skip
    return model_config(c, jax.default_backend())


def on_one_device(f: Callable) -> Callable:
    def body(*args):
        return jax.tree.map(global_sum, f(*jax.tree.map(lambda x: varying(x, AXES), args)))

    mapped = jax.shard_map(body, mesh=make_mesh({}), in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped)


def forward_backward(layer: Callable, cfg: ModelConfig) -> Callable:
    def f(params, x_BTD, d_BTD):
        out, vjp = jax.vjp(lambda p, x: layer(p, x, cfg)[0], params, x_BTD)
        return vjp(d_BTD + 0 * out)

    return on_one_device(f)


def moves_only(_, x_BTD: Array, expert_A: Array, cfg: ModelConfig) -> Array:
    """Dispatch and return of all rows, with no expert between."""
    x_GD, _, return_rows = dispatch(x_BTD.reshape(-1, D), expert_A, len(expert_A), cfg)
    return return_rows(x_GD)


def best_seconds(pairs: list[tuple[Callable, tuple]], repeats: int = 12) -> list[float]:
    """The best time of each, measured in turns, since the clock drifts."""
    best = [float('inf')] * len(pairs)
    for _ in range(repeats):
        for i, (f, args) in enumerate(pairs):
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def main(_):
    keep_freed_memory()
    B = FLAGS.sequences
    keys = jax.random.split(jax.random.key(0), 3)
    x, d = (jax.random.normal(k, (B, T, D)) for k in keys[:2])
    cfgs = {n: configure(n) for n in (8, 16, 32, 64)}
    dense = init_params(keys[2], swiglu_params(cfgs[8], WIDTH * CHOICES), make_mesh({}))
    runs = [(forward_backward(swiglu, cfgs[8]), (dense, x, d))]
    for cfg in cfgs.values():
        params = init_params(keys[2], moe_params(cfg), make_mesh({}))
        runs.append((forward_backward(moe, cfg), (params, x, d)))
    dense_seconds, *moe_seconds = best_seconds(runs)
    expert_A = jax.random.randint(keys[2], (B * T * CHOICES,), 0, 16)
    moving = on_one_device(
        lambda x, e, d: jax.vjp(lambda x: moves_only(None, x, e, cfgs[16]), x)[1](d)
    )
    cost = moving.lower(x, expert_A, jnp.zeros((len(expert_A), D))).compile().cost_analysis()
    expert_flops = 3 * 6 * B * T * CHOICES * D * WIDTH
    result = {
        'dense_ms': dense_seconds * 1e3,
        'expert_gflop': expert_flops / 1e9,
        'dispatch_and_combine_gflop': cost['flops'] / 1e9,
        'dispatch_share_of_flops': cost['flops'] / expert_flops,
    }
    for n, seconds in zip(cfgs, moe_seconds, strict=True):
        result |= {f'moe_ms_{n}_experts': seconds * 1e3}
        result |= {f'time_over_dense_{n}_experts': seconds / dense_seconds}
    for name, value in result.items():
        print(f'{name:>32}  {value:,.4g}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_integer('sequences', 16, 'Of 256 tokens.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    app.run(main)
