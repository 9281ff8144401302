"""Training steps through the real compilers of GPUs and TPUs, without such a device: what `compute.deterministic`
leaves in them, and the attention of a model that sees."""

import json
from pathlib import Path

import pytest
from compilers import run_compiler

TINY = (
    "--model.hidden_size 64 --model.num_hidden_layers 1 --model.num_attention_heads 1 --model.num_key_value_heads 1 "
    "--model.vocab_size 512 --data.seq_len 512 --training.batch_tokens 1024 --training.accumulation_steps 1"
).split()
CUDNN, MASKED = "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"
WORDS = {MASKED: 1, MASKED + "Backward": 1}
SPLASH = "tpu_custom_call"  # forward one, of the gradient two


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> list[str]:
    """Arguments of a model whose tower has 400 patches and one layer."""
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    tower |= {"model_type": "siglip_vision_model", "image_size": 160, "patch_size": 8}
    folder = tmp_path_factory.mktemp("tower")
    (folder / "config.json").write_text(json.dumps(tower))
    return [*TINY, "--init_from", "none", "--vision.tower", str(folder)]


@pytest.mark.slow
def test_a_deterministic_step_adds_nothing_up_in_the_order_of_threads(seeing):
    """Neither by an atomic operation in any kernel's machine code nor in cuDNN, whose kernels cannot be read here."""
    fixed, experts = ["--compute.deterministic", "true"], ["--model.num_experts", "4"]
    usual, *cases = [
        {"stage": "pretrain", "arguments": TINY},
        {"stage": "pretrain", "arguments": [*TINY, *fixed]},
        {"stage": "pretrain", "arguments": [*TINY, *fixed, *experts]},
        {"stage": "vlm-sft", "arguments": [*seeing, *fixed, "--vision.train", "tower"]},
    ]
    script = Path(__file__).with_name("gpu_step.py")
    usual, *found = run_compiler("cuda", script, json.dumps([usual, *cases]))
    assert usual["custom_calls"] == [MASKED, MASKED + "Backward"]
    assert not any("cudnn" in call for case in found for call in case["custom_calls"])
    if not usual["kernels"]:
        pytest.skip("this compiler writes no machine code (that of jax 0.12)")
    assert usual["atomics"]
    for case in found:
        assert case["kernels"] > 50 and not case["atomics"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "device", "train", "kernels"),
    [
        ("cuda", "h100", "projector", {CUDNN: 1, **WORDS}),
        ("cuda", "h100", "tower", {CUDNN: 2, CUDNN + "Backward": 1, **WORDS}),
        ("tpu", "tpu-v5e", "projector", {SPLASH: 1 + 3}),
        ("tpu", "tpu-v5e", "tower", {SPLASH: 2 + 2 + 3}),
    ],
)
def test_a_step_that_sees_has_the_kernels_of_its_words_and_of_its_tower(platform, device, train, kernels, seeing):
    """The words' have a mask of documents, the tower's none; one that is trained looks a second time for its gradient,
    and one that stays as it is has none."""
    arguments = ["--stage", "vlm-sft", "--device", device, "--tokens", "1e6", "--json", "--vision.train", train]
    told = run_compiler(platform, "-m", "minimind_jax", "plan", *seeing, *arguments)
    path = {"cuda": "cudnn", "tpu": "splash"}[platform]
    assert told["images"]["attention_path"] == told["step"]["attention_path"] == path
    assert {name: found["count"] for name, found in told["attention_kernels"].items()} == kernels
    assert all(found["runs"] >= found["count"] for found in told["attention_kernels"].values())
