"""Compiles generation for devices that need not be there; run by `test_attention_compiled`.

`python compile_prefill.py h100 1 CASES`, CASES being a JSON list of {"sizes": of the mesh, empty for one device,
"length": of the prompts, "model": fields of a ModelConfig}. Prints the kernels found in the reading of prompts.
"""

import contextlib
import functools
import json
import re
import sys

from minimind_jax.plan import compile as compiler

compiler.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from minimind_jax.config.generation import SamplingConfig  # noqa: E402
from minimind_jax.config.sections import MeshConfig  # noqa: E402
from minimind_jax.inference.decode import Settings, make, read  # noqa: E402
from minimind_jax.inference.engine import unfused  # noqa: E402
from minimind_jax.inference.sampling import Counts, SamplingValues  # noqa: E402
from minimind_jax.model.config import ComputeConfig, ModelConfig, Platform  # noqa: E402
from minimind_jax.model.transformer import LanguageModel  # noqa: E402
from minimind_jax.plan.devices import find_device, parse_topology  # noqa: E402
from minimind_jax.sharding import make_mesh, param_shardings  # noqa: E402

ROWS, LAYERS = 2, 2


def layer_of(mesh: Mesh, stacked: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer's parameter, as `LanguageModel.unstack` makes it."""
    place = NamedSharding(mesh, PartitionSpec(*stacked.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stacked.shape[1:], stacked.dtype, sharding=place)


def compile_case(platform: Platform, devices: list, sizes: dict, length: int, model: dict) -> list[str]:
    """The kernels in the program that reads ROWS prompts; where there is a mesh, the next step is compiled as well."""
    model = LanguageModel(
        ModelConfig(num_hidden_layers=LAYERS, **model), ComputeConfig(dtype="bfloat16"), None, platform
    )
    mesh = make_mesh(MeshConfig(**sizes), devices)
    whole = NamedSharding(mesh, PartitionSpec())

    def argument(leaf, sharding=whole):
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding)

    params = model.abstract_params()
    params = jax.tree.map(argument, params, param_shardings(mesh, model.logical_axes(), params))
    model = unfused(model, params)
    params["layers"] = tuple(jax.tree.map(functools.partial(layer_of, mesh), params["layers"]) for _ in range(LAYERS))
    values = SamplingValues.of([SamplingConfig(temperature=0.0)] * ROWS)
    settings = jax.tree.map(argument, Settings(jnp.arange(ROWS), values, jnp.full((ROWS, 1), 2), jnp.full(ROWS, -1)))
    tokens, row = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole) for shape in ((ROWS, length), (ROWS,)))
    cache = jax.tree.map(argument, jax.eval_shape(lambda: model.new_cache(ROWS, length + 128)))
    with jax.set_mesh(mesh) if sizes else contextlib.nullcontext():
        reading = read.lower(model, params, cache, tokens, settings, row, row, row, from_start=True).compile()
        if sizes:
            counts = jax.eval_shape(lambda: Counts.none(ROWS, model.config.vocab_size))
            counts = jax.tree.map(argument, counts)
            work = row, row, settings, counts, row, np.int32(8), np.int32(1)
            making = make.lower(model, params, cache, *work, most=8).compile()
            for program in (reading, making):  # what the host reads must be whole on each process's devices
                *outputs, _ = program.output_shardings
                assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(outputs))
    targets = re.findall(r'custom_call_target="([^"]+)"', reading.as_text())
    return sorted({target for target in targets if "fmha" in target or target == "tpu_custom_call"})


def main(name: str, topology: str, cases: str) -> None:
    device = find_device(name)
    devices = compiler.compile_only_devices(device, parse_topology(device, topology))
    print(json.dumps([compile_case(device.backend, devices, **case) for case in json.loads(cases)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
