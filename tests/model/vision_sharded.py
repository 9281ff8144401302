"""Run by test_vision in a process of its own, as the devices must be asked for before JAX starts: a step's loss and
gradients of every parameter, the tower's too, on eight emulated devices and on one. Prints the largest difference of
each array as a part of its largest value. Those of the tower's largest gradient in place of their own are the two that
are 0 but for rounding: of a key's bias, which no softmax sees, and of the norm that LLaVA's projector does not read."""

import json
import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from minimind_jax.config.sections import MeshConfig
from minimind_jax.model import vision
from minimind_jax.model.config import ComputeConfig, ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.sharding import make_mesh, param_shardings, shard_batch

ROWS, T, IMAGES, MARKER = 8, 24, 3, 5


def main():
    vision.IMAGES_AT_ONCE = 2  # so that a device has several blocks
    sees = Vision(TowerConfig(16, 24, 2, 2, 12, 6), MARKER)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig(vocab_size=64, intermediate_size=48, initializer_range=0.2, vision=sees, **sizes)
    model = LanguageModel(config, ComputeConfig(dtype="float32"))
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 64, (ROWS, T)).astype(np.int32)
    for row, count in enumerate(rng.integers(0, IMAGES + 1, ROWS)):
        tokens[row, 1 : 1 + count * sees.image_tokens] = MARKER
    pixels = rng.integers(0, 256, (ROWS, IMAGES, 12, 12, 3)).astype(np.uint8)
    batch = {"tokens": tokens, "lengths": np.full(ROWS, T, np.int32), "pixels": pixels}
    weights = jnp.asarray(rng.uniform(size=(ROWS, T, 32)), jnp.float32)

    def loss(params, batch):
        return jnp.sum(model.read_batch(params, batch).hidden_BTD ** 2 * weights)

    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    tower = float(jnp.abs(expected[1]["vision"]["tower"]["layers"]["fc1"]["kernel"]).max())
    found = {}

    def scale(path, gradient):
        is_rounding = "post_norm" in str(path) or (
            "'tower'" in str(path) and "'k_proj'" in str(path) and gradient.ndim == 2
        )
        return tower if is_rounding else float(jnp.abs(gradient).max())

    for name, sizes in {"data 8": {"data": 8}, "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2}}.items():
        mesh = make_mesh(MeshConfig(**sizes))
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(mesh, model.logical_axes(), model.abstract_params()))
            ours = jax.jit(jax.value_and_grad(loss))(placed, shard_batch(batch, mesh))
        pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True)
        found[name] = {
            jax.tree_util.keystr(path): float(np.abs(np.asarray(a) - b).max() / scale(path, b))
            for (path, a), b in pairs
        }
    print(json.dumps({"differences": found, "tower": tower}))


if __name__ == "__main__":
    main()
