"""Gradients of GRPO, CISPO and PPO are those that MiniMind's own scripts made of the same rollout, in float64."""

import json

import jax
import numpy as np
import pytest
from hf_tensors import params_from_hf
from minimind_oracle import COMPLETION_LEN, COMPLETIONS, EOS, FILE, PROMPT_LEN, PROMPTS, RATE
from safetensors.numpy import load_file

from minimind_jax.losses.policy import make_policy_loss
from minimind_jax.losses.value import values
from minimind_jax.model.config import ComputeConfig, ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.rl.advantages import gae, group_advantages, reduction_weights, whiten

pytestmark = pytest.mark.usefixtures("in_float64")

COLUMNS = PROMPT_LEN + COMPLETION_LEN
PLACES = {  # where our parameters keep those of KEPT
    "model.layers.0.input_layernorm.weight": lambda p: p["layers"]["input_norm"]["scale"][0],
    "model.layers.0.self_attn.k_proj.weight": lambda p: p["layers"]["attention"]["k_proj"]["kernel"][0].T,
    "model.layers.1.mlp.down_proj.weight": lambda p: p["layers"]["mlp"]["down_proj"]["kernel"][1].T,
    "model.norm.weight": lambda p: p["norm"]["scale"],
    "value_head.weight": lambda p: p["score"]["kernel"].T,
}


@pytest.fixture(scope="module")
def stored():
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture
def dense(fixtures_dir):
    config = ModelConfig(**json.loads((fixtures_dir / "dense.json").read_text()))
    params = params_from_hf(config, load_file(fixtures_dir / "dense.safetensors"))
    params = jax.tree.map(np.float64, params)
    compute = ComputeConfig(scan_unroll=1)
    object.__setattr__(compute, "dtype", "float64")  # which is no setting
    return LanguageModel(config, compute), params


def make_batch(stored, name):
    """The rollout in our rows: no padding on the left, and nothing behind the first end."""
    prompts = stored["prompts"].repeat(COMPLETIONS, 0) if len(stored["prompts"]) == PROMPTS else stored["prompts"]
    tokens = np.zeros((len(prompts), COLUMNS), np.int32)
    arrays = {name: np.zeros(tokens.shape) for name in ("mask", "old_log_probs", "reference_log_probs")}
    lengths, lasts = np.zeros((2, len(prompts)), np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, stored["completions"], strict=True)):
        prompt = prompt[prompt != 0]
        ends = np.flatnonzero(completion == EOS)
        written = completion[: ends[0] + 1] if len(ends) else completion
        own = np.s_[len(prompt) - 1 : len(prompt) - 1 + len(written)]
        lengths[row], lasts[row] = len(prompt) + len(written), own.stop - 1
        tokens[row, : lengths[row]] = [*prompt, *written]
        arrays["mask"][row, own] = 1
        for key, mine in (("old", "old_log_probs"), ("reference", "reference_log_probs")):
            arrays[mine][row, own] = stored[f"{name}: {key}"][row, : len(written)]
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    batch = {"tokens": tokens, "targets": targets, "lengths": lengths, **arrays}
    return {**batch, "sampler_log_probs": arrays["old_log_probs"]}, lasts


def gradients_of(loss_fn):
    def loss(params, batch):
        numerator, denominator, metrics = loss_fn(params, batch, None)
        return numerator / denominator, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def assert_gradients(gradients, stored, prefix):
    found = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    assert found
    for name, expected in found.items():
        largest = max(1, np.abs(expected).max())
        np.testing.assert_allclose(PLACES[name](gradients), expected, rtol=0, atol=1e-7 * largest, err_msg=name)


@pytest.mark.parametrize("name", ["grpo", "cispo"])
def test_gradients_of_groups_are_minimind_s(dense, stored, name):
    model, params = dense
    batch, _ = make_batch(stored, name)
    mask = batch["mask"]
    groups = np.arange(PROMPTS).repeat(COMPLETIONS)
    advantages = group_advantages(stored[f"{name}: rewards"], groups, kind="group", scale="group", ddof=0)
    weights = reduction_weights(mask, np.ones(len(mask)), "sequence", COMPLETION_LEN)
    batch |= {"advantages": advantages[:, None] * mask, "weights": weights, "kl_weights": 0.1 * weights}
    options = {"loss": "cispo", "cap": 5.0} if name == "cispo" else {}
    (loss, _), gradients = gradients_of(make_policy_loss(model, kl_estimator="k3", **options))(params, batch)
    assert float(loss) == pytest.approx(float(stored[f"{name}: logged policy_loss"]), abs=1e-7)
    assert_gradients(gradients, stored, f"{name}: policy 0 ")


def test_two_updates_of_ppo_are_minimind_s(dense, stored):
    model, params = dense
    head = {"score": {"kernel": stored["value_head"][:, None]}}
    params = {**params, "critic": {**params, **head}}
    batch, lasts = make_batch(stored, "ppo")
    mask, rows = batch["mask"], np.arange(len(lasts))
    rewards = np.zeros(mask.shape)
    rewards[rows, lasts] = stored["ppo: rewards"]
    old_values = np.asarray(jax.jit(lambda p, b: values(model, p, b)[0])(params["critic"], batch))
    advantages, returns = gae(rewards, old_values, mask, gamma=1.0, gae_lambda=0.95)
    weights = reduction_weights(mask, np.ones(len(mask)), "token", COMPLETION_LEN)
    batch |= {
        "advantages": whiten(advantages, mask, ddof=0), "weights": weights, "kl_weights": 0.02 * weights,
        "value_weights": 0.5 * weights, "returns": returns, "old_values": old_values,
    }  # fmt: skip
    both, logged = gradients_of(make_policy_loss(model, kl_estimator="k3", critic=model)), []
    for update in range(2):
        (_, metrics), gradients = both(params, batch)
        assert_gradients(gradients, stored, f"ppo: policy {update} ")
        assert_gradients(gradients["critic"], stored, f"ppo: critic {update} ")
        params = jax.tree.map(lambda value, gradient: value - RATE * gradient, params, gradients)
        logged.append({name: float(metric.value()) for name, metric in metrics.items()})
    for theirs, ours in (("kl_ref", "kl"), ("approx_kl", "approx_kl"), ("critic_loss", "loss/value_avg")):
        expected = float(stored[f"ppo: logged {theirs}"])  # a mean over the updates
        assert np.mean([one[ours] for one in logged]) == pytest.approx(expected, rel=1e-7), theirs
