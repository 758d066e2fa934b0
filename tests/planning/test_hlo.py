"""Collectives of compiled programs, read from text as the TPU compiler writes it."""

from dmdr_jax.planning import hlo

TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%body (arg: (s32[], bf16[512,64])) -> (s32[], bf16[512,64]) {
  %part = bf16[512,64]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %all-gather.1 = bf16[512,512]{0,1:T(8,128)(2,1)} all-gather(%part), replica_groups=mesh['a'=2,'b'=8], \
device_ids=([2,8]T(1,0)) {'b'}, dimensions={1}
  %rs = bf16[512,64]{0,1:T(8,128)(2,1)} fusion(%all-gather.1), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %out = (s32[], bf16[512,64]) tuple(%next, %rs)
}

%condition (arg: (s32[], bf16[512,64])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(23)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.2), direction=LT
}

%all-reduce-scatter.3 (input: bf16[512,512]) -> bf16[512,64] {
  %input = bf16[512,512]{0,1:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[512,512]{0,1:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[512,64]{0,1:T(8,128)(2,1)} dynamic-slice(%all-reduce.9, %zero, %at)
}

%fused_1 (p: f32[8]) -> f32[8] {
  %all-gather.7 = f32[64]{0} all-gather(%p), replica_groups=[2,8]<=[16], frontend_attributes={chain_id="5"}
}

%fused_2 (p: f32[8]) -> f32[8] {
  %all-gather.8 = f32[64]{0} all-gather(%p), replica_groups=[2,8]<=[16], frontend_attributes={chain_id="5"}
}

ENTRY %main (p: bf16[512,64]) -> bf16[512,64] {
  %while.1 = (s32[]{:T(128)}, bf16[512,64]{1,0}) while(%tuple), condition=%condition, body=%body
  %a = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_1
  %b = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_2
  %own = f32[100]{0} all-reduce(%y), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %pair = (f32[10]{0}, f32[20]{0}) all-reduce(%y, %z), replica_groups={{0,1},{2,3}}, to_apply=%add
  %full = bf16[1024]{0} parameter(1)
  %shard = bf16[128]{0:T(1024)(128)(2,1)} reduce-scatter(%full), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %start = (f32[4]{0}, f32[32]{0}) all-gather-start(%q), replica_groups=[1,8]<=[8]
  %done = f32[32]{0} all-gather-done(%start)
  ROOT %moved = bf16[6]{0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives():
    found = hlo.collectives(TEXT)
    gathers = [(c.name, c.size, c.times) for c in found if c.kind == hlo.GATHER]
    assert gathers == [("all-gather.1", 512 * 512 * 2, 23), ("all-gather.7", 256, 1), ("start", 128, 1)]
    assert hlo.total(found, hlo.SCATTER) == 23 * 512 * 512 * 2 + 1024 * 2
    assert hlo.total(found, hlo.REDUCE) == 4 * 30  # what is alone in its group sends nothing
    assert max(c.largest for c in found if c.kind == hlo.REDUCE) == 20
    assert hlo.total(found, hlo.OTHER) == 12


def test_a_loop_without_a_bound_counts_once():
    text = TEXT.replace("s32[]{:T(128)} constant(23)", "s32[]{:T(128)} get-tuple-element(%arg), index=1")
    assert [c.times for c in hlo.collectives(text) if c.name == "all-gather.1"] == [1]


def test_the_first_group():
    assert hlo.members("replica_groups={{0,1},{2,3}}, x") == (0, 1)
    assert hlo.members("replica_groups=[2,8]<=[16]") == tuple(range(8))
    assert hlo.members("replica_groups=[4,2]<=[2,4]T(1,0), x") == (0, 4)
    assert hlo.members("replica_groups=mesh['a'=2,'b'=8] {'a','b'}") == tuple(range(16))
    assert hlo.members("replica_groups=mesh['a'=2,'b'=8] {'a'}") == (0, 8)
    assert hlo.members("replica_groups=mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'b'}") == tuple(range(0, 16, 2))
    assert hlo.members("source_target_pairs={{0,1}}") == ()


def test_sums_of_parts_are_not_of_the_whole():
    def line(name, size, groups):
        return f"  %{name} = bf16[{size}]{{0}} all-reduce(%y), replica_groups={groups}, to_apply=%add\n"

    body = line("parts", 4096, "[4,2]<=[2,4]T(1,0)") + line("whole", 512, "[2,4]<=[8]") + line("all", 256, "[1,8]<=[8]")
    found = hlo.collectives(f"ENTRY %main (p: bf16[8]) -> bf16[8] {{\n{body}}}\n")
    assert hlo.largest_whole(found, 4) == 512  # places 0 and 4 have the same part
    assert hlo.largest_whole(found, 2) == 512 and hlo.largest_whole(found, 1) == 4096
    assert hlo.largest_whole(found[:1], 4) == 0
