"""The network against numbers made by MiniMind's own PyTorch code."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_tensors import params_from_hf
from safetensors.numpy import load_file

from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel

NAMES = ("dense", "dense_untied", "dense_headdim", "moe_k1_norm", "moe_k1_nonorm", "moe_k2")


def load(fixtures_dir, name):
    """Model, its parameters and the golden arrays."""
    settings = json.loads((fixtures_dir / f"{name}.json").read_text())
    if settings.pop("use_moe", False):
        settings.setdefault("num_experts_per_tok", 1)
    config = ModelConfig(**settings, router_gradient="none")
    params = params_from_hf(config, load_file(fixtures_dir / f"{name}.safetensors"))
    return LanguageModel(config), params, np.load(fixtures_dir / f"{name}.npz")


def losses_and_logits(model, params, tokens_BT, labels_BT):
    """Mean cross entropy over the shifted labels that are not -100, the router loss, and the logits."""
    logits_BTV, output = model.apply(params, tokens_BT)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    targets_BT = labels_BT[:, 1:]
    chosen_BT = jnp.take_along_axis(log_probs_BTV, jnp.maximum(targets_BT, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(targets_BT >= 0, chosen_BT, 0)) / jnp.sum(targets_BT >= 0), output.router_loss, logits_BTV


def assert_close(actual, expected, name):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual) / scale, expected / scale, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize(("name", "attention"), [*((name, "auto") for name in NAMES), ("dense_headdim", "reference")])
def test_logits_losses_and_gradients_are_minimind_s(fixtures_dir, name, attention):
    model, params, golden = load(fixtures_dir, name)
    model = dataclasses.replace(model, compute=ComputeConfig(attention=attention))
    tokens, labels = golden["input_ids"][0].astype(np.int32), golden["labels"][0].astype(np.int32)

    def total(params):
        loss, router_loss, logits = losses_and_logits(model, params, tokens, labels)
        return loss + router_loss, (loss, router_loss, logits)

    gradients, (loss, router_loss, logits) = jax.jit(jax.grad(total, has_aux=True))(params)
    assert_close(logits, golden["logits"], "logits")
    assert float(loss) == pytest.approx(float(golden["loss"]), rel=1e-5)
    assert float(router_loss) == pytest.approx(float(golden["aux_loss"]), rel=1e-5, abs=1e-9)
    expected = {key.removeprefix("grad/"): golden[key] for key in golden if key.startswith("grad/")}
    for path, value in jax.tree_util.tree_leaves_with_path(params_from_hf(model.config, expected)):
        actual = gradients
        for key in path:
            actual = actual[key.key]
        assert_close(actual, value, jax.tree_util.keystr(path))
