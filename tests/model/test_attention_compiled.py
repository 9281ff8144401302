"""Attention through the real compilers of GPUs and TPUs, without such a device: which kernels its gradient and the
reading of prompts are given, and how much memory these take.

The compilers come with `minimind-jax[cuda12]` and `[tpu]`; $MINIMIND_CUDA_PYTHON and $MINIMIND_TPU_PYTHON name another
interpreter that has them.
"""

import json
from pathlib import Path

import pytest
from compilers import run_compiler

CUDNN = ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
CUDNN_MASKED = ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
SPLASH = ["tpu_custom_call"] * 3  # forward, queries' gradient, keys' and values'
SHAPE = (8, 2048, 8, 4, 96)
FSDP_8, ALL_THREE = {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}


def run_script(platform: str, script: str, *arguments: str) -> list:
    """What a script beside this file prints, in a Python that has the platform's compiler."""
    return run_compiler(platform, Path(__file__).with_name(script), *arguments)


def compile_cases(platform: str, device: str, topology: str, cases: list[tuple]) -> list[dict]:
    """What `compile_attention` prints; cases are (mesh sizes, (B, T, N, K, H), packed) and maybe a path."""
    names = "sizes", "shape", "packed", "path"
    cases = [dict(zip(names, (*case, "auto")[:4], strict=True)) for case in cases]
    return run_script(platform, "compile_attention.py", device, topology, json.dumps(cases))


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "device", "kernel"), [("cuda", "h100", CUDNN[0]), ("tpu", "tpu-v5e", SPLASH[0])])
def test_prompts_are_read_by_fused_attention_without_a_mask(platform, device, kernel):
    topology = "1x1" if platform == "tpu" else "1"
    cases = [{"sizes": {}, "length": length, "model": {}} for length in (16, 512)]
    assert run_script(platform, "compile_prefill.py", device, topology, json.dumps(cases)) == [[kernel], [kernel]]


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "device", "topology"), [("cuda", "h100", "8"), ("tpu", "tpu-v5e", "2x4")])
def test_samples_are_written_with_parameters_on_a_mesh(platform, device, topology):
    """As a run does it: outside of a step, where the compiler finds kernels that nobody has cut, and refuses them."""
    experts = {"num_experts": 4, "num_experts_per_tok": 1}
    meshes = [({"data": 8}, {}), (ALL_THREE, {}), ({"data": 1, "fsdp": 2, "expert": 4}, experts)]
    cases = [{"sizes": sizes, "length": 64, "model": model} for sizes, model in meshes]
    assert run_script(platform, "compile_prefill.py", device, topology, json.dumps(cases)) == [[], [], []]


def test_one_gpu_runs_cudnn_and_holds_no_scores():
    cases = [({}, SHAPE, False), ({}, SHAPE, True), ({}, (8, 341, 8, 2, 64), True)]
    by_documents = [({}, SHAPE, True, "cudnn_packed"), ({}, (8, 341, 8, 2, 64), True, "cudnn_packed")]
    plain, packed, odd, *documents = compile_cases("cuda", "h100", "1", [*cases, *by_documents])
    assert plain["kernels"] == CUDNN and packed["kernels"] == odd["kernels"] == CUDNN_MASKED
    B, T, N, _, _ = SHAPE
    assert plain["temporaries"] < 0.1 * 4 * B * N * T * T
    # The mask and, until jax 0.12, its gradient: two bytes for each pair of positions, shared by the heads.
    assert packed["temporaries"] < plain["temporaries"] + 2.2 * (2 * B * T * T)
    for case in documents:  # and with a mask of one row what has no room, where the gradient computes both once more
        assert sorted(case["kernels"]) == sorted([*CUDNN, *CUDNN_MASKED, CUDNN_MASKED[0]])
    log_sums = 4 * B * (T // 128) * N * T  # one of each token, for each document of a row that there is room for
    assert documents[0]["temporaries"] < plain["temporaries"] + log_sums + 2.2 * (2 * 2 * T * T)
    assert documents[0]["temporaries"] < 0.6 * packed["temporaries"]


def test_gpus_run_tokamax_over_documents_without_a_mask():
    cases = [({}, SHAPE, True, "tokamax"), (ALL_THREE, SHAPE, True, "tokamax")]
    whole, part = compile_cases("cuda", "h100", "8", cases)
    if "missing" in whole:
        pytest.skip(f"no tokamax for {whole['missing']}: pip install 'minimind-jax[tokamax]'")
    for case in (whole, part):
        assert case["kernels"] == ["mosaic_gpu_v2"] * 3  # forward, queries' gradient, keys' and values'
    B, T, N, _, _ = SHAPE
    assert max(case["temporaries"] for case in (whole, part)) < 0.15 * 4 * (B / 8) * N * T * T  # of a device


def test_eight_gpus_each_run_cudnn_on_their_own_part():
    cases = [({"data": 8}, (64, *SHAPE[1:]), True), (FSDP_8, SHAPE, True), (ALL_THREE, SHAPE, True)]
    whole, *parts, documents = compile_cases("cuda", "h100", "8", [*cases, (ALL_THREE, SHAPE, True, "cudnn_packed")])
    for part in parts:
        assert part["kernels"] == CUDNN_MASKED
        assert part["temporaries"] < 0.3 * whole["temporaries"]
    assert set(documents["kernels"]) == {*CUDNN, *CUDNN_MASKED}
    assert documents["temporaries"] < 0.3 * whole["temporaries"]


def test_eight_tpus_each_run_splash_on_their_own_part():
    (part,) = compile_cases("tpu", "tpu-v5e", "2x4", [(ALL_THREE, (8, 256, 8, 4, 96), True)])
    assert part["kernels"] == SPLASH


@pytest.mark.slow
def test_splash_for_every_width_and_length():
    widths = [({}, (*SHAPE[:-1], head_dim), True) for head_dim in (64, 96, 128)]
    B, T, N, _, _ = SHAPE
    for result in compile_cases("tpu", "tpu-v5e", "1x1", [*widths, ({}, SHAPE, False), ({}, (4, 340, 8, 2, 64), True)]):
        assert result["kernels"] == SPLASH
        assert result["temporaries"] < 0.2 * 4 * B * N * T * T


@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", "h100", "8"), ("tpu", "tpu-v5e", "2x4")], ids=lambda target: target[0])
def test_on_every_mesh_and_where_heads_do_not_divide(target):
    meshes = [FSDP_8, ALL_THREE, {"data": 4, "expert": 2}, {"data": 1, "tensor": 8}]
    *parts, not_divided = compile_cases(*target, [(sizes, SHAPE, True) for sizes in meshes])
    for part in parts:
        assert part["kernels"] == (SPLASH if target[0] == "tpu" else CUDNN_MASKED)
    assert not_divided["kernels"] == []  # 4 key/value heads over 8 devices
