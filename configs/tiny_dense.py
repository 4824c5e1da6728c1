"""A dense model of about configs/tiny_adamw.py's cost.

    python train.py --config=configs/tiny_dense.py

Grouped-query attention, SwiGLU.
"""

from ml_collections import ConfigDict

from configs import tiny_adamw


def get_config() -> ConfigDict:
    c = tiny_adamw.get_config()
    c.model.block = ('dense',)
    c.model.attention = 'gqa'
    return c
