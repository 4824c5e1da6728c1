"""Cost read from the text of compiled programs: loops, branches, collectives, kernels."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import small_config
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding

from machine.chips import CHIPS
from parallel import AXES, FSDP, P, all_gather, make_mesh
from planning import compiled
from planning.compiled import compile_step, mesh_axes, read_cost
from planning.hlo import UnknownFormError, device_groups, parse
from planning.prices import KERNEL_EFFICIENCY, gpu_price, splash_flops

MESH = SimpleNamespace(devices=np.arange(8).reshape(2, 1, 2, 1, 1, 2), axis_names=AXES)
# A cycle takes a second, and a device sends and moves a byte per second.
TPU = dataclasses.replace(CHIPS['v4'], clock=1.0, link=1.0, bandwidth=1.0)
GPU = dataclasses.replace(CHIPS['h100'], flops=100.0, link=1.0, bandwidth=1.0)

# A loop of 6 trips whose body has a matmul of 100 cycles, a reduce-scatter over tp, and a branch of
# 10 or 70 cycles; after it a kernel without an estimate, and an asynchronous all-gather over fsdp
# beside 20 cycles of work.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cheap (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %x = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"10"}
}

%dear (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} exponential(%q), backend_config={"estimated_cycles":"70"}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %c = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (d: (s32[], f32[8])) -> (s32[], f32[8]) {
  %d = (s32[], f32[8]{0}) parameter(0)
  %v = f32[8]{0} get-tuple-element(%d), index=1
  %dot = f32[16]{0} convolution(%v), backend_config={"estimated_cycles":"100"}
  %rs = f32[8]{0} reduce-scatter(%dot), replica_groups=[4,2]<=[8], to_apply=%add
  %k = s32[] get-tuple-element(%d), index=0
  %branch = f32[8]{0} conditional(%k, %rs, %rs), branch_computations={%cheap, %dear}
  ROOT %t = (s32[], f32[8]{0}) tuple(%k, %branch)
}

ENTRY %main (w: (s32[], f32[8])) -> f32[16] {
  %w = (s32[], f32[8]{0}) parameter(0)
  %loop = (s32[], f32[8]{0}) while(%w), condition=%condition, body=%body
  %z = f32[8]{0} get-tuple-element(%loop), index=1
  %kernel = f32[8]{0} custom-call(%z), custom_call_target="tpu_custom_call", metadata="a line
that is broken"
  %start = (f32[8], f32[16]) all-gather-start(%kernel), replica_groups={{0,2},{1,3},{4,6},{5,7}}
  %beside = f32[8]{0} negate(%kernel), backend_config={"estimated_cycles":"20"}
  ROOT %done = f32[16]{0} all-gather-done(%start)
}
"""

# A fusion that slices one layer out of a stack of 6, multiplies it with its transpose and puts it
# back in place. Then attention by cuDNN beside a reduce-scatter over fsdp, a synchronous all-gather
# and a kernel of unknown FLOPs.
GPU_PROGRAM = """HloModule jit_step, is_scheduled=true

%layer (s: f32[6,4,4], n: s32[]) -> f32[6,4,4] {
  %s = f32[6,4,4]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %same = f32[6,4,4]{2,1,0} bitcast(%s)
  %one = f32[1,4,4]{2,1,0} dynamic-slice(%same, %n, %n, %n), dynamic_slice_sizes={1,4,4}
  %x = f32[4,4]{1,0} bitcast(%one)
  %dot = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %y = f32[1,4,4]{2,1,0} bitcast(%dot)
  ROOT %put = f32[6,4,4]{2,1,0} dynamic-update-slice(%same, %y, %n, %n, %n)
}

ENTRY %main (stack: f32[6,4,4], i: s32[], q: bf16[1,8,2,4], z: f32[8]) -> f32[6,4,4] {
  %stack = f32[6,4,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %q = bf16[1,8,2,4]{3,2,1,0} parameter(2)
  %z = f32[8]{0} parameter(3)
  %fusion = f32[6,4,4]{2,1,0} fusion(%stack, %i), kind=kCustom, calls=%layer
  %rs = (f32[8], f32[4]) reduce-scatter-start(%z), replica_groups={{0,2},{1,3},{4,6},{5,7}}
  %fmha = (bf16[1,2,8,4]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q),
    custom_call_target="__cudnn$fmha",
    operand_layout_constraints={bf16[1,8,2,4]{3,2,1,0}, bf16[1,8,2,4]{3,2,1,0}}
  %scattered = f32[4]{0} reduce-scatter-done(%rs)
  %ag = (f32[8], f32[16]) all-gather-start(%z), replica_groups={{0,2},{1,3},{4,6},{5,7}},
    backend_config={"is_sync":true}
  %copy = f32[8]{0} copy(%z)
  %gathered = f32[16]{0} all-gather-done(%ag)
  %other = f32[8]{0} custom-call(%copy), custom_call_target="triton_kernel_call"
  ROOT %result = f32[6,4,4]{2,1,0} bitcast(%fusion)
}
"""


