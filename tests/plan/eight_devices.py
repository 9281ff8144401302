"""Compiles the training step of a small model for eight devices and prints what it needs, as JSON: run by the tests.

`python eight_devices.py` takes eight emulated CPU devices, `python eight_devices.py tpu-v5e 2x4` the TPU's compiler.
"""

import json
import sys

from minimind_jax.plan import compile as compiler

compiler.prepare_process()

import jax  # noqa: E402

from minimind_jax.config.sections import DataConfig, MeshConfig, ModelSettings, TrainingConfig  # noqa: E402
from minimind_jax.config.stages import PretrainConfig  # noqa: E402
from minimind_jax.model.transformer import LanguageModel  # noqa: E402
from minimind_jax.plan.devices import find_device, parse_topology  # noqa: E402
from minimind_jax.plan.module import read_module  # noqa: E402
from minimind_jax.sharding import make_mesh  # noqa: E402
from minimind_jax.training.defaults import filled  # noqa: E402

MODEL = ModelSettings(
    vocab_size=1024, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128
)


def needs(mesh: MeshConfig, devices: list, device) -> dict:
    training = TrainingConfig(batch_tokens=16 * 128, accumulation_steps=2)
    config = filled(PretrainConfig(model=MODEL, mesh=mesh, data=DataConfig(seq_len=128), training=training))
    model = LanguageModel(MODEL.resolve(), platform=device.backend if device else "cpu")
    traced, state = compiler.trace_step(config, model, make_mesh(mesh, devices))
    step = compiler.compile_step(traced, device.platform if device else "cpu")
    module = read_module(step.text)
    return {
        "state": compiler.state_bytes(state),
        "memory": {**step.memory._asdict(), "total": step.memory.total},
        "batch": sum(x.size * 4 for x in jax.tree.leaves(compiler.abstract_batch(config))),
        "collectives": {kind: vars(found) for kind, found in module.collectives.items()},
        "kernels": list(module.custom_calls),
        "unknown_loops": module.unknown_loops,
    }


def main(arguments: list[str]) -> None:
    name, topology = arguments or ("tpu-v5e", "2x4")
    make = compiler.compile_only_devices if arguments else compiler.emulated_devices
    device = find_device(name)
    devices = make(device, parse_topology(device, topology))
    meshes = {"fsdp": MeshConfig(data=1, fsdp=8)} | ({} if arguments else {"data": MeshConfig(data=8)})
    print(json.dumps({name: needs(mesh, devices, device if arguments else None) for name, mesh in meshes.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
