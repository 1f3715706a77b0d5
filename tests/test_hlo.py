"""What a compiled program is read to hold."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxlm import hlo

# As the TPU's compiler writes it, shortened.
TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "/any/jaxlm/models/llama.py"
2 "/any/site-packages/optax/adam.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=95 end_line=95 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %inner = bf16[8,4]{1,0} reduce-scatter(%a), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%all-reduce-scatter.1 (b: bf16[8,4]) -> bf16[4,4] {
  %b = bf16[8,4]{1,0} parameter(0)
  %whole = bf16[8,4]{1,0} all-reduce(%b), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %own = bf16[4,4]{1,0} dynamic-slice(%whole, %at, %zero), dynamic_slice_sizes={4,4}
}

%begin (c: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %c = bf16[8,4]{1,0} parameter(0)
  %begun = bf16[32,4]{1,0} all-gather(%c), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  ROOT %start = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) custom-call(%begun), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (c: bf16[8,4], d: bf16[32,4], e: bf16[8,4]) -> (bf16[8,4], bf16[32,4]) {
  %goes_on = bf16[32,4]{1,0} all-gather(%c), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  ROOT %both = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) tuple(%e, %goes_on)
}

%end (c: bf16[8,4], d: bf16[32,4]) -> bf16[32,4] {
  %ended = bf16[32,4]{1,0} all-gather(%c), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  ROOT %done = bf16[32,4]{1,0} custom-call(%ended, %d), custom_call_target="AsyncCollectiveDone"
}

%cond (t: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  %t = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (t: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %t = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %product = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/jvp()/while/body/dot_general" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %gather = bf16[32,4]{1,0} all-gather(%product), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}
  %parts = bf16[4,4]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/transpose(jvp())/while/body/dot_general" stack_frame_id=2}
  %kernel = (f32[1,2,8,128]{3,2,1,0}, bf16[1,2,8,128]{3,2,1,0}) custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1]{1,0}, bf16[1,2,8,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash_fwd" stack_frame_id=1}
  ROOT %out = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%i, %product)
}

%masked (a: bf16[64,4], mask: pred[2,64], b: bf16[64,8]) -> bf16[2,4,8] {
  %a = bf16[64,4]{1,0} parameter(0)
  %mask = pred[2,64]{1,0:T(8,128)(4,1)S(1)} parameter(1)
  %b = bf16[64,8]{1,0} parameter(2)
  ROOT %each = bf16[2,4,8]{2,1,0} convolution(%a, %b), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0fb_0io->0bf
}

%cheap (x: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} fusion(%x), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"10"}
}

%dear (x: f32[8]) -> f32[8] {
  ROOT %d = f32[8]{0} fusion(%x), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"70"}
}

ENTRY %main.1_spmd (p: bf16[8,4]) -> bf16[8,4] {
  %p = bf16[8,4]{1,0} parameter(0)
  %loop = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%start), condition=%cond, body=%body
  %either = f32[8]{0} conditional(%which, %a, %b), branch_computations={%cheap, %dear}
  %little = f32[16,4]{1,0} parameter(1)
  %room = f32[64,4]{1,0} broadcast(%zero), dimensions={}
  %there = f32[64,4]{1,0} ragged-all-to-all(%little, %room, %i, %s, %o, %r), replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}
  %back = f32[16,4]{1,0} ragged-all-to-all(%there, %little, %i, %s, %o, %r), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  %f1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%p), kind=kCustom, calls=%begin
  %f2 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) fusion(%p, %f1, %little), kind=kOutput, calls=%async_collective_fusion.1
  %f3 = bf16[32,4]{1,0} fusion(%p, %f2), kind=kCustom, calls=%end
  %by_expert = bf16[64,8]{1,0} custom-call(%count, %there, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]{0}, bf16[64,4]{1,0}, bf16[2,4,8]{2,1,0}}, frontend_attributes={ragged_dot_tiling="128,4,8"}, metadata={op_name="ragged-dot-none"}
  %gradient = bf16[2,4,8]{2,1,0} fusion(%there, %mask, %by_expert), kind=kOutput, calls=%masked, backend_config={"window_config":{"estimated_cycles":"6000"},"mask_aggregator_config":{"iteration_skipper_mode":"ITERATION_SKIPPER_MODE_ITERATION_INDICES"}}
  %send = (f32[6]{0}, u32[], token[]) send(%little, %after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %summed = (f32[6]{0}, u32[], token[]) recv(%after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %gathered = (f32[18]{0}, u32[], token[]) recv(%after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-gather.1_0",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_GATHER"}
  %scattered = (f32[2]{0}, u32[], token[]) recv(%after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="reduce-scatter.1_0",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="REDUCE_SCATTER"}
  %kept = ((bf16[7,8,4]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,4]{2,1,0:T(8,128)(2,1)}, s32[]{:T(128)}), bf16[7,8,4]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%there_S5, %part, %i)
  %back_again = ((bf16[7,8,4]{2,1,0:T(8,128)(2,1)S(5)}, s32[]{:T(128)}), bf16[1,8,4]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) dynamic-slice-start(%there_S5, %i), dynamic_slice_sizes={1,8,4}
  %copied = (f32[6]{0:T(128)S(5)}, f32[6]{0:T(128)}, u32[]{:S(2)}) copy-start(%little)
  %near = (f32[6]{0:T(128)S(1)}, f32[6]{0:T(128)}, u32[]{:S(2)}) copy-start(%little)
  ROOT %sum = (f32[6]{0}, f32[6]{0}) all-reduce-start(%either, %either), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def operations():
    return {op.name: op for op in hlo.read(TEXT)}


def test_a_loop_counts_as_often_as_it_runs_and_of_a_choice_the_dearest(operations):
    costs = {name: op.times * op.cycles for name, op in operations.items() if op.cycles}
    assert costs == {"product": 32_000, "d": 70, "gradient": 750}


def test_a_loop_may_count_without_a_sign():
    """As products do whose parts are sent around meanwhile."""
    text = re.sub(r"s32(\[\]\S* constant\(32\))", r"u32\1", TEXT)
    assert text != TEXT and next(op.times for op in hlo.read(text) if op.name == "product") == 32


def test_a_choice_counts_as_often_as_its_scope_says():
    """A ring leaves out the blocks of keys that nobody sees, by a choice in each."""
    text = TEXT.replace("{%cheap, %dear}", '{%cheap, %dear}, metadata={op_name="jit(step)/seen_0.6000/cond"}')
    dear = next(op for op in hlo.read(text) if op.name == "d")
    assert dear.times * dear.cycles == pytest.approx(0.6 * 70)


def test_a_choice_that_few_ask_for_counts_only_where_it_is_wanted():
    text = TEXT.replace("{%cheap, %dear}", '{%cheap, %dear}, metadata={op_name="jit(step)/wanted/cond"}')
    counted = [{op.name for op in hlo.read(text, wanted=wanted)} for wanted in (False, True)]
    assert counted[1] - counted[0] == {"d"}


def test_collectives_are_found_within_fusions_with_their_group_and_what_they_send(operations):
    inner, gather, total = (operations[name] for name in ("inner", "gather", "sum"))
    assert (inner.kind, inner.times, inner.group, inner.stride) == ("reduce-scatter", 32, 2, 4)
    assert (gather.group, gather.stride, gather.begun) == (4, 1, False)
    assert gather.sent == 3 / 4 * 32 * 4 * 2 and inner.sent == 1 / 2 * 8 * 4 * 2 * 2
    assert (total.kind, total.group, total.stride, total.begun) == ("all-reduce", 2, 4, True)
    assert total.sent == 2 * 1 / 2 * 2 * 6 * 4


def test_a_sum_of_which_each_device_keeps_its_part_is_a_reduce_scatter(operations):
    whole = operations["whole"]
    assert (whole.kind, whole.times, whole.sizes) == ("reduce-scatter", 32, (("bf16", (4, 4)),))
    assert whole.sent == 4 * 4 * 2, "half of it, and not twice that"
    assert (whole.source, "transpose(" in whole.scope) == ("jaxlm/models/llama.py:95", True), "the fusion tells them"


def test_what_is_sent_beside_other_fusions_is_one_collective_that_was_begun(operations):
    assert operations["begun"].begun and operations["begun"].times == 1
    assert not {"goes_on", "ended"} & operations.keys()


def test_a_ragged_exchange_sends_what_there_is_and_not_what_there_is_room_for(operations):
    there, back = operations["there"], operations["back"]
    assert there.sent == back.sent == 1 / 2 * 16 * 4 * 4
    assert (there.group, there.stride) == (back.group, back.stride) == (2, 4)


def test_of_rows_by_expert_those_are_counted_that_would_come_if_all_got_as_much(operations):
    """A buffer has room for 64, and 16 are sent; the gradient is written as every expert's of every row, and skips."""
    product, gradient = operations["by_expert"], operations["gradient"]
    assert (product.times, product.rows, product.tiling) == (1, 16, (128, 4, 8))
    assert gradient.times * gradient.cycles == 6000 / 2 * 16 / 64
    alone = {op.name: op for op in hlo.read(re.sub(r"\n.* ragged-all-to-all\(.*", "", TEXT))}
    assert (alone["by_expert"].rows, alone["gradient"].times) == (64, 1 / 2), "where none travel, each row is one's"