def test_loops_count_by_trips_and_conditionals_by_their_costliest_branch():
    cost = read_cost(PROGRAM, MESH, TPU)
    assert cost.seconds == 6 * (100 + 70) + 20
    assert cost.unpriced == 1
    scatter = cost.traffic['reduce-scatter', 'tp']
    assert (scatter.count, scatter.bytes, scatter.exposed) == (6, 6 * 32, 6 * 32)
    gather = cost.traffic['all-gather', 'fsdp']
    assert (gather.count, gather.bytes, gather.exposed) == (1, 32, 32 - 20)
    assert cost.total().bytes == 6 * 32 + 32


def test_the_trips_that_the_compiler_notes_take_precedence():
    noted = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    cost = read_cost(PROGRAM.replace('body=%body', noted), MESH, TPU)
    assert cost.seconds == 5 * (100 + 70) + 20
    assert cost.traffic['reduce-scatter', 'tp'].count == 5


def test_kernels_of_a_gpu_take_the_longer_of_their_matmuls_and_their_bytes():
    program, cost = parse(GPU_PROGRAM), read_cost(GPU_PROGRAM, MESH, GPU)
    layer, attention = 2 * 4**3, 2 * 2 * 2 * 8 * 8 * 4 / 2
    assert cost.flops == layer + attention
    sliced, put = 4 * 16, 4 * 16  # bytes: one of the six layers is read, and one written
    work = {i.name: gpu_price(i, program, GPU).seconds for i in program.instructions('%main')}
    assert work['%fusion'] == sliced + put + 4  # the index
    assert work['%fmha'] == 4 * 2 * 64  # three inputs and the result; no bytes of the empty one
    assert work['%copy'] == 2 * 32
    assert cost.seconds == sum(work.values())
    assert cost.unpriced == 1


def test_collectives_of_a_gpu_hide_behind_what_is_scheduled_beside_them():
    cost = read_cost(GPU_PROGRAM, MESH, GPU)
    scatter = cost.traffic['reduce-scatter', 'fsdp']
    assert (scatter.count, scatter.bytes, scatter.exposed) == (1, 16, 0)
    gather = cost.traffic['all-gather', 'fsdp']
    assert (gather.bytes, gather.exposed) == (32, 32)  # is_sync: the copy waits


@pytest.mark.parametrize(
    ('text', 'axes'),
    [
        ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', 'pp'),
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', 'fsdp+tp'),
        ('replica_groups=[4,2]<=[8]', 'tp'),
        ('replica_groups=[4,2]<=[2,2,2]T(2,0,1)', 'fsdp'),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}, use_global_device_ids=true", 'tp'),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2,'a'}", 'pp+fsdp'),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", 'tp'),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", 'pp'),
        ('source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}', 'pp'),
        ('replica_groups={}', 'none'),
    ],
)
def test_axes_of_a_collective(text, axes):
    assert mesh_axes(device_groups(text), MESH) == axes


GOLDEN = pathlib.Path(__file__).parent / 'golden'
SPLASH = json.loads((GOLDEN / 'splash_kernels.json').read_text())  # B 3, N 2, T 2048, H 128
MATMULS = {'one': [2, 5], 'two': [2, 4, 3]}  # of each kernel, with one for the backward pass or two


def splash_program(*kernels: str) -> str:
    """Returns a program of kernels as they stand in the golden file."""
    lines = '\n'.join(f'  {k}' for k in kernels)
    return f'HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{lines}\n}}\n'


