"""Pre-training of DeepSeek-V3 (DeepSeek-AI 2024, section 4.2) on 1,024 chips of a TPU v5p pod.

671 B parameters, 37 B of them active, without multi-token prediction. The chips form a torus of
8 x 8 x 16.

On each host of the slice:

    python train.py --config=configs/deepseek_v3.py --workdir=gs://BUCKET/runs/deepseek_v3 \
        --config.data.path=gs://BUCKET/tokens

The batch: 15,360 sequences x 4,096 tokens = 62,914,560 tokens per step. fsdp 32 x ep 32 take 15
sequences per chip, in 15 microbatches of 1. 235,000 steps are 14.8 trillion tokens.

ep 32 gives a chip 8 of each layer's 256 experts. A chip sends each peer at most twice the rows of
an even spread. The paper drops no rows, but without a bound one chip may receive all rows of 32.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'tokens'
    c.chip = 'v5p'
    c.steps = 235_000
    c.batch_size = 15_360
    c.seq_len = 4096
    c.microbatches = 15
    c.compute_dtype = 'bfloat16'
    c.check_vma = False  # for the attention kernel
    c.mesh.update(fsdp=32, ep=32)

    m = c.model
    m.vocab_size = 129_280
    m.d_model = 7168
    m.n_layers = 61
    m.first_dense = 3
    m.block = ('moe',)
    m.d_ff = 18_432
    m.n_experts = 256
    m.experts_per_token = 8
    m.d_expert = 2048
    m.n_expert_groups = 8
    m.n_top_groups = 4
    m.routed_scale = 2.5
    m.balance_loss = 1e-4
    m.buffer_factor = 2.0
    m.n_heads = 128
    m.q_rank = 1536
    m.kv_rank = 512
    m.nope_dim = 128
    m.rope_dim = 64
    # The released model's values for --config.model.rope_scaling=yarn, by which section 4.3 extends
    # the context to 131,072 after this run; with 'none' they count for nothing.
    m.rope_factor = 40.0
    m.rope_original_len = 4096
    m.rope_mscale = 1.0
    m.rope_mscale_all_dim = 1.0
    m.v_dim = 128
    m.attention_block = 512
    m.tie_embeddings = False
    m.remat = 'full'

    o = c.optimizer
    o.peak_lr = 2.2e-4
    o.final_lr = 7.3e-6
    o.warmup_steps = 2000
    c.eval.every = 2000
    c.eval.batches = 1
    c.checkpoint.every = 500
    return c