def test_what_goes_to_other_slices_through_the_host_is_a_collective(operations):
    summed, gathered, scattered = (operations[name] for name in ("summed", "gathered", "scattered"))
    assert (summed.kind, summed.group, summed.stride, summed.begun) == ("all-reduce", 3, 8, True), "8 devices a slice"
    assert summed.sent == 2 * 2 / 3 * 6 * 4 and "send" not in operations
    assert gathered.kind == "all-gather" and gathered.sent == 2 * 6 * 4, "its part to each of two others"
    assert scattered.kind == "reduce-scatter" and scattered.sent == 2 / 3 * 6 * 4, "of what it has, their parts"


def test_what_is_kept_by_the_host_is_moved_there_and_back_beside_other_work(operations):
    moves = {op.name: (op.kind, op.bytes, op.begun) for op in operations.values() if op.kind in hlo.HOST}
    part = 8 * 4 * 2
    assert moves == dict(
        kept=("to-host", part, True), back_again=("from-host", part, True), copied=("to-host", 24, True)
    )  # fmt: skip
    assert operations["kept"].inside == "main.1_spmd", "the vector memory is the device's own"


def test_an_operation_is_known_by_the_line_of_ours_that_asked_for_it(operations):
    assert operations["product"].source == "jaxlm/models/llama.py:95", "not by the library's below it"
    assert operations["kernel"].inputs == (("s8", (1, 1)), ("bf16", (1, 2, 8, 128)))


def test_a_loop_of_this_machines_compiler_tells_how_often_it_runs():
    def five_times(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, length=5)[0]

    text = jax.jit(five_times).lower(jnp.ones((8, 8))).compile().as_text() or ""
    computations, entry = hlo._computations(text)
    loop = next(line for line in computations[entry] if " while(" in line)
    assert hlo._trips(computations, "", loop) == 5


def test_a_loop_whose_bound_is_an_argument_counts_as_often_as_is_said():
    text = TEXT.replace("constant(32)", "parameter(1)")
    assert [op.times for op in hlo.read(text, 7) if op.name in ("product", "gather", "d")] == [7, 7, 1]
    assert next(op.times for op in hlo.read(text) if op.name == "product") == 1