@pytest.mark.parametrize('backward', MATMULS)
@pytest.mark.parametrize('versions', SPLASH)
def test_splash_attention_counts_its_causal_matmuls(versions, backward):
    """Of queries and keys: 4 blocks of keys, whose partial gradients are no more sequences."""
    text = splash_program(*SPLASH[versions][backward])
    program = parse(text)
    kernels = program.instructions(program.entry)
    matmul = 2 * 3 * 2 * 2048 * 2048 * 128 / 2
    assert [splash_flops(k) / matmul for k in kernels] == MATMULS[backward]
    cost = read_cost(text, MESH, TPU)
    assert cost.unpriced == 0
    assert cost.kernel_seconds == sum(MATMULS[backward]) * matmul / (TPU.flops * KERNEL_EFFICIENCY)


def test_splash_attention_of_a_part_of_the_queries_meets_all_keys():
    (forward, _) = SPLASH[next(iter(SPLASH))]['one']
    cut = forward.replace('bf16[3,2,2048,128]', 'bf16[3,2,512,128]').replace(
        'bf16[3,2,512,128], bf16[3,2,512,128], bf16[3,2,512,128], s32',
        'bf16[3,2,512,128], bf16[3,2,2048,128], bf16[3,2,2048,128], s32',
    )
    whole, part = (
        next(iter(parse(splash_program(k)).instructions('%main'))) for k in (forward, cut)
    )
    assert splash_flops(part) == splash_flops(whole) / 4 > 0


@pytest.mark.parametrize('backward', MATMULS)
def test_splash_attention_has_as_many_matmuls_as_its_kernels_themselves(backward):
    names = ['q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute']
    names += ['q_dq', 'kv_dq'] if backward == 'two' else []
    sizes = {f'block_{name}': 128 for name in names}
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((256, 256))]),
        block_sizes=splash.BlockSizes(**sizes, use_fused_bwd_kernel=backward == 'one'),
        head_shards=1, q_seq_shards=1,
    )  # fmt: skip
    x = jnp.zeros((1, 256, 128), jnp.bfloat16)
    whole = jax.make_jaxpr(jax.grad(lambda *qkv: kernel(*qkv).sum(), argnums=(0, 1, 2)))(x, x, x)
    assert sorted(kernel_matmuls(whole.jaxpr)) == sorted(MATMULS[backward])


def kernel_matmuls(jaxpr) -> list[int]:
    """Returns the number of matmuls in each Pallas kernel of a jaxpr."""

    def below(equation) -> Iterator:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield inner

    def matmuls(jaxpr) -> int:
        return sum(
            e.primitive.name == 'dot_general' or sum(map(matmuls, below(e))) for e in jaxpr.eqns
        )

    found = []
    for e in jaxpr.eqns:
        inside = list(below(e))
        if e.primitive.name == 'pallas_call':
            found.append(sum(map(matmuls, inside)))
        else:
            found += [n for j in inside for n in kernel_matmuls(j)]
    return found


# What libtpu 0.0.50.1 makes for jax 0.12.0.1 of a lookup in a large table on v5p, cut to what is
# read: the start has no operands yet, its update brings them, and the SparseCore has no estimate.
SPARSE = """HloModule jit_train_step, is_scheduled=true

%fused_computation.2 (param_0.1645: bf16[100,512], param_1.1688: s32[8]) -> bf16[8,512] {
  %param_0.1645 = bf16[100,512]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1688 = s32[8]{0:T(1024)} parameter(1)
  %gather.37 = bf16[8,512]{1,0:T(8,128)(2,1)} gather(%param_0.1645, %param_1.1688), offset_dims={1}
  ROOT %reshape.773 = bf16[8,512]{1,0:T(8,128)(2,1)} reshape(%gather.37)
}, execution_thread="sparsecore"

%called_computation.1 (param_0.1646: bf16[100,512], param_1.1689: s32[8]) -> bf16[8,512] {
  %param_0.1646 = bf16[100,512]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1689 = s32[8]{0:T(1024)} parameter(1)
  ROOT %gather_offload_custom_fusion.3 = bf16[8,512]{1,0:T(8,128)(2,1)}
    fusion(%param_0.1646, %param_1.1689), kind=kCustom, calls=%fused_computation.2,
    backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}, execution_thread="sparsecore"

%called_computation (param_0.1648: bf16[100,512], param_1.1693: s32[8]) -> bf16[8,512] {
  %param_0.1648 = bf16[100,512]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1693 = s32[8]{0:T(1024)} parameter(1)
  %inner.call-start = ((bf16[100,512]{1,0}, s32[8]{0}), bf16[8,512]{1,0}, u32[]{:S(8)})
    call-start(%param_0.1648, %param_1.1693), async_execution_thread="sparsecore",
    to_apply=%called_computation.1
  ROOT %inner.call-done = bf16[8,512]{1,0:T(8,128)(2,1)} call-done(%inner.call-start)
}, execution_thread="sparsecore"

ENTRY %main (table: bf16[100,512], ids: s32[8]) -> bf16[8,512] {
  %table = bf16[100,512]{1,0:T(8,128)(2,1)} parameter(0)
  %ids = s32[8]{0:T(1024)} parameter(1)
  %gather_offload_async_start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(),
    async_execution_thread="sparsecore", to_apply=%called_computation
  %before = bf16[8]{0} negate(%table), backend_config={"estimated_cycles":"700"}
  %gather_offload_async_start.update = ((bf16[100,512]{1,0}, s32[8]{0}), bf16[8,512]{1,0})
    call-update(%gather_offload_async_start, %table, %ids)
  %beside = bf16[8]{0} negate(%table), backend_config={"estimated_cycles":"5000"}
  %gather_offload_async_done = bf16[8,512]{1,0:T(8,128)(2,1)}
    call-done(%gather_offload_async_start.update)
  ROOT %after = bf16[8]{0} negate(%beside), backend_config={"estimated_cycles":"20"}
}
"""


