"""The MoE layer beside a dense SwiGLU of the same active FLOPs, forward and backward.

    python benchmarks/moe_speed.py
    python benchmarks/moe_speed.py --sequences=64

On one device, 4,096 tokens or as many as asked for, D 256, each token meets 2 experts of width 512
(none shared): the dense layer is 1,024 wide. `time_over_dense` is the whole layer with router,
dispatch and combination; the FLOPs are the compiler's count of the parts. What grows with the
number of experts is reading their weights and writing their gradients, 1.6 MB each: the more
tokens, the less it weighs.
"""

import functools
from collections.abc import Callable

import common
import jax
import jax.numpy as jnp
from absl import flags

from config import ModelConfig
from configs import default
from layers.dense import swiglu, swiglu_params
from layers.moe import dispatch, moe, moe_params
from model import model_for
from parallel import AXES, Array, P, Tree, global_sum, init_params, make_mesh, varying

FLAGS = flags.FLAGS
T, D, F, C = 256, 256, 512, 2
EXPERTS = (8, 16, 32, 64)


def configure(n_experts: int) -> ModelConfig:
    """Returns a model of so many experts, with the kernels of this platform."""
    c = default.get_config()
    c.check_vma = False  # kernels of GPUs do not pass shard_map's check
    c.model.update(
        d_model=D, block=('moe',), n_experts=n_experts, experts_per_token=C,
        n_shared_experts=0, d_expert=F, d_ff=F * C,
    )  # fmt: skip
    return model_for(c, jax.default_backend())


def on_one_device(f: Callable) -> Callable:
    """Returns f, jitted, inside shard_map on a mesh of one device."""

    def body(*args: Tree) -> Tree:
        return jax.tree.map(global_sum, f(*jax.tree.map(lambda x: varying(x, AXES), args)))

    mapped = jax.shard_map(body, mesh=make_mesh({}), in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped)


def forward_backward(layer: Callable, cfg: ModelConfig) -> Callable:
    """Returns jitted (parameters, x_BTD, d_BTD) -> gradients of the parameters and of x_BTD."""

    def gradients(params: Tree, x_BTD: Array, d_BTD: Array) -> tuple[Tree, Array]:
        out_BTD, vjp = jax.vjp(lambda p, x_BTD: layer(p, x_BTD, cfg)[0], params, x_BTD)
        return vjp(d_BTD + 0 * out_BTD)

    return on_one_device(gradients)


def dispatch_flops(x_BTD: Array, expert_A: Array, cfg: ModelConfig) -> float:
    """Returns the compiler's count of FLOPs for bringing all rows to their experts and back with no
    expert between, forward and backward."""

    def move(x_BTD: Array, expert_A: Array) -> Array:
        x_XD, _, return_rows = dispatch(x_BTD.reshape(-1, D), expert_A, len(expert_A), cfg)
        return return_rows(x_XD)

    def backward(x_BTD: Array, expert_A: Array, d_AD: Array) -> tuple[Array]:
        return jax.vjp(lambda x_BTD: move(x_BTD, expert_A), x_BTD)[1](d_AD)

    d_AD = jnp.zeros((len(expert_A), D))
    lowered = on_one_device(backward).lower(x_BTD, expert_A, d_AD)
    return lowered.compile().cost_analysis()['flops']


def main() -> common.Figures:
    common.prepare_devices()
    B = FLAGS.sequences
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD, d_BTD = (jax.random.normal(key, (B, T, D)) for key in keys[:2])
    cfgs = {n: configure(n) for n in EXPERTS}
    layers = {'dense': (swiglu, swiglu_params(cfgs[8], F * C), cfgs[8])}
    layers |= {n: (moe, moe_params(cfg), cfg) for n, cfg in cfgs.items()}
    runs = {}
    for name, (layer, declared, cfg) in layers.items():
        params = init_params(keys[2], declared, make_mesh({}))
        runs[name] = functools.partial(forward_backward(layer, cfg), params, x_BTD, d_BTD)
    seconds = common.best_seconds(runs, rounds=12)
    expert_A = jax.random.randint(keys[2], (B * T * C,), 0, 16)
    moving_flops = dispatch_flops(x_BTD, expert_A, cfgs[16])
    expert_flops = 3 * 6 * B * T * C * D * F
    figures: common.Figures = {
        'dense_ms': seconds['dense'] * 1e3,
        'expert_gflop': expert_flops / 1e9,
        'dispatch_and_combine_gflop': moving_flops / 1e9,
        'dispatch_share_of_flops': moving_flops / expert_flops,
    }
    for n in EXPERTS:
        figures[f'moe_ms_{n}_experts'] = seconds[n] * 1e3
        figures[f'time_over_dense_{n}_experts'] = seconds[n] / seconds['dense']
    return figures


if __name__ == '__main__':
    flags.DEFINE_integer('sequences', 16, 'Sequences of 256 tokens.', lower_bound=1)
    common.run(main)
