"""MLA and a mixture of experts by AdamW: about as long as configs/tiny.py, to compare.

    python train.py --config=configs/tiny_adamw.py

A token meets 2 of 8 experts and a shared one, together as wide as the dense 768.
16 sequences x 256 tokens = 4,096 tokens per step.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'stdlib'
    c.model.block = ('moe',)
    c.steps = 200
    c.batch_size = 16
    c.optimizer.peak_lr = 3e-3
    c.optimizer.final_lr = 1e-4
    c.optimizer.warmup_steps = 50
    c.eval.every = 100
    return c
