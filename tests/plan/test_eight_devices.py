"""The training step compiled for eight devices: what FSDP leaves on each, and the collectives in the program's text."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("eight_devices.py")
ROOT = SCRIPT.parent.parent.parent


def compiled(python: str, *arguments: str) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def emulated() -> dict:
    return compiled(sys.executable)


def held(needs: dict) -> float:
    """Bytes of a device's state that the compiler counts, over those of the whole state; the rest is the batch."""
    return (needs["memory"]["arguments"] - needs["batch"] / 8) / needs["state"][2]


def test_fsdp_on_eight_devices_holds_an_eighth_of_the_state_on_each(emulated):
    needs = emulated["fsdp"]
    assert held(needs) <= 1.2 / 8
    assert sum(needs["state"][:2]) <= 1.2 / 8 * needs["state"][2]
    assert held(emulated["data"]) == pytest.approx(1)


def test_donated_state_counts_once(emulated):
    memory = emulated["data"]["memory"]
    parts = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] + memory["code"]
    assert memory["total"] == parts
    assert memory["aliased"] >= sum(emulated["data"]["state"][:2])


def test_gradients_are_summed_over_the_devices_and_parameters_gathered_with_fsdp_only(emulated):
    data, fsdp = emulated["data"]["collectives"], emulated["fsdp"]["collectives"]
    params = emulated["data"]["state"][0]
    assert "all-gather" not in data and fsdp["all-gather"]["bytes"] > 0
    summed = sum(found["bytes"] for kind, found in data.items() if kind in ("all-reduce", "reduce-scatter"))
    # float32 gradients of each of two micro-batches, and scalars.
    assert params <= summed <= 3 * params
    assert not emulated["data"]["unknown_loops"] and not emulated["fsdp"]["unknown_loops"]


def test_fsdp_with_the_tpu_compiler():
    python = os.environ.get("MINIMIND_TPU_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu, or name a Python that has it in MINIMIND_TPU_PYTHON")
    needs = compiled(python, "tpu-v5e", "2x4")["fsdp"]
    # Small arrays are padded to the registers' 8 x 128.
    assert held(needs) <= 1.2 / 8
    assert "all-gather" in needs["collectives"] and not needs["unknown_loops"]
    assert "tpu_custom_call" in needs["kernels"], "splash attention is not in the program"


def test_the_gpu_compiler_puts_cudnn_attention_into_the_step():
    python = os.environ.get("MINIMIND_CUDA_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip(
            "the CUDA plugin is not installed: pip install 'jax[cuda12]', or name a Python that has it in "
            "MINIMIND_CUDA_PYTHON"
        )
    needs = compiled(python, "h100", "8")["fsdp"]
    assert held(needs) <= 1.2 / 8
    assert any(name.startswith("__cudnn$fmha") for name in needs["kernels"]), "no cuDNN attention in the program"
