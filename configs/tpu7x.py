"""Pre-training of Llama 3 70B (Grattafiori et al. 2024, table 3) on the 64 chips of a TPU7x 4x4x4.

A chip is two devices, so that the mesh has 128. On each host of the slice:

    python train.py --config=configs/tpu7x.py --workdir=gs://BUCKET/runs/tpu7x \
        --config.data.path=gs://BUCKET/tokens

configs/llama3_8b.py says how the tokens are prepared with the model's own vocabulary.

The batch: 256 sequences x 8,192 tokens = 2,097,152 tokens per step, 2 sequences per device in one
microbatch. What attention computes is kept beside the layers' inputs. 480,000 steps are a trillion
tokens.
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    c = llama3_8b.get_config()
    c.chip = 'tpu7x'
    c.steps = 480_000
    c.batch_size = 256
    c.microbatches = 1
    c.mesh.fsdp = 128

    m = c.model
    m.d_model = 8192
    m.n_layers = 80
    m.d_ff = 28_672
    m.n_heads = 64
    m.remat_keep = ('attention',)

    c.optimizer.peak_lr = 1.5e-4
    c.optimizer.final_lr = 1.5e-5
    return c
