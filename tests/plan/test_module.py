"""Reading compiled programs: loops counted, collectives sized, compilers' habits known."""

from minimind_jax.plan.module import read_module, shape_bytes

# As the TPU compiler writes it: a loop of 12 rounds whose all-gather runs beside a product (start, fusion, end), and an
# all-reduce of which each device keeps a slice.
TPU = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: bf16[1,128,1024]) -> (bf16[1,128,1024], bf16[1,1024,1024], u32[]) {
  %p = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %ag.1 = bf16[1,1024,1024]{2,1,0} all-gather(%p), channel_id=8, backend_config={"async_collective_fusion_config":1}
  ROOT %c.1 = (bf16[1,128,1024], bf16[1,1024,1024], u32[]) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[1,128,1024]) -> bf16[1,1024,1024] {
  %p.2 = bf16[1,128,1024]{2,1,0} parameter(0)
  ROOT %ag.2 = bf16[1,1024,1024] all-gather(%p.2), channel_id=8, backend_config={"async_collective_fusion_config":1}
}

%all-reduce-scatter.1 (q: f32[1024,1024]) -> f32[128,1024] {
  %q = f32[1024,1024]{1,0:T(8,128)} parameter(0)
  %ar = f32[1024,1024]{1,0:T(8,128)} all-reduce(%q), channel_id=6, to_apply=%add
  ROOT %slice = f32[128,1024]{1,0} dynamic-slice(%ar), dynamic_slice_sizes={128,1024}
}

%condition (w: (s32[], f32[1024,1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %w = (s32[]{:T(128)}, f32[1024,1024]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%w), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (w.1: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {
  %w.1 = (s32[]{:T(128)}, f32[1024,1024]{1,0}) parameter(0)
  %f.1 = (bf16[1,128,1024]{2,1,0}, bf16[1,1024,1024]{2,1,0}, u32[]) fusion(%w.1), kind=kCustom, calls=%start
  %f.2 = bf16[1,1024,1024]{2,1,0} fusion(%f.1), kind=kOutput, calls=%beside
  %k = f32[8,128]{1,0} custom-call(%f.2), custom_call_target="tpu_custom_call", operand_layout_constraints={}
  ROOT %t = (s32[]{:T(128)}, f32[1024,1024]{1,0}) tuple(%w.1)
}

ENTRY %main (a: f32[1024,1024]) -> f32[128,1024] {
  %a = f32[1024,1024]{1,0} parameter(0)
  %t.1 = (s32[], f32[1024,1024]{1,0}) tuple(%a)
  %loop = (s32[]{:T(128)}, f32[1024,1024]{1,0}) while(%t.1), condition=%condition, body=%body
  ROOT %rs = f32[128,1024]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""

# As the GPU compiler does: asynchronous pairs, a wrapped reduce-scatter, and the rounds of the loop written down.
GPU = """HloModule jit_step

%wrapped (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  ROOT %rs = f32[8]{0} reduce-scatter(%p), channel_id=3, dimensions={0}
}

%body (w: (s32[], f32[64])) -> (s32[], f32[64]) {
  %w = (s32[], f32[64]{0}) parameter(0)
  %g = f32[64]{0} get-tuple-element(%w), index=1
  %s = ((f32[64]{0}), f32[8]{0}) async-start(%g), calls=%wrapped
  %d = f32[8]{0} async-done(%s)
  %ags = (f32[8]{0}, f32[64]{0}) all-gather-start(%d), channel_id=4, dimensions={0}
  %agd = f32[64]{0} all-gather-done(%ags)
  %fmha = (bf16[2,8]{1,0}, u8[0]{0}) custom-call(%agd), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (s32[], f32[64]{0}) tuple(%agd)
}

%cond (w.2: (s32[], f32[64])) -> pred[] {
  %w.2 = (s32[], f32[64]{0}) parameter(0)
  ROOT %lt = pred[] fusion(%w.2), kind=kLoop, calls=%compare
}

ENTRY %main (a: f32[64]) -> f32[64] {
  %a = f32[64]{0} parameter(0)
  %t.1 = (s32[], f32[64]{0}) tuple(%a)
  %loop = (s32[], f32[64]{0}) while(%t.1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %ar = f32[64]{0} all-reduce-start(%a), channel_id=5
}
"""


def test_the_tpu_compilers_asynchronous_gather_is_one_and_its_reduce_scatter_is_no_all_reduce():
    module = read_module(TPU)
    gather, scatter = module.collectives["all-gather"], module.collectives["reduce-scatter"]
    assert set(module.collectives) == {"all-gather", "reduce-scatter"}
    assert (gather.count, gather.runs, gather.bytes) == (1, 12, 12 * 1024 * 1024 * 2)
    assert (scatter.count, scatter.runs, scatter.bytes) == (1, 1, 1024 * 1024 * 4)
    assert module.custom_calls["tpu_custom_call"] == (1, 12)
    assert module.unknown_loops == 0


def test_the_gpu_compilers_pairs_count_once_and_a_wrapped_collective_runs_with_its_caller():
    module = read_module(GPU)
    assert {kind: (c.count, c.runs, c.bytes) for kind, c in module.collectives.items()} == {
        "reduce-scatter": (1, 3, 3 * 64 * 4),
        "all-gather": (1, 3, 3 * 64 * 4),
        "all-reduce": (1, 1, 64 * 4),
    }
    assert module.custom_calls["__cudnn$fmhaSoftmax"] == (1, 3)


def test_what_only_one_branch_does_counts_as_done():
    text = GPU.replace(
        "%ags = (f32[8]{0}, f32[64]{0}) all-gather-start(%d), channel_id=4, dimensions={0}",
        "%c = f32[64]{0} conditional(%p, %g, %g), true_computation=%gather, false_computation=%none",
    )
    gather = """%gather (x: f32[8]) -> f32[64] {
  %x = f32[8]{0} parameter(0)
  ROOT %ag = f32[64]{0} all-gather(%x), channel_id=4, dimensions={0}
}

%body"""
    gathered = read_module(text.replace("%body", gather, 1)).collectives["all-gather"]
    assert (gathered.count, gathered.runs, gathered.bytes) == (1, 3, 3 * 64 * 4)


def test_a_loop_of_unknown_length_is_told():
    module = read_module(GPU.replace('{"known_trip_count":{"n":"3"}}', "{}"))
    assert module.unknown_loops == 1 and module.collectives["all-gather"].runs == 1


def test_bytes_of_shapes():
    assert shape_bytes("f32[8,128]{1,0:T(8,128)}") == 4096
    assert shape_bytes("(bf16[2,3]{1,0}, pred[5]{0}, s32[])") == 12 + 5 + 4
    assert shape_bytes("f8e4m3fn[16]{0}") == 16 and shape_bytes("s4[16]{0}") == 8 and shape_bytes("token[]") == 0
