"""Cost read from the text of compiled programs: loops, branches, collectives, kernels."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from machine.chips import CHIPS
from parallel import AXES
from planning.compiled import KERNEL_EFFICIENCY, gpu_price, mesh_axes, read_cost, splash_flops
from planning.hlo import device_groups, parse

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


def test_splash_attention_counts_its_causal_matmuls():
    text = PROGRAM.replace('%kernel = f32[8]{0}', '%splash_mha_fwd.1 = bf16[2,3,128,64]{3,2,1,0}')
    program = parse(text)
    kernel = next(i for i in program.instructions(program.entry) if 'mha_fwd' in i.name)
    assert splash_flops(kernel) == 2 * 2 * 2 * 3 * 128 * 128 * 64 / 2
    cost = read_cost(text, MESH, TPU)
    assert cost.unpriced == 0
    assert cost.kernel_seconds == splash_flops(kernel) / (TPU.flops * KERNEL_EFFICIENCY)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY'):
        parse('nothing')
