"""Writes splash_kernels.json: splash attention's kernels as the TPU compiler prints them.

    python tests/golden/make_splash_kernels.py      # takes requirements/tpu.txt

Keys have four blocks; the backward pass is one kernel, and two. The entry of the installed versions
is replaced, others stay: run it with libtpu 0.0.42.1 of jax 0.10.2 and 0.0.50.1 of jax 0.12.0.1.
"""

import json
import os
import pathlib
import re
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import SingleDeviceSharding

from planning.topology import compiler_versions, tpu_devices

B, N, T, H, BLOCK = 3, 2, 2048, 128, 512
FILE = pathlib.Path(__file__).parent / 'splash_kernels.json'


def kernels(fused: bool) -> list[str]:
    """Returns the instructions of the kernels of forward and backward pass, without metadata."""
    names = ['q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute']
    names += [] if fused else ['q_dq', 'kv_dq']
    sizes = splash.BlockSizes(**{f'block_{n}': BLOCK for n in names}, use_fused_bwd_kernel=fused)
    mask = masks.MultiHeadMask([masks.CausalMask((T, T))] * N)
    one = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)

    def total(q, k, v):
        return jax.vmap(one)(q, k, v).astype(jnp.float32).sum()

    device = SingleDeviceSharding(tpu_devices('v5e:1x1')[0])
    x = jax.ShapeDtypeStruct((B, N, T, H), jnp.bfloat16, sharding=device)
    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
    found = re.findall(r'^ +(%splash_mha.* custom-call\(.*), frontend_attributes=', text, re.M)
    return [re.sub(r'\{[\d,]*(:[^}]*)?\}', '', line) for line in found]  # without the layouts


if __name__ == '__main__':
    versions = ', '.join(f'{k} {v}' for k, v in compiler_versions('tpu').items())
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known[versions] = {'one': kernels(True), 'two': kernels(False)}
    FILE.write_text(json.dumps(known, indent=1) + '\n')
