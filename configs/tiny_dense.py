"""A dense model of about configs/tiny.py's cost.

    python train.py --config=configs/tiny_dense.py

Grouped-query attention, SwiGLU.
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.model.block = ('dense',)
    c.model.attention = 'gqa'
    return c
