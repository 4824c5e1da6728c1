"""Pre-training of a dense model of 3.1 B parameters on one node of 8 NVIDIA H100.

Grouped-query attention in the sizes of Llama 3.2 3B.

    python train.py --config=configs/gpu_h100.py --workdir=runs/gpu_h100 --config.data.path=tokens

This writes the tokens:

    python data.py --input='hf://datasets/HuggingFaceFW/fineweb-edu/sample/100BT/*.parquet' \
        --tokenizer=cl100k_base --output=tokens

The batch: 256 sequences x 4,096 tokens = 1,048,576 tokens per step. fsdp 8 takes 32 sequences per
GPU, in 8 microbatches of 4. 60,000 steps are 63 billion tokens, 20 per parameter.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'tokens'
    c.chip = 'h100'
    c.steps = 60_000
    c.batch_size = 256
    c.seq_len = 4096
    c.microbatches = 8
    c.compute_dtype = 'bfloat16'
    c.check_vma = False  # for the attention kernel
    c.mesh.fsdp = 8

    m = c.model
    m.vocab_size = 100_352  # cl100k_base has 100,277
    m.d_model = 3072
    m.n_layers = 28
    m.d_ff = 8192
    m.attention = 'gqa'
    m.n_heads = 24
    m.n_kv_heads = 8
    m.head_dim = 128
    m.rope_base = 500_000.0
    m.attention_block = 512
    m.remat = 'dots'  # plan.py --compile=h100:8: 3.63 s per step; full 4.00, none 3.8 and 58 GB
    m.loss_chunk = 4096

    c.optimizer.peak_lr = 3e-4
    c.optimizer.final_lr = 3e-5
    c.optimizer.warmup_steps = 2000
    c.eval.every = 1000
    c.eval.batches = 8
    c.checkpoint.every = 1000
    return c
