"""Compiles attention's gradient for a device that need not be there; run by `test_attention_compiled`.

`python compile_attention.py h100 8 CASES`, CASES being JSON, a list of {sizes, shape, packed, path}: mesh sizes, (B, T,
N, K, H), whether rows hold several documents, and a path, which is taken without asking whether it can run, or `auto`.
Prints for each the kernels in the compiled text and bytes of temporaries.
"""

import importlib.util
import json
import re
import sys

from minimind_jax.plan import compile as compiler

compiler.prepare_process()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from minimind_jax.config.sections import MeshConfig  # noqa: E402
from minimind_jax.model.attention import attention, choose_path  # noqa: E402
from minimind_jax.plan.devices import Device, find_device, parse_topology  # noqa: E402
from minimind_jax.sharding import ROW_AXES, make_mesh  # noqa: E402


def compiled(devices: list, device: Device, sizes: dict[str, int], shape: list[int], packed: bool, path: str):
    mesh = make_mesh(MeshConfig(**sizes), devices)
    B, T, N, K, H = shape
    if path == "auto":
        path = choose_path(path, (B, T, N, H), K, jnp.bfloat16, device.backend, mesh).path

    def total(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            ids_BT = segment_ids_BT if packed else None
            out_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=ids_BT, path=path, platform=device.backend)
        return jnp.sum(jnp.square(out_BTNH.astype(jnp.float32)))

    def argument(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(ROW_AXES, *axes)))

    widths = [N * H, K * H, K * H]  # as the projections leave them; heads that do not divide are cut in their middle
    arrays = [argument((B, T, width), jnp.bfloat16, None, "tensor") for width in widths]
    ids_BT = argument((B, T), jnp.int32)

    def from_projections(q, k, v, ids):
        return total(*(x.reshape(B, T, -1, H) for x in (q, k, v)), ids)

    options = {"xla_gpu_autotune_level": "0"} if device.platform == "cuda" else None
    lowered = jax.jit(jax.grad(from_projections, argnums=(0, 1, 2))).lower(*arrays, ids_BT)
    return lowered.compile(compiler_options=options)


def main(name: str, topology: str, cases: str) -> None:
    device = find_device(name)
    devices = compiler.compile_only_devices(device, parse_topology(device, topology))
    report = []
    for case in json.loads(cases):
        if case["path"] == "tokamax" and importlib.util.find_spec("tokamax") is None:
            report.append({"missing": sys.executable})
            continue
        program = compiled(devices, device, **case)
        targets = re.findall(r'custom_call_target="([^"]+)"', program.as_text())
        kernels = [target for target in targets if re.search("fmha|tpu_custom_call|mosaic_gpu", target)]
        report.append({"kernels": kernels, "temporaries": program.memory_analysis().temp_size_in_bytes})
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
