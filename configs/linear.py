"""configs/long_context.py with linear attention: sequences of 131,072 tokens on a v5p-128.

    python train.py --config=configs/linear.py --workdir=gs://BUCKET/runs/linear \
        --config.data.path=gs://BUCKET/fineweb-edu-10BT

Three of four layers are Kimi Delta Attention: their FLOPs a token do not grow with the sequence, of
which they keep a state of 16 · 64 · 64 numbers each for decoding. The fourth is latent attention
without a rotary part (Kimi Linear 2025, arXiv:2510.26692, section 4). Over cp, what parts of the
sequence do to states is gathered, not keys.
"""

from ml_collections import ConfigDict

from configs import long_context


def get_config() -> ConfigDict:
    c = long_context.get_config()
    m = c.model
    m.block = ('kda+dense', 'kda+dense', 'kda+dense', 'mla_nope+dense')
    m.delta_heads = 16
    m.delta_key_dim = m.delta_value_dim = 64
    return c
