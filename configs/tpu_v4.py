"""Pre-training of 956 M parameters on the 32 chips of a TPU v4-64.

MLA, and every sixth layer a mixture of 16 experts, without a rotary part; 351 M parameters are
active, without the embedding.

On each host of the slice:

    python train.py --config=configs/tpu_v4.py --workdir=gs://BUCKET/runs/tpu_v4

Any machine writes the tokens once (10 billion of them, 40 GB):

    python data.py --input='hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet' \
        --tokenizer=cl100k_base --output=gs://BUCKET/fineweb-edu-10BT

The run reads them with --config.data.path=gs://BUCKET/fineweb-edu-10BT.

The batch: 256 sequences x 1,024 tokens = 262,144 tokens per step. fsdp 8 takes 32 sequences per
shard, in 8 microbatches of 4, which pass 2 stages of 4 blocks. tp 2 halves heads, feed-forward and
vocabulary. 38,000 steps are 9.96 billion tokens.

The mesh is the guide's example; configs/tpu_v4_best.py has a faster one.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'fineweb-edu-10BT'
    c.steps = 38_000
    c.batch_size = 256
    c.seq_len = 1024
    c.microbatches = 8
    c.compute_dtype = 'bfloat16'
    c.check_vma = False
    c.mesh.update(fsdp=8, pp=2, tp=2)

    m = c.model
    m.vocab_size = 100_352  # cl100k_base has 100,277
    m.d_model = 768
    m.n_layers = 48
    m.block = ('dense',) * 5 + ('mla_nope+moe',)
    m.d_ff = 1536
    m.n_experts = 16
    m.n_shared_experts = 2
    m.d_expert = 2048
    m.n_heads = 12
    m.q_rank = 128
    m.kv_rank = 128
    m.nope_dim = 64
    m.rope_dim = 64
    m.attention_block = 512  # of the splash kernel, which check_vma=False allows
    m.remat = 'full'
    m.loss_chunk = 2048

    c.optimizer.peak_lr = 6e-4
    c.optimizer.final_lr = 6e-5
    c.optimizer.warmup_steps = 2000
    c.eval.every = 1000
    c.eval.batches = 20
    c.checkpoint.every = 1000
    c.chip = 'v4'
    return c
