"""Eight devices answer as one does, about pictures too, with weights cut in three ways and others loaded in between."""

import json
import os
import subprocess
import sys

import jax
import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.config.sections import MeshConfig
from minimind_jax.data.images import Picture
from minimind_jax.inference import decode
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Request
from minimind_jax.model.config import ComputeConfig, ModelConfig, TowerConfig, Vision
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.sharding import init_params, make_mesh

CONFIG = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=160,
    max_position_embeddings=128, initializer_range=0.3, vision=Vision(TowerConfig(16, 24, 1, 2, 4, 2), marker_id=2),
)  # fmt: skip


def beside(engine, prompts, sampling, images):
    """Each is asked while the others run."""
    answers = []
    for prompt, own in zip(prompts, images, strict=True):
        answers.append(engine.submit(Request(tuple(prompt), sampling, images=own)))
        engine.step()
    while engine.busy:
        engine.step()
    return answers


def main() -> None:
    model, mesh = LanguageModel(CONFIG, ComputeConfig(dtype="float32")), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 160, length).tolist() for length in (1, 40, 7, 60, 22)]
    images = [(), (Picture(random.integers(0, 256, (4, 4, 3)).astype(np.uint8), b"a"),), (), (), ()]
    prompts[1][14:18] = [2] * 4
    sampling = SamplingConfig(max_new_tokens=10, temperature=0.9, top_k=20, seed=3)
    cut, one = [], []
    first, second = (init_params(model, jax.random.key(seed), mesh) for seed in (0, 1))
    engine, alone = Engine(model, first), Engine(model, jax.tree.map(np.asarray, first))
    for params in (first, second):
        engine.load(params)
        alone.load(jax.tree.map(np.asarray, params))
        cut += engine.generate(prompts, sampling, images)
        one += alone.generate(prompts, sampling, images)
    fixed = Engine(model, second, slots=8, context=128)
    fixed.warm_up()
    compiled = decode.read._cache_size()
    cut += beside(fixed, prompts, sampling, images)
    assert decode.read._cache_size() == compiled
    one += beside(alone, prompts, sampling, images)
    keys = engine._programs._cache.layers[0].k_CBKHs
    kernel = engine.params["layers"][0]["attention"]["q_proj"]["kernel"].kernel_OI
    report = {
        "ids": [[answer.ids for answer in answers] for answers in (cut, one)],
        "difference": max(
            float(np.abs(np.subtract(a.logprobs, b.logprobs)).max()) for a, b in zip(cut, one, strict=True)
        ),
        "cache": [keys.shape, keys.addressable_shards[0].data.shape],
        "kernel": [kernel.shape, kernel.addressable_shards[0].data.shape],
    }
    print(json.dumps(report))


def test_answers_over_a_mesh_are_those_of_one_device():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    cut, one = report["ids"]
    assert cut == one and report["difference"] < 1e-4
    whole, part = report["cache"]
    assert part == [whole[0], whole[1] // 4, whole[2] // 2, *whole[3:]]
    whole, part = report["kernel"]
    assert part == [whole[0] // 2, whole[1]]


if __name__ == "__main__":
    main()
