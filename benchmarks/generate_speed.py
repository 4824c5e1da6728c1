"""Time of a decoded token by its position, beside recomputing; bytes of the cache per token.

    python benchmarks/generate_speed.py
    python benchmarks/generate_speed.py --cpu_devices=2 --tp=2 --json

One prompt, a cache of 2,048 positions whatever is in it. Recomputing is one run of the model over
512 tokens of context, with the head at the last of them only. The kinds of attention differ in
nothing else; each has the default config's width, layers and vocabulary.
"""

import functools

import common
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

import decoding
from config import ModelConfig
from configs import default
from layers.attention import attention_sizes
from model import model_for, model_params
from parallel import TP, Array, Tree, init_params, make_mesh
from runtime.config_checks import validate

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
    c.mesh.tp = FLAGS.tp
    validate(c, jax.device_count(), needs_data=False)
    return c


def formula_bytes(cfg: ModelConfig) -> int:
    """Returns the bytes of a token in the cache, over all layers and tp devices."""
    copies = FLAGS.tp if cfg.attention == 'mla' else 1  # each tp device has the whole latent
    numbers = copies * attention_sizes(cfg).cache
    return cfg.n_layers * numbers * np.dtype(cfg.compute_dtype).itemsize


class Decoder:
    """A model of one kind with a request at each of POSITIONS."""

    def __init__(self, kind: str):
        cfg = model_for(configure(kind), jax.default_backend())
        self.cfg = cfg = decoding.decoding_config(cfg)
        mesh = make_mesh({TP: FLAGS.tp})
        params = init_params(jax.random.key(0), model_params(cfg), mesh)
        self.params = decoding.cast_weights(params, cfg)
        self.prefill, self.decode = decoding.programs(
            cfg, 1, mesh, decoding.Sampling(), CONTEXT, CHUNK
        )
        rules = {
            'seed': np.uint32(0),
            'stop': np.int32(-1),
            'allowed': np.ones(cfg.vocab_size, bool),
        }
        self.requests, self.states = {}, {}
        for position in POSITIONS:
            prompt = np.arange(position) % cfg.vocab_size
            rows, self.rules = decoding.put_request([prompt], CONTEXT, CONTEXT, mesh, rules)
            self.requests[position] = rows
            self.states[position] = self.prefill(self.params, *rows, self.rules)[0]

    def recompute(self, position: int) -> Array:
        """Returns the token after the request's prompt, from a run over the whole prompt."""
        return self.prefill(self.params, *self.requests[position], self.rules)[1]

    def advance(self, position: int) -> Tree:
        """Decodes CHUNK more tokens of a request and returns its state."""
        state, _ = self.decode(self.params, self.states[position], self.rules)
        self.states[position] = state
        return state


def measure(kind: str) -> common.Figures:
    """Returns the figures of one kind, the best of some rounds in turns."""
    decoder = Decoder(kind)
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(decoder.states[64]['cache'])) / CONTEXT
    runs = {'recompute': functools.partial(decoder.recompute, 512)}
    runs |= {p: functools.partial(decoder.advance, p) for p in POSITIONS}
    seconds = common.best_seconds(runs, FLAGS.rounds)
    per_token = {p: seconds[p] / CHUNK for p in POSITIONS}
    return {
        **{f'{kind}_ms_at_{p}': 1e3 * per_token[p] for p in POSITIONS},
        f'{kind}_slowest_over_fastest': max(per_token.values()) / min(per_token.values()),
        f'{kind}_ms_recomputing_512': 1e3 * seconds['recompute'],
        f'{kind}_times_faster_at_512': seconds['recompute'] / per_token[512],
        f'{kind}_cache_bytes_per_token': cache_bytes,
        f'{kind}_formula_bytes_per_token': formula_bytes(decoder.cfg),
    }


def main() -> common.Figures:
    common.prepare_devices(FLAGS.cpu_devices)
    figures: common.Figures = {}
    for kind in FLAGS.kinds:
        figures |= measure(kind)
    mla, mha = (figures.get(f'{kind}_cache_bytes_per_token') for kind in ('mla', 'mha'))
    if mla and mha:
        figures['mha_over_mla_cache'] = mha / mla
    return figures


if __name__ == '__main__':
    flags.DEFINE_list('kinds', list(KINDS), 'Kinds of attention; moe is mla with experts.')
    flags.register_validator('kinds', lambda kinds: {*kinds} <= {*KINDS}, f'choose of {[*KINDS]}')
    flags.DEFINE_string('dtype', 'float32', 'Compute type, of weights and cache too.')
    flags.DEFINE_integer('n_layers', 4, 'Layers.', lower_bound=1)
    flags.DEFINE_integer('d_model', 256, 'Width; the feed-forward is three times as wide.')
    flags.DEFINE_integer('tp', 1, 'Shards of heads, feed-forward and vocabulary.')
    flags.DEFINE_integer('cpu_devices', 0, 'Simulated devices.')
    flags.DEFINE_integer('rounds', 20, 'Rounds of which the best counts.', lower_bound=1)
    common.run(main)
