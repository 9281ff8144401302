"""Compiles the training step of small models for an H100 that need not be there and prints what is in it, as JSON.

`python gpu_step.py CASES`, CASES being a JSON list of {stage, arguments} as `minimind plan` takes them. Of each: custom
calls, and the atomic operations in the machine code (PTX) of all kernels, with which threads add up as they come.
"""

import collections
import json
import re
import sys
import tempfile
from pathlib import Path

from minimind_jax.plan import compile as compiler

compiler.prepare_process()

from minimind_jax.model.transformer import LanguageModel  # noqa: E402
from minimind_jax.plan.devices import find_device, parse_topology  # noqa: E402
from minimind_jax.plan.inputs import load_planned  # noqa: E402
from minimind_jax.plan.module import read_module  # noqa: E402
from minimind_jax.sharding import make_mesh  # noqa: E402


def compiled(devices: list, stage: str, arguments: list[str]) -> dict:
    planned = load_planned(arguments, stage)
    model = LanguageModel(planned.architecture, planned.config.compute, platform="gpu")
    traced, _ = compiler.trace_step(planned.config, model, make_mesh(planned.config.mesh, devices))
    with tempfile.TemporaryDirectory() as folder:
        options = compiler.deviceless_options("cuda", planned.config.compute.deterministic)
        options |= {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = traced.lower().compile(compiler_options=options)
        code = [file.read_text() for file in Path(folder).glob("*.ptx")]
    atomics = collections.Counter(name for text in code for name in re.findall(r"\b(?:atom|red)\.[\w.:]+", text))
    return {"kernels": len(code), "atomics": atomics, "custom_calls": list(read_module(program.as_text()).custom_calls)}


def main(cases: str) -> None:
    device = find_device("h100")
    devices = compiler.compile_only_devices(device, parse_topology(device, "1"))
    print(json.dumps([compiled(devices, **case) for case in json.loads(cases)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
