"""configs/tiny.py with linear attention in three of four layers, as Kimi Linear has it.

    python train.py --config=configs/tiny_linear.py

Three layers of Kimi Delta Attention keep a state of fixed size; the fourth compares keys, without a
rotary part, since the others know the order of positions.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.model.block = ('kda+moe', 'kda+moe', 'kda+moe', 'mla_nope+moe')
    c.model.delta_heads = 4
    c.model.delta_key_dim = c.model.delta_value_dim = 32
    c.model.attention_block = 64
    return c
