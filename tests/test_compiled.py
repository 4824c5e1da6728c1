"""What is read from a compiled program: groups, bytes, loops, branches."""

from types import SimpleNamespace

import numpy as np
import pytest

from compiled import Reader, attention_flops, groups, mesh_axes, parse
from parallel import AXES

MESH = SimpleNamespace(devices=np.arange(8).reshape(2, 1, 2, 1, 2), axis_names=AXES)

# A loop of 6 trips whose body has a matmul of 100 cycles, a reduce-scatter over tp, and a branch of
# 10 or 70 cycles; after it an asynchronous all-gather over fsdp and a kernel without an estimate.
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
  ROOT %done = f32[16]{0} all-gather-done(%start)
}
"""


def test_loops_count_by_trips_and_conditionals_by_their_costliest_branch():
    cost = Reader(PROGRAM, MESH, flops_per_cycle=1.0).cost()
    assert cost.cycles == 6 * (100 + 70)
    assert cost.unpriced == 1
    scatter = cost.traffic['reduce-scatter', 'tp']
    assert (scatter.count, scatter.bytes, scatter.exposed) == (6, 6 * 32, 6 * 32)
    gather = cost.traffic['all-gather', 'fsdp']
    assert (gather.count, gather.bytes, gather.exposed) == (1, 32, 0)
    assert cost.total().bytes == 6 * 32 + 32


@pytest.mark.parametrize(
    ('text', 'axes'),
    [
        ('replica_groups={{0,4},{1,5},{2,6},{3,7}}', 'pp'),
        ('replica_groups={{0,1,2,3},{4,5,6,7}}', 'fsdp+tp'),
        ('replica_groups=[4,2]<=[8]', 'tp'),
        ('replica_groups=[4,2]<=[2,2,2]T(2,0,1)', 'fsdp'),
        ('source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}', 'pp'),
        ('replica_groups={}', 'none'),
    ],
)
def test_axes_of_a_collective(text, axes):
    assert mesh_axes(groups(text), MESH) == axes


def test_splash_attention_counts_its_causal_matmuls():
    text = PROGRAM.replace('%kernel = f32[8]{0}', '%splash_mha_fwd.1 = bf16[2,3,128,64]{3,2,1,0}')
    program, entry = parse(text)
    kernel = next(i for i in program[entry] if 'mha_fwd' in i.name)
    assert attention_flops(kernel) == 2 * 2 * 2 * 3 * 128 * 128 * 64 / 2
    assert Reader(text, MESH, flops_per_cycle=100.0).cost().unpriced == 0


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='no ENTRY'):
        parse('nothing')
