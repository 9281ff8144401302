"""The training step compiled for eight devices: what FSDP leaves on each, and the collectives in the program's text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import ROOT, run_compiler

SCRIPT = Path(__file__).with_name("eight_devices.py")


@pytest.fixture(scope="module")
def emulated() -> dict:
    done = subprocess.run([sys.executable, SCRIPT], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1])


def held(needs: dict) -> float:
    """Bytes of a device's state that the compiler counts, over those of the whole state; the rest is the batch."""
    return (needs["memory"]["arguments"] - needs["batch"] / 8) / needs["state"][2]


@pytest.mark.slow
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


@pytest.mark.slow
def test_fsdp_with_the_tpu_compiler():
    needs = run_compiler("tpu", SCRIPT, "tpu-v5e", "2x4")["fsdp"]
    # Small arrays are padded to the registers' 8 x 128.
    assert held(needs) <= 1.2 / 8
    assert "all-gather" in needs["collectives"] and not needs["unknown_loops"]
    assert "tpu_custom_call" in needs["kernels"], "splash attention is not in the program"


def test_the_gpu_compiler_puts_cudnn_attention_into_the_step():
    needs = run_compiler("cuda", SCRIPT, "h100", "8")["fsdp"]
    assert held(needs) <= 1.2 / 8
    assert any(name.startswith("__cudnn$fmha") for name in needs["kernels"]), "no cuDNN attention in the program"
