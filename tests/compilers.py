"""Pythons that have the compiler of a GPU or TPU: this one, or those that two variables name."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = {
    "cuda": ("MINIMIND_CUDA_PYTHON", "cuda12", ("jax_cuda12_plugin", "jax_cuda13_plugin")),
    "tpu": ("MINIMIND_TPU_PYTHON", "tpu", ("libtpu",)),
}


def run_compiler(platform: str, *command: str | Path) -> object:
    """What a Python command prints, which is JSON, where there is the platform's compiler; else skips."""
    variable, extra, modules = COMPILERS[platform]
    python = os.environ.get(variable)
    if python is None and not any(map(importlib.util.find_spec, modules)):
        pytest.skip(f"no compiler for {platform}: pip install 'minimind-jax[{extra}]', or set ${variable}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}  # another may not know ours
    command = [python or sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
