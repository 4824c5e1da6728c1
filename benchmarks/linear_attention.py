"""Memory and FLOPs of one layer's attention by sequence length, linear and not, read off compilers.

    python benchmarks/linear_attention.py
    python benchmarks/linear_attention.py --topology=v5p:2x2x1 --dtype=bfloat16 --json
    python benchmarks/linear_attention.py --decoding

A layer's forward and backward pass alone, for one sequence, is compiled and not run: its input,
weights and the gradient of its output come in, output and gradients go out, and `temp` is what it
has in memory beside these. FLOPs are those of the program's matmuls, over the positions. The kinds
have heads of one size and as many; blockwise attention computes those that compare keys.

With --decoding: bytes that a sequence keeps in the cache after --position tokens, and the time of
a decoded token there and at position 64.
"""

import common
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

import decoding
from config import ModelConfig, of_layer
from configs import default
from layers.attention import ATTENTION, positions
from machine.chips import CHIPS
from model import model_for, model_params
from parallel import AXES, Array, P, Tree, init_params, make_mesh, map_params, varying
from planning.compiled import Walk
from planning.hlo import parse
from planning.prices import Cost, matmul_flops
from planning.topology import topology_devices
from runtime.config_checks import validate

FLAGS = flags.FLAGS
CHUNK = 16  # tokens that are decoded at a time


def configure(kind: str, T: int) -> ConfigDict:
    c = default.get_config()
    N, H = FLAGS.heads, FLAGS.head_size
    c.batch_size, c.seq_len, c.compute_dtype = 1, T, FLAGS.dtype
    c.model.update(
        attention=kind, d_model=FLAGS.d_model, n_layers=1, attention_block=FLAGS.block,
        attention_kernel='blockwise', n_heads=N, n_kv_heads=N, head_dim=H,
        kv_rank=4 * H, nope_dim=H, rope_dim=H // 2, v_dim=H,
        delta_heads=N, delta_key_dim=H, delta_value_dim=H,
    )  # fmt: skip
    validate(c, jax.device_count(), needs_data=False)
    return c


def layer_step(cfg: ModelConfig, T: int, device: jax.Device) -> jax.stages.Compiled:
    """Compiles (weights, x, gradient of the output) -> the output and both gradients."""
    kind = ATTENTION[cfg.attention]

    def body(params: Tree, x_BTD: Array, d_BTD: Array) -> tuple[Array, Tree]:
        params, x_BTD, d_BTD = jax.tree.map(lambda x: varying(x, AXES), (params, x_BTD, d_BTD))
        table = positions(jnp.zeros(x_BTD.shape[:2], jnp.int32), cfg)
        out, pull = jax.vjp(lambda *args: kind.forward(*args, table, cfg)[0], params, x_BTD)
        return jax.tree.map(lambda x: x[None], (out, pull(d_BTD)))

    mesh = make_mesh({}, [device])
    step = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(AXES))
    x = jax.ShapeDtypeStruct((1, T, cfg.d_model), jnp.dtype(cfg.compute_dtype))
    params = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), kind.params(cfg))
    placed = NamedSharding(mesh, P())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), (params, x, x)
    )
    return jax.jit(step).lower(*args).compile()


def measure(kind: str, T: int, device: jax.Device) -> tuple[float, float]:
    """Returns MB of temporaries, and MFLOPs of matmuls per token, forward and backward."""
    config = configure(kind, T)
    cfg = of_layer(model_for(config, device.platform), 'dense')
    compiled = layer_step(cfg, T, device)
    program = parse(compiled.as_text())
    walk = Walk(program, make_mesh({}, [device]), CHIPS['v5p'], _matmul_price)
    flops = walk.cost(program.entry).flops if device.platform == 'cpu' else float('nan')
    return compiled.memory_analysis().temp_size_in_bytes / 1e6, flops / T / 1e6


def _matmul_price(instruction, program, _) -> Cost:
    return Cost(flops=matmul_flops(instruction, program))


def decoded(kind: str) -> common.Figures:
    """Returns the bytes of a sequence's cache and the seconds of a token, early and late."""
    context = FLAGS.position + 64
    cfg = model_for(configure(kind, FLAGS.block), jax.default_backend())
    cfg, mesh = decoding.decoding_config(cfg), make_mesh({})
    params = decoding.cast_weights(init_params(jax.random.key(0), model_params(cfg), mesh), cfg)
    figures: common.Figures = {'kind': kind}
    runs, states = {}, {}
    for position, room in ((64, context), (FLAGS.position, context)):
        prefill, decode = decoding.programs(cfg, 1, mesh, decoding.Sampling(), room, CHUNK)
        rules = {'seed': np.uint32(0), 'stop': np.int32(-1)}
        rules['allowed'] = np.ones(cfg.vocab_size, bool)
        prompt = np.arange(position) % cfg.vocab_size
        rows, rules = decoding.put_request([prompt], room, room, mesh, rules)
        states[position] = prefill(params, *rows, rules)[0]

        def advance(position=position, decode=decode, rules=rules) -> Tree:
            states[position], _ = decode(params, states[position], rules)
            return states[position]

        runs[position] = advance
    figures['cache_bytes'] = sum(x.nbytes for x in jax.tree.leaves(states[64]['cache']))
    seconds = common.best_seconds(runs, FLAGS.rounds)
    figures |= {f'ms_at_{p}': 1e3 * s / CHUNK for p, s in seconds.items()}
    figures['late_over_early'] = seconds[FLAGS.position] / seconds[64]
    return figures


def main() -> list[common.Figures]:
    common.prepare_devices()
    if FLAGS.decoding:
        return [decoded(kind) for kind in FLAGS.kinds]
    devices = topology_devices(FLAGS.topology) if FLAGS.topology else jax.devices()
    rows, first = [], {}
    for T in map(int, FLAGS.lengths):
        for kind in FLAGS.kinds:
            temp, flops = measure(kind, T, devices[0])
            first.setdefault(T, temp)
            rows.append(
                {
                    'T': T,
                    'kind': kind,
                    'temp_mb': temp,
                    f'over_{FLAGS.kinds[0]}': temp / first[T],
                    'mflops_per_token': flops,
                }
            )
    return rows


if __name__ == '__main__':
    flags.DEFINE_list('kinds', ['gqa', 'mla', 'gdn', 'kda'], 'Kinds; the first is compared with.')
    flags.register_validator('kinds', lambda kinds: {*kinds} <= {*ATTENTION}, f'of {[*ATTENTION]}')
    flags.DEFINE_list('lengths', ['8192', '65536'], 'Positions of the sequence.')
    flags.DEFINE_string(
        'topology', '', 'Compile for these chips, as v5p:2x2x1; for the CPU if none.'
    )
    flags.DEFINE_string('dtype', 'float32', 'Compute type.')
    flags.DEFINE_integer('d_model', 1024, 'Width.', lower_bound=1)
    flags.DEFINE_integer('heads', 16, 'Heads, of keys and values too.', lower_bound=1)
    flags.DEFINE_integer('head_size', 64, 'Head size, of keys and values.', lower_bound=2)
    flags.DEFINE_integer('block', 256, 'model.attention_block.', lower_bound=1)
    flags.DEFINE_boolean('decoding', False, 'Measure decoding.')
    flags.DEFINE_integer('position', 32000, 'The late position of --decoding.', lower_bound=65)
    flags.DEFINE_integer('rounds', 5, 'Rounds of which the best counts.', lower_bound=1)
    common.run(main)
