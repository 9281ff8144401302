"""Compiles the reading of prompts for a device that need not be there; run by `test_attention_compiled`.

`python compile_prefill.py h100 LENGTHS`, LENGTHS being JSON. Prints the attention kernels found for each length.
"""

import json
import re
import sys

from minimind_jax.plan import compile as compiler

compiler.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from minimind_jax.inference.config import SamplingConfig  # noqa: E402
from minimind_jax.inference.decode import Controls, prefill  # noqa: E402
from minimind_jax.inference.sampling import SamplingValues, row_keys  # noqa: E402
from minimind_jax.model.config import ComputeConfig, ModelConfig  # noqa: E402
from minimind_jax.model.transformer import LanguageModel  # noqa: E402
from minimind_jax.plan.devices import find_device, parse_topology  # noqa: E402


def main(name: str, lengths: str) -> None:
    device = find_device(name)
    [place] = compiler.compile_only_devices(device, parse_topology(device, "1x1" if device.platform == "tpu" else "1"))
    sharding, rows = SingleDeviceSharding(place), 2
    model = LanguageModel(ModelConfig(num_hidden_layers=2), ComputeConfig(dtype="bfloat16"))

    def argument(leaf):
        return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype, sharding=sharding)

    params = jax.tree.map(argument, model.abstract_params())
    sampling = SamplingConfig(temperature=0.0)
    controls = Controls(SamplingValues.of(sampling, rows), row_keys(0, rows), jnp.array([2]))
    found = []
    for length in json.loads(lengths):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for shape in ((rows, length), (rows,))]
        with compiler.on_platform(device.platform):
            lowered = prefill.lower(
                model, params, *arrays, jax.tree.map(argument, controls), slots=length + 128, cache_dtype="bfloat16"
            )
        text = lowered.compile().as_text()
        targets = re.findall(r'custom_call_target="([^"]+)"', text)
        found.append(sorted({target for target in targets if "fmha" in target or target == "tpu_custom_call"}))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
