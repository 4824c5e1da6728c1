"""Pre-training on sequences of 131,072 tokens, packed with documents, on the 64 chips of a v5p-128.

Latent attention and SwiGLUs, 520 M parameters.

    python train.py --config=configs/long_context.py --workdir=gs://BUCKET/runs/long \
        --config.data.path=gs://BUCKET/fineweb-edu-10BT

Each sequence is cut over 8 chips. Keys and values go around the ring of them as latents, 320
numbers a position and layer in place of 4,096; pairs of blocks that share no document are skipped,
so documents shorter than the sequence cost what they cost alone. (For documents as long as the
sequence, splash attention with `--config.cp_style=gather --config.model.attention_kernel=splash` is
faster: it computes the blocks between documents too, but its scores stay within the chip.)
Parameters are spread over fsdp 8. 8 sequences are 1.05 million tokens a step.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.data.path = 'fineweb-edu-10BT'
    c.data.isolate_documents = True
    c.steps = 10_000
    c.batch_size = 8
    c.seq_len = 131_072
    c.compute_dtype = 'bfloat16'
    c.check_vma = False
    c.mesh.update(fsdp=8, cp=8)

    m = c.model
    m.vocab_size = 100_352  # cl100k_base has 100,277
    m.d_model = 1024
    m.n_layers = 24
    m.d_ff = 4096
    m.n_heads = 16
    m.kv_rank = 256
    m.nope_dim = 64
    m.rope_dim = 64
    m.v_dim = 128
    m.rope_base = 1e6
    m.attention_block = 1024
    m.remat = 'full'
    m.remat_keep = ('attention',)
    m.loss_chunk = 2048

    c.optimizer.peak_lr = 6e-4
    c.optimizer.final_lr = 6e-5
    c.optimizer.warmup_steps = 1000
    c.eval.every = 1000
    c.eval.batches = 10
    c.checkpoint.every = 500
    c.chip = 'v5p'
    return c
