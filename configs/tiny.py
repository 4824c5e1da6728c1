"""MLA and a mixture of experts on the source of Python's standard library: minutes on 2 cores.

    python train.py --config=configs/tiny.py
    python train.py --config=configs/tiny.py --cpu_devices=8 \
        --config.mesh.dp=2 --config.mesh.fsdp=2 --config.mesh.tp=2

8 sequences x 256 tokens = 2,048 tokens per step. What learns most in these minutes with experts
(without, a CPU learns faster: benchmarks/speedrun.py):
- Muon learns more from each token than AdamW, and smaller batches more than large ones.
- A token meets 2 of 16 experts and a shared one, 128 wide: narrow matrices, since the work of
  Newton-Schulz grows with the square of their width. Heads of 32 are enough.
- The rate falls to 0 over most of the run: at a constant one the loss stays far above.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'stdlib'
    c.model.block = ('moe',)
    c.model.n_experts, c.model.d_expert = 16, 128
    c.model.nope_dim, c.model.rope_dim, c.model.v_dim = 16, 16, 32
    c.steps = 330
    c.batch_size = 8
    c.optimizer.name = 'muon'
    c.optimizer.muon.steps = 4
    c.optimizer.muon.adamw_lr = 1e-2
    c.optimizer.lr_schedule = 'wsd'
    c.optimizer.peak_lr = 8e-3
    c.optimizer.final_lr = 0.0
    c.optimizer.warmup_steps = 10
    c.optimizer.decay_steps = 300
    c.eval.every = 330
    return c
