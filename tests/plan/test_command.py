"""`minimind plan` where no compiler is installed, in its words and as JSON; and what it advises."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest

from minimind_jax.cli import main
from minimind_jax.config.sections import DataConfig, MeshConfig, ModelSettings, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.plan import devices
from minimind_jax.plan.compile import needed_memory
from minimind_jax.plan.estimate import advice, cost, estimate_memory, fit
from minimind_jax.private import private_module

TINY = "--model.hidden_size 64 --model.num_hidden_layers 2 --model.num_attention_heads 4 --model.vocab_size 512".split()


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(devices, "installed_compiler", lambda device: None)
    cudnn = private_module("jax._src.cudnn.fused_attention_stablehlo")  # asked in other tests of this process, too
    monkeypatch.setattr(cudnn, "check_compute_capability", cudnn.check_compute_capability)
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def plan(capsys, *arguments):
    status = main(["plan", *TINY, *arguments])
    return status, capsys.readouterr()


def test_without_the_compiler_the_extra_is_named_and_formulas_are_called_that(capsys):
    status, printed = plan(capsys, "--device", "tpu-v5e", "--tokens", "1e9", "--price", "2")
    assert status == 0
    assert "NOT INSTALLED: memory is estimated by formulas" in printed.out
    assert "python -m pip install 'jax[tpu]'" in printed.out
    assert "1,000,000,000 tokens" in printed.out and "price" in printed.out


def test_json_holds_what_is_printed(capsys):
    _, printed = plan(capsys, "--device", "tpu-v5e", "--tokens", "1e9", "--json", "--mfu", "0.5")
    told = json.loads(printed.out)
    assert told["compiler"]["name"] is None and told["compiler"]["install"].endswith("-m pip install 'jax[tpu]'")
    assert told["fit"]["fits"] and told["memory"]["total"] > told["state"]["parameters"] * 3
    hours = 1e9 * told["flops_per_token"] / (0.5 * 197e12) / 3600
    assert told["time"]["hours"] == pytest.approx(hours) and told["time"]["price"] is None


def test_adapters_need_less(capsys):
    def told(*arguments):
        return json.loads(plan(capsys, "--device", "h100", "--tokens", "1e9", "--json", *arguments)[1].out)

    whole, adapters = told(), told("--lora.rank", "8")
    assert adapters["model"]["parameters"] == whole["model"]["parameters"]
    assert adapters["model"]["adapters"]["q_proj"] == 8 and whole["model"]["adapters"] is None
    assert adapters["state"]["optimizer"] < whole["state"]["optimizer"] / 5
    assert adapters["memory"]["total"] < whole["memory"]["total"]
    assert adapters["flops_per_token"] < 0.8 * whole["flops_per_token"]


def test_a_stage_that_sees_is_planned_with_its_tower_known_by_name(capsys):
    tower = ["--stage", "vlm-pretrain", "--init_from", "none", "--vision.tower", "google/siglip2-base-patch32-256"]
    tower += ["--device", "tpu-v5e", "--tokens", "1e9", "--data.seq_len", "128"]

    def told(*arguments):
        return json.loads(plan(capsys, *tower, "--json", *arguments)[1].out)

    few, full, trained = told("--images", "1e6"), told(), told("--images", "1e6", "--vision.train", "tower")
    assert few["images"]["patches"] == few["images"]["tokens"] == 64 and few["images"]["in_a_row"] == 2
    assert few["images"]["attention_path"] == "reference" and "64 patches are few" in few["images"]["attention_reason"]
    words = json.loads(plan(capsys, "--device", "h100", "--tokens", "1e9", "--json")[1].out)["model"]["parameters"]
    projector = 768 * 64 + 64 + 64 * 64 + 64
    assert few["model"]["parameters"] == words + 87_465_216 + projector  # the tower as transformers counts it
    assert few["images"]["flops"] == pytest.approx(11.3e9, rel=0.01)  # of one picture of 64 patches through it
    assert trained["images"]["flops"] > 2.9 * few["images"]["flops"]
    assert few["flops_per_token"] < trained["flops_per_token"]  # the language model's own gradients
    kept = told("--images", "1e6", "--data.cache_features", "true")
    assert kept["images"]["attention_path"] == "none" and kept["images"]["flops"] < 0.1 * few["images"]["flops"]
    assert full["images"]["count"] == 1e9 / 64 and not full["images"]["is_known"]
    assert full["time"]["hours"] > few["time"]["hours"]
    hours = (1e9 * few["flops_per_token"] + 1e6 * few["images"]["flops"]) / (0.4 * 197e12) / 3600
    assert few["time"]["hours"] == pytest.approx(hours)
    assert few["state"]["optimizer"] < few["state"]["parameters"] / 100 < trained["state"]["optimizer"]
    said = plan(capsys, *tower, "--images", "1e6")[1].out
    assert "256 x 256 pixels, 64 patches, 64 tokens each, at most 2 a row; 1,000,000 in all" in said
    assert "the tower's reference (not splash: 64 patches are few)" in said and "images/s" in said


def test_what_no_plan_can_see_is_refused(capsys):
    for arguments, said in (
        (["--stage", "vlm-sft", "--init_from", "none"], "give --vision.tower a SigLIP folder"),
        (["--stage", "vlm-sft", "--vision.tower", "none/siglip"], "vision.tower 'none/siglip' is neither"),
        (["--stage", "sft", "--images", "5", "--tokens", "9"], "--images N is of stages that see"),
    ):
        status, printed = plan(capsys, "--device", "h100", *arguments)
        assert status == 2 and said in printed.err


@pytest.mark.parametrize(
    ("rows", "vocab", "tensor", "fsdp", "logits"),
    [
        (16, 151936, 1, 1, 2**29),  # two pieces of PIECE_BYTES, whatever the vocabulary
        (64, 151936, 1, 1, 2**29),
        (64, 151936, 1, 8, 2**29),
        (16, 6400, 1, 1, 2 * 4 * 16 * 1024 * 6400),  # whole
        (2, 151936, 4, 1, 2 * 4 * 2 * 1024 * 151936 // 4),  # whole on each of four
    ],
)
def test_logits_are_counted_in_the_pieces_that_the_loss_makes(rows, vocab, tensor, fsdp, logits):
    config = PretrainConfig(data=DataConfig(seq_len=1024), training=TrainingConfig(batch_tokens=rows * 1024 * fsdp))
    shape = dataclasses.replace(ModelSettings().resolve(), vocab_size=vocab)
    mesh = {"data": 1, "fsdp": fsdp, "tensor": tensor, "expert": 1}
    assert estimate_memory(config, shape, mesh, 0, 0).logits == pytest.approx(logits, rel=0.02)


def test_attention_is_that_of_the_device_planned_for_and_not_of_this_machine(capsys, monkeypatch):
    def told(device, path):
        return plan(capsys, "--device", device, "--tokens", "1e9", "--compute.attention", path)

    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    status, printed = told("h100", "cudnn_packed")
    assert status == 0 and "path cudnn_packed (room for 8 documents" in printed.out and "NOT INSTALLED" in printed.out
    status, printed = told("a100", "cudnn_packed")
    assert status == 2 and "compute capability 9.0 or more (Hopper)" in printed.err
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    status, printed = told("h100", "cudnn_packed")
    assert status == 2 and "install jax 0.11.2 or newer" in printed.err
    status, printed = told("h100", "splash")
    assert status == 2 and "this is a gpu" in printed.err


def test_mistakes_are_told(capsys):
    status, printed = plan(capsys, "--device", "h200")
    assert status == 2 and "did you mean h100" in printed.err
    status, printed = plan(capsys, "--device", "tpu-v5e", "--mesh.data", "3")
    assert status == 2 and "do not fit 1 devices" in printed.err
    status, printed = plan(capsys, "--device", "tpu-v5e", "--tokens", "-5")
    assert status == 2 and "tokens is -5; it must be at least 1" in printed.err
    status, printed = plan(capsys)
    assert status == 2 and "--device is missing: h100, a100" in printed.err


@pytest.mark.parametrize("rows", [24, 20])
def test_a_step_on_many_devices_has_the_parts_that_training_would_have(rows):
    """In a process of its own, for eight devices."""
    batch = ["--training.batch_tokens", str(rows * 512), "--training.accumulation_steps", "4", "--json"]
    command = [sys.executable, "-m", "minimind_jax", "plan", *TINY, "--device", "tpu-v5e", "--topology", "2x4", *batch]
    done = subprocess.run(command, capture_output=True, text=True)
    if rows == 20:
        assert done.returncode == 2 and "20 rows a step do not divide over 8 devices" in done.stderr
    else:
        assert json.loads(done.stdout)["step"]["accumulation_steps"] == 3


def test_what_does_not_fit_gets_advice_that_applies():
    shape = {"data": 8, "fsdp": 1, "tensor": 1, "expert": 1}
    config = PretrainConfig(training=TrainingConfig(batch_tokens=512 * 64), mesh=MeshConfig())
    unknown = advice(config, shape, memory=100, state=1, needed=None)
    assert unknown[0].startswith("--training.accumulation_steps 2:")
    assert any("--compute.remat full" in line for line in unknown)
    # 8 rows a device: 300 / 89 parts do not divide them, 4 do.
    assert advice(config, shape, memory=100, state=1, needed=301)[0].startswith("--training.accumulation_steps 4:")
    assert advice(config, shape, 100, state=1, needed=10_000)[0].startswith("--training.accumulation_steps 8:")
    assert advice(config, shape, 100, state=50, needed=None)[0].startswith("--mesh.data 1 --mesh.fsdp 8")


def test_a_gpu_that_is_nearly_full_needs_jaxs_share_raised():
    h100, v5e = devices.DEVICES["h100"], devices.DEVICES["tpu-v5e"]
    assert fit(h100, 10 * 2**30)[0] and "XLA_PYTHON" not in fit(h100, 10 * 2**30)[1]
    assert fit(h100, 70 * 2**30)[0] and "XLA_PYTHON_CLIENT_MEM_FRACTION" in fit(h100, 70 * 2**30)[1]
    assert not fit(h100, 79 * 2**30)[0]
    assert fit(v5e, 15 * 2**30)[0] and not fit(v5e, 16 * 2**30)[0]


def test_hours_and_price():
    assert cost(3600, 100.0, 1000.0, 2, 0.5, 3.0) == (0.1, 10.0, pytest.approx(0.6))


def test_what_the_tpu_compiler_says_a_program_needs():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (670.63G) exceeds"
    )
    assert needed_memory(f"{said} available HBM (15.75G).") == int(670.63 * 2**30)
    assert needed_memory("Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.") == int(21.95 * 2**30)
    assert needed_memory("RESOURCE_EXHAUSTED") is None
