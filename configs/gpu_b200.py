"""Pre-training of Llama 3 8B (Grattafiori et al. 2024, table 3) on one node of 8 NVIDIA B200.

    python train.py --config=configs/gpu_b200.py --workdir=runs/gpu_b200 --config.data.path=tokens

configs/llama3_8b.py says how the tokens are prepared with the model's own vocabulary.

The batch: 128 sequences x 8,192 tokens = 1,048,576 tokens per step. fsdp 8 takes 16 sequences per
GPU, in 4 microbatches of 4. Queries, keys and values, what attention computes and the residual
stream are kept. 150,000 steps are 157 billion tokens, 20 per parameter.
"""

from ml_collections import ConfigDict

from configs import llama3_8b


def get_config() -> ConfigDict:
    c = llama3_8b.get_config()
    c.chip = 'b200'
    c.steps = 150_000
    c.batch_size = 128
    c.microbatches = 4
    c.mesh.fsdp = 8
    c.model.remat_keep = ('attention', 'qkv', 'residual')
    c.model.loss_chunk = 4096
    return c
