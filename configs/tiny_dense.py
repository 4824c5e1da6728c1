"""The dense model of about configs/tiny.py's cost: grouped-query attention, SwiGLU.

python train.py --config=configs/tiny_dense.py
"""

from ml_collections import ConfigDict

from configs import tiny


def get_config() -> ConfigDict:
    c = tiny.get_config()
    c.model.block = ('dense',)
    c.model.attention = 'gqa'
    return c