def test_a_lookup_on_the_sparsecore_counts_its_bytes_and_hides_behind_what_follows_its_operands():
    cost = read_cost(SPARSE, MESH, TPU)
    moved = 2 * 8 * 512 * 2 + 8 * 4  # rows read and written, and the ids
    assert cost.aside == moved
    assert cost.seconds == 700 + 5000 + (moved - 5000) + 20
    with_operands = SPARSE.replace('call-start(),', 'call-start(%table, %ids),')
    assert read_cost(with_operands, MESH, TPU).seconds == 700 + 5000 + (moved - 5700) + 20


def test_a_scatter_on_the_sparsecore_reads_and_writes_the_rows_that_it_adds_to():
    gather = SPARSE.index('  %gather.37')
    text = (
        SPARSE[:gather]
        + """  %rows = bf16[8,512]{1,0} constant(0)
  ROOT %scatter.1 = bf16[100,512]{1,0} scatter(%param_0.1645, %param_1.1688, %rows)
"""
        + SPARSE[SPARSE.index('}, execution_thread') :]
    )
    assert read_cost(text, MESH, TPU).aside == 2 * 8 * 512 * 2 + 8 * 4


def collective_on_sparsecore(op: str, attributes: str) -> str:
    """Returns SPARSE with a collective in the place of the gather."""
    start = SPARSE.index('  ROOT %gather_offload_custom_fusion.3')
    end = SPARSE.index('\n}', start)
    collective = f'  ROOT %it = bf16[8,512]{{1,0}} {op}(%param_0.1646), {attributes}'
    return SPARSE[:start] + collective + SPARSE[end:]


def test_a_collective_within_calls_counts_and_hides():
    groups = "replica_groups=mesh['fsdp'=4,'tp'=2] {'tp'}"
    cost = read_cost(collective_on_sparsecore('all-gather', groups), MESH, TPU)
    gather = cost.traffic['all-gather', 'tp']
    assert (gather.bytes, gather.seconds, gather.exposed) == (4096, 4096, 0)
    slow = dataclasses.replace(TPU, link=0.5)
    cost = read_cost(collective_on_sparsecore('all-gather', groups), MESH, slow)
    assert cost.traffic['all-gather', 'tp'].exposed == 2 * 4096 - 5000
    assert cost.seconds == 5720


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (SPARSE.replace(' call-', ' host-'), 'instruction host-start'),
        (SPARSE.replace('call-done(%gather_offload_async_start.update)', 'call-done(%table)'),
         'call-done without its start'),
        (collective_on_sparsecore('all-shuffle', 'replica_groups={{0,1}}'),
         'the collective all-shuffle'),
        (collective_on_sparsecore('all-gather', 'replica_groups=ring(0..7)'), 'ring'),
        (PROGRAM.replace('%k = s32[] get-tuple-element(%d), index=0',
                         '%k = s32[] custom-call(%d), called_computations={%add, %body2}').replace(
            '%condition (c:', """%body2 (d: f32[8]) -> f32[8] {
  %d2 = f32[8] parameter(0)
  ROOT %ar = f32[8] all-reduce(%d2), replica_groups=[4,2]<=[8], to_apply=%add
}

%condition (c:"""), 'all-reduce within custom-call'),
    ],
)  # fmt: skip
def test_a_form_that_is_not_known_is_named_and_never_counts_as_nothing(text, message):
    with pytest.raises(UnknownFormError, match=message):
        read_cost(text, MESH, TPU)


