"""Time of a decoded token: by its position, and beside recomputing; bytes of the cache a token.

    python benchmarks/generate_speed.py
    python benchmarks/generate_speed.py --cpu_devices=2 --tp=2 --json

One prompt, a cache of 2,048 positions whatever is in it. Recomputing is one run of the model over
512 tokens of context, with the head at the last of them only. The kinds of attention differ in
nothing else; each has the default config's width, layers and vocabulary.
"""

import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

import decoding
from config import ModelConfig
from configs import default
from machine.memory import keep_freed_memory
from model import model_config, model_params
from parallel import TP, Tree, init_params, make_mesh

FLAGS = flags.FLAGS
CONTEXT, CHUNK = 2048, 16
POSITIONS = (64, 512, 1024)
KINDS = {
    'mla': {'attention': 'mla'},
    'moe': {'attention': 'mla', 'block': ('moe',)},
    'gqa': {'attention': 'gqa', 'n_heads': 8, 'n_kv_heads': 2, 'head_dim': 32},
    'mha': {'attention': 'gqa', 'n_heads': 4, 'n_kv_heads': 4, 'head_dim': 64},
}


def configure(kind: str) -> ConfigDict:
    c = default.get_config()
    c.compute_dtype = FLAGS.dtype
    c.model.update(n_layers=FLAGS.n_layers, d_model=FLAGS.d_model, d_ff=3 * FLAGS.d_model)
    c.model.update(KINDS[kind])
    return c


def formula_bytes(cfg: ModelConfig) -> int:
    """Of a token in the cache, over all layers and tp devices."""
    numbers = 2 * cfg.n_kv_heads * cfg.head_dim
    if cfg.attention == 'mla':
        numbers = FLAGS.tp * (cfg.kv_rank + cfg.rope_dim)  # each tp device has the latent
    return cfg.n_layers * numbers * np.dtype(cfg.compute_dtype).itemsize


def timed(f) -> tuple[float, Tree]:
    start = time.perf_counter()
    out = jax.block_until_ready(f())
    return time.perf_counter() - start, out


def measure(kind: str) -> dict[str, float]:
    """The best of some rounds; in each, the things compared run one after the other."""
    cfg = decoding.decoding_config(model_config(configure(kind)))
    mesh = make_mesh({TP: FLAGS.tp})
    params = init_params(jax.random.key(0), model_params(cfg), mesh)
    params = decoding.cast_weights(params, cfg)
    prefill, decode = decoding.programs(cfg, 1, mesh, decoding.Sampling(), CONTEXT, CHUNK)
    rules = {'seed': np.uint32(0), 'stop': np.int32(-1), 'allowed': np.ones(cfg.vocab_size, bool)}
    states, seconds = {}, {}
    for position in POSITIONS:
        prompt = np.arange(position) % cfg.vocab_size
        rows, on_mesh = decoding.put_request([prompt], CONTEXT, CONTEXT, mesh, rules)
        states[position] = prefill(params, *rows, on_mesh)[0]
        if position == 512:
            recompute = rows
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(states[64]['cache'])) / CONTEXT
    for i in range(FLAGS.rounds + 1):
        results = {'recompute': timed(lambda: prefill(params, *recompute, on_mesh)[1])[0]}
        for position in POSITIONS:
            state = states[position]
            results[position], (states[position], _) = timed(
                lambda state=state: decode(params, state, on_mesh)
            )
            results[position] /= CHUNK
        if i:  # the first round compiles
            seconds = {k: min(v, seconds.get(k, v)) for k, v in results.items()}
    return {
        **{f'{kind}_ms_at_{p}': 1e3 * seconds[p] for p in POSITIONS},
        f'{kind}_slowest_over_fastest': max(seconds[p] for p in POSITIONS)
        / min(seconds[p] for p in POSITIONS),
        f'{kind}_ms_recomputing_512': 1e3 * seconds['recompute'],
        f'{kind}_times_faster_at_512': seconds['recompute'] / seconds[512],
        f'{kind}_cache_bytes_a_token': cache_bytes,
        f'{kind}_formula_bytes_a_token': formula_bytes(cfg),
    }


def main(_):
    keep_freed_memory()
    if FLAGS.cpu_devices:
        jax.config.update('jax_num_cpu_devices', FLAGS.cpu_devices)
    result: dict[str, float] = {}
    for kind in FLAGS.kinds:
        result |= measure(kind)
    mla, mha = (result.get(f'{kind}_cache_bytes_a_token') for kind in ('mla', 'mha'))
    if mla and mha:
        result['mha_over_mla_cache'] = mha / mla
    for name, value in result.items():
        print(f'{name:>30}  {value:,.3f}' if isinstance(value, float) else f'{name:>30}  {value:,}')
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == '__main__':
    flags.DEFINE_list('kinds', list(KINDS), 'Of attention; moe is mla with experts.')
    flags.DEFINE_string('dtype', 'float32', 'Compute type, of weights and cache too.')
    flags.DEFINE_integer('n_layers', 4, 'Layers.')
    flags.DEFINE_integer('d_model', 256, 'Width; the feed-forward is three times as wide.')
    flags.DEFINE_integer('tp', 1, 'Shards of heads, feed-forward and vocabulary.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulated devices.')
    flags.DEFINE_integer('rounds', 20, 'Rounds of which the best counts.')
    flags.DEFINE_boolean('json', False, 'The figures as one JSON object on the last line.')
    app.run(main)
