#!/usr/bin/env bash
# libtpu 0.0.42.1 with jax 0.10.2: a topology that is described for compiling ahead of time has no links that
# join the ends of its dimensions, though every real v5p slice of whole 4 x 4 x 4 cubes has them. `wrap` asks
# for them, by three booleans; the name of the slice alone does not. Without them a gather over all 64 chips
# of a weight is compiled as an all-reduce of the whole array, twice the bytes, so that a plan from the name alone
# overstates the network of the run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.42.1
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 "$work/venv/bin/python" - <<'PYTHON'
import re
from importlib.metadata import version

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P


def collectives(**more):
    described = topologies.get_topology_desc(
        platform='tpu', topology_name='v5p:4x4x4', chips_per_host_bounds=(2, 2, 1), **more
    )
    mesh = Mesh(mesh_utils.create_device_mesh((64,), described.devices), ('a',))
    sharding = NamedSharding(mesh, P('a'))
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        for shape in ((64 * 256, 1024), (1024, 4096))
    )
    product = jax.shard_map(
        lambda x, w: x @ lax.all_gather(w, 'a', tiled=True),
        mesh=mesh, in_specs=P('a'), out_specs=P('a'),
    )
    text = jax.jit(product).lower(x, w).compile().as_text()
    return sorted(set(re.findall(r'(all-gather|all-reduce)\(', text)))


named, asked = collectives(), collectives(wrap=(True, True, True))
print(f'seen with libtpu {version("libtpu")}, jax {jax.__version__}: {named}; with wrap: {asked}')
if (named, asked) != (['all-reduce'], ['all-gather']):
    raise SystemExit('changed: the collectives of a slice by its name alone are others')
PYTHON