def test_empty_groups_are_one_of_all_devices():
    cost = read_cost(PROGRAM.replace('replica_groups=[4,2]<=[8]', 'replica_groups={}'), MESH, TPU)
    assert cost.traffic['reduce-scatter', 'pp+fsdp+tp'].bytes == 6 * 32 * 7


def test_metadata_that_looks_like_the_end_of_a_computation_is_none():
    odd = 'metadata="a line\n}}, metadata={op_name="x"'
    assert 'metadata="a line\nthat is broken"' in PROGRAM
    text = PROGRAM.replace('metadata="a line\nthat is broken"', odd)
    assert read_cost(text, MESH, TPU) == read_cost(PROGRAM, MESH, TPU)


@pytest.mark.parametrize(
    ('text', 'why'),
    [
        (jax.errors.JaxRuntimeError('INTERNAL: no text\nmore'), 'INTERNAL: no text'),
        (SPARSE.replace(' call-', ' host-'), 'it has a form that is not known here: the async'),
        (SPARSE, ''),
    ],
    ids=['not printed', 'not known', 'read'],
)
def test_a_program_that_cannot_be_read_has_its_memory_and_the_reason(text, why, monkeypatch):
    class Step:
        def compile(self):
            return self

        def memory_analysis(self):
            sizes = {'argument': 8, 'temp': 11, 'host_temp': 3, 'output': 8, 'alias': 8}
            sizes = {f'{x}_size_in_bytes': n for x, n in sizes.items()}
            return SimpleNamespace(**sizes, peak_memory_in_bytes=13)

        def as_text(self) -> str:
            if isinstance(text, Exception):
                raise text
            return text

    monkeypatch.setattr(compiled, 'topology_devices', lambda _: jax.devices())
    monkeypatch.setattr(compiled, 'setup', lambda *_: None)
    monkeypatch.setattr(compiled, 'lower_train_step', lambda _: Step())
    monkeypatch.setattr(compiled, 'compiler_versions', lambda _: {'libtpu': '0', 'jax': '1'})
    answer = compile_step(small_config(), 'v4:2x2x1', TPU)
    assert answer.why.startswith(why)
    assert (answer.cost is None) == bool(why)
    assert (answer.reserved, answer.peak) == (16, 13)
    assert answer.compiler == {'libtpu': '0', 'jax': '1'}


@pytest.mark.tpu
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_each_chips_program_of_a_large_table_is_read(name, tpu_devices):
    """A lookup and its gradient, on SparseCores of some, and gathers that libtpu may put there."""
    V, D, devices = 100_352, 512, tpu_devices(name)
    n = len(devices)
    mesh = make_mesh({FSDP: n}, devices)

    def gradient(w_vD: jax.Array, ids: jax.Array) -> jax.Array:
        def total(w_vD: jax.Array) -> jax.Array:
            rows = all_gather(w_vD.astype(jnp.bfloat16), FSDP, 0)[ids]
            return (rows.astype(jnp.float32) ** 2).sum()

        return jax.grad(total)(w_vD)

    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=P(FSDP), out_specs=P(FSDP))
    sharding = NamedSharding(mesh, P(FSDP))
    w = jax.ShapeDtypeStruct((V, D), jnp.float32, sharding=sharding)
    ids = jax.ShapeDtypeStruct((4096 * n,), jnp.int32, sharding=sharding)
    text = jax.jit(sharded).lower(w, ids).compile().as_text()
    chip = CHIPS[name.partition(':')[0]]
    cost = read_cost(text, mesh, chip)
    traffic = {kind: t.bytes for (kind, axes), t in cost.traffic.items() if axes == FSDP}
    table = V * D * 2 * (n - 1) / n
    assert traffic['all-gather'] == table
    scattered = traffic.get('reduce-scatter', 0) + traffic.get('all-reduce', 0) / 2
    assert scattered in (table, 2 * table)  # in bfloat16 or float32
    assert 2 * V * D * 2 / chip.bandwidth < cost.seconds < 1
    if name.startswith('tpu7x'):
        assert 0 < cost.aside < 0.1


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY'):
        parse('nothing')
