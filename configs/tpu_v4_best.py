"""configs/tpu_v4.py on the mesh that `plan.py --config=configs/tpu_v4.py --search` finds best.

    python train.py --config=configs/tpu_v4_best.py --workdir=gs://BUCKET/runs/tpu_v4

A model of 0.96 B fits a v4 chip many times over, so neither stages nor slices of the layers are
needed: the 256 sequences are one microbatch of 8 for each of fsdp 16 x ep 2 shards, each weight is
gathered twice a step instead of 24 times, and nothing is computed again.
"""

from ml_collections import ConfigDict

from configs import tpu_v4


def get_config() -> ConfigDict:
    c = tpu_v4.get_config()
    c.mesh.update(pp=1, fsdp=16, ep=2, tp=1)
    c.microbatches = 1
    c.model.remat = 'none'
    return c
