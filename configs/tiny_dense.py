"""A dense model by AdamW on the source of Python's standard library: minutes on 2 cores.

    python train.py --config=configs/tiny_dense.py

Grouped-query attention and SwiGLU, the sizes of configs/default.py.
16 sequences x 256 tokens = 4,096 tokens per step.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'stdlib'
    c.model.attention = 'gqa'
    c.steps = 200
    c.batch_size = 16
    c.optimizer.peak_lr = 3e-3
    c.optimizer.final_lr = 1e-4
    c.optimizer.warmup_steps = 50
    c.eval.every = 100
    return c
