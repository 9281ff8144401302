"""Losses of policies are TRL's, by its numbers in tests/fixtures and, where it is installed, by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_oracle
import pytest
from policy_oracle import CASES, FILE, GIVEN, MAX_NEW_TOKENS, REDUCTIONS

from minimind_jax.losses.policy import policy_sum
from minimind_jax.rl.advantages import reduction_weights

RENAMED = {"policy_loss": "loss/policy_avg"}
NOT_OURS = ("entropy_coef",)


def ours(name, drawn):
    """As `policy_oracle.trl_loss`, of rows that stand for a whole step."""
    options, mask = CASES[name], drawn["mask"]
    reduction = REDUCTIONS.get(name.split()[0], "token")
    weights = reduction_weights(mask, np.ones(len(mask)), reduction, MAX_NEW_TOKENS)
    batch = {
        "mask": mask, "weights": weights, "advantages": np.broadcast_to(drawn["advantages"][:, None], mask.shape),
        "sampler_log_probs": drawn["sampler"], "old_log_probs": drawn["old"],
    }  # fmt: skip
    if name == "dapo on policy":
        del batch["old_log_probs"]
    if "beta" in options[0]:
        batch |= {"reference_log_probs": drawn["reference"], "kl_weights": options[0]["beta"] * weights}
    batch = {key: jnp.float32(value) for key, value in batch.items()}

    def loss(log_probs, entropies):
        total, metrics = policy_sum(log_probs, entropies, batch, **options[1])
        return total / len(mask), metrics

    given = jnp.float32(drawn["log_probs"]), jnp.float32(drawn["entropies"])
    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given)
    found = {"loss": value, "gradient": gradients[0], "entropy_gradient": gradients[1]}
    return {**found, **{f"metric {key}": metric.value() for key, metric in metrics.items()}}


def assert_same(name, drawn, theirs):
    found = ours(name, drawn)
    for what, expected in theirs.items():
        kind, _, metric = what.partition(" ")
        if metric in NOT_OURS or ("sequence" in name.split() and "clip_ratio" in metric):
            continue  # there TRL counts episodes, and ours tokens
        value = found[f"{kind} {RENAMED.get(metric, metric)}".strip()]
        largest = np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6 * largest, err_msg=f"{name}: {what}")


@functools.cache
def fixture():
    with np.load(FILE) as stored:
        return dict(stored)


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_metrics_are_those_of_the_fixture(name):
    stored = fixture()
    theirs = {key.partition(": ")[2]: value for key, value in stored.items() if key.startswith(f"{name}: ")}
    assert {"loss", "gradient"} <= theirs.keys()
    assert_same(name, {key: stored[key] for key in GIVEN}, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [1, 2])
def test_losses_gradients_and_metrics_are_those_of_trl(seed):
    pytest.importorskip("trl")
    drawn = policy_oracle.draw(seed)
    for name in CASES:
        assert_same(name, drawn, policy_oracle.trl_loss(name, drawn))
