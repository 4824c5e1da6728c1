"""Pre-training of Llama 3 8B (Grattafiori et al. 2024, table 3) on the 64 chips of a TPU v5p-128.

On each host of the slice:

    python train.py --config=configs/llama3_8b.py --workdir=gs://BUCKET/runs/llama3_8b \
        --config.data.path=gs://BUCKET/tokens

This prepares the tokens with the model's own vocabulary, in tiktoken's format:

    python tokenizer.py --from_hf=Meta-Llama-3-8B/tokenizer.json --output=llama3.tiktoken
    python data.py --input='hf://datasets/HuggingFaceFW/fineweb-edu/**/*.parquet' \
        --tokenizer=llama3.tiktoken --output=gs://BUCKET/tokens

The batch: 512 sequences x 8,192 tokens = 4,194,304 tokens per step. fsdp 64 takes 8 sequences per
shard, in one microbatch: 8 of 1 would gather the weights 8 times. 240,000 steps are a trillion
tokens.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'tokens'
    c.chip = 'v5p'
    c.steps = 240_000
    c.batch_size = 512
    c.seq_len = 8192
    c.compute_dtype = 'bfloat16'
    c.check_vma = False  # for the attention kernel
    c.mesh.fsdp = 64

    m = c.model
    m.vocab_size = 128_256
    m.d_model = 4096
    m.n_layers = 32
    m.d_ff = 14_336
    m.attention = 'gqa'
    m.n_heads = 32
    m.n_kv_heads = 8
    m.head_dim = 128
    m.rope_base = 500_000.0
    m.attention_block = 1024
    m.tie_embeddings = False
    m.norm_eps = 1e-5
    m.remat = 'full'
    m.loss_chunk = 2048

    c.optimizer.peak_lr = 3e-4
    c.optimizer.final_lr = 3e-5
    c.optimizer.warmup_steps = 2000
    c.eval.every = 2000
    c.eval.batches = 4
    c.checkpoint.every = 1000
    return c
