"""What only a GPU can show: its kernels against the plain formulas, and its precision.

`pytest tests/training/test_gpu.py` on a machine with one; skipped elsewhere, where the same program is compiled for
one instead (`tests/model/test_attention_compiled.py`, `tests/plan`). On an H100 (jax 0.11.2) eight passed and none had
failed when time ended, with an earlier form of the experts; which eight was not printed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import KEEP_ALL, assert_resumes_exactly, last

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.errors import UserError
from minimind_jax.inference.engine import Engine
from minimind_jax.model import moe
from minimind_jax.model.attention import FUSED, attention, choose_path
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.stages import start

MOE = {"num_experts": 4, "num_experts_per_tok": 1}


@pytest.fixture(autouse=True)
def gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU: JAX runs on a " + jax.default_backend())


def relative(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected, in float64."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def documents(key, T, often):
    """Segment ids of two rows, the second with padding behind its documents."""
    ids_BT = jnp.cumsum(jax.random.uniform(key, (2, T)) < often / T, axis=1) + 1
    return ids_BT.at[1, -T // 5 :].set(0)


@pytest.mark.parametrize("often", [0, 6, 60])
@pytest.mark.parametrize("path", [path for path, platform in FUSED.items() if platform == "gpu"])
@pytest.mark.parametrize(("T", "N", "K", "H"), [(2048, 8, 4, 96), (341, 8, 2, 64), (512, 16, 8, 128)])
def test_flash_attention_is_the_formula_in_value_and_gradient(T, N, K, H, path, often):
    """often: documents of a row, about; 0 for rows that are none. There is room for 8 or 16."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, (2, T, heads, H), jnp.bfloat16) for key, heads in zip(keys[:3], (N, K, K), strict=True)
    )
    segment_ids_BT = documents(keys[3], T, often) if often else None
    weights_BTNH = jax.random.normal(keys[4], q.shape)
    assert choose_path("auto", q.shape, K, q.dtype, "gpu").path == "cudnn"
    try:
        choose_path(path, q.shape, K, q.dtype, "gpu")
    except UserError as error:
        pytest.skip(str(error))

    def total(path, *inputs):
        out_BTNH = attention(*inputs, segment_ids_BT=segment_ids_BT, path=path, platform="gpu")
        out_BTNH = out_BTNH if segment_ids_BT is None else out_BTNH * (segment_ids_BT > 0)[:, :, None, None]
        return jnp.sum(out_BTNH * weights_BTNH), out_BTNH

    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    actual = gradient(path, q, k, v)
    with jax.default_matmul_precision("highest"):
        expected = gradient("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 0.01  # bfloat16 has 8 bits: 0.002 to 0.004 an operation


@pytest.mark.parametrize(("tokens", "k"), [(4096, 1), (1000, 2)])
def test_experts_are_the_formula_in_value_and_gradient(tokens, k):
    config = ModelConfig(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1, **{**MOE, "num_experts_per_tok": k}
    )
    keys = jax.random.split(jax.random.key(0), 5)
    x_MD, logits_ME = jax.random.normal(keys[0], (tokens, 256)), jax.random.normal(keys[1], (tokens, 4))
    shapes = [(4, 256, 512), (4, 256, 512), (4, 512, 256)]
    kernels = tuple(jax.random.normal(key, shape) / 16 for key, shape in zip(keys[2:], shapes, strict=True))
    assert moe.choose_path("auto", tokens, "gpu") == "tiled"

    def total(path, x_MD, logits_ME, kernels):
        out_MD = moe.apply_experts(x_MD, moe.route(config, logits_ME, jnp.ones(tokens)), kernels, path)
        return jnp.sum(jnp.sin(out_MD)), out_MD

    gradient = jax.jit(jax.grad(total, argnums=(1, 2, 3), has_aux=True), static_argnums=0)
    with jax.default_matmul_precision("highest"):
        actual, expected = (gradient(path, x_MD, logits_ME, kernels) for path in ("tiled", "reference"))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("shape", [{}, MOE], ids=["dense", "moe"])
def test_cached_generation_is_the_network_on_whole_rows(shape):
    config = ModelConfig(vocab_size=512, hidden_size=256, num_hidden_layers=3, initializer_range=0.05, **shape)
    model = LanguageModel(config, ComputeConfig(dtype="float32"))
    params = jax.jit(model.init)(jax.random.key(0))
    apply = jax.jit(lambda params, tokens_BT: model.apply(params, tokens_BT)[0])
    prompts = [[5, 9, 400, 17, 3], list(range(20, 60)), [11]]
    sampling = SamplingConfig(max_new_tokens=80, temperature=0.0, ignore_eos=True)
    with jax.default_matmul_precision("highest"):
        for prompt, answer in zip(prompts, Engine(model, params).generate(prompts, sampling), strict=True):
            row = np.array([prompt + answer.ids])
            log_probs = jax.nn.log_softmax(apply(params, row[:, :-1])[0, len(prompt) - 1 :])
            chosen = np.take_along_axis(np.asarray(log_probs), np.array(answer.ids)[:, None], axis=1)[:, 0]
            np.testing.assert_allclose(answer.logprobs, chosen, atol=2e-5)
            assert np.all(log_probs.max(axis=1) - chosen < 2e-5)


@pytest.mark.parametrize("shape", [{}, MOE], ids=["dense", "moe"])
def test_bfloat16_learns_as_float32_does(world, tmp_path, shape):
    losses = {}
    for dtype in ("bfloat16", "float32"):
        config = world.pretrain(tmp_path / dtype, compute=ComputeConfig(dtype=dtype), training={"steps": 40})
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape))
        losses[dtype] = last(start(config), "val_loss")
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


@pytest.mark.parametrize("shape", [{}, MOE], ids=["dense", "moe"])
def test_a_deterministic_run_resumes_to_the_bit(world, tmp_path, shape):
    compute = ComputeConfig(dtype="bfloat16", deterministic=True)
    config = world.pretrain(tmp_path / "whole", compute=compute, checkpoint=KEEP_ALL)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **shape))
    assert_resumes_exactly(config, tmp_path)
