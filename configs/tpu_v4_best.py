"""configs/tpu_v4.py on its fastest mesh by the TPU compiler's count: fsdp alone.

    python train.py --config=configs/tpu_v4_best.py --workdir=gs://BUCKET/runs/tpu_v4

A model of 0.96 B fits a v4 chip many times over, so it needs neither stages nor slices of the
layers. The 256 sequences are one microbatch of 8 for each of 32 shards, and each weight is gathered
twice per step instead of 24 times.

Its mesh is the first that `plan.py --search` finds. What the compiler counts as long, it leaves
out: heads of attention are made of latents in a kernel, experts' matmuls write bfloat16, and an
all-to-all carries gradients beside compute. `plan.py --compile=v4:2x4x4` counts 269 ms of compute
and 56 ms of network per step, 39 of the latter beside compute, and 5.0 GB of memory, where
configs/tpu_v4.py takes 636 and 288 ms. docs/measured.md says what each brought.
"""

from ml_collections import ConfigDict

from configs import tpu_v4


def get_config() -> ConfigDict:
    c = tpu_v4.get_config()
    c.mesh.update(pp=1, fsdp=32, tp=1)
    c.microbatches = 1
    c.fsdp_reduce = 'all_to_all'  # a v4 waits for reduce-scatters
    c.model.attention_kernel = 'latent'
    c.model.expert_kernel = 'megablox'
    c.model.remat_keep = ('attention', 'experts')
    return c
