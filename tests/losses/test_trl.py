"""Losses of pairs and divergences are TRL's, by its numbers in tests/fixtures and, where it is installed, by itself."""

import jax.numpy as jnp
import numpy as np
import pytest
import trl_oracle
from trl_oracle import BETA, CENTRING, FILE, GAMMA, LOSSES, SMOOTHING

from minimind_jax.losses.distillation import divergences
from minimind_jax.losses.preference import Answers, pair_losses
from minimind_jax.losses.reward import bradley_terry

SMOOTHED = ("robust", "simpo")  # TRL's other losses know no label smoothing


def ours(name, drawn):
    if name == "reward":
        return bradley_terry(*map(jnp.asarray, drawn["scores"]), drawn["margins"], CENTRING)
    policy, reference = (
        Answers(*map(jnp.asarray, (*drawn[side], *drawn["counts"]))) for side in ("policy", "reference")
    )
    smoothing = SMOOTHING if name in SMOOTHED else 0.0
    return pair_losses(name, policy, reference, beta=BETA, label_smoothing=smoothing, gamma=GAMMA)[0]


@pytest.mark.parametrize("name", [*LOSSES, "reward"])
def test_losses_are_those_of_the_fixture(name):
    with np.load(FILE) as stored:
        drawn = {key: stored[key] for key in ("counts", "policy", "reference", "scores", "margins")}
        np.testing.assert_allclose(ours(name, drawn), stored[f"loss_{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("seed", [1, 2])
def test_losses_are_those_of_trl(seed):
    pytest.importorskip("trl")
    drawn = trl_oracle.draw(seed)
    for name, theirs in trl_oracle.all_losses(drawn).items():
        np.testing.assert_allclose(ours(name, drawn), theirs, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.3)])
def test_divergences_are_those_of_trl(kind, beta):
    pytest.importorskip("trl")
    student, teacher = np.random.default_rng(0).standard_normal((2, 12, 30)).astype(np.float32) * 3
    theirs = trl_oracle.jsd(student, teacher, beta, 1.5)
    found = divergences(jnp.asarray(student), jnp.asarray(teacher), kind, 1.5, beta).mean()
    assert float(found) == pytest.approx(theirs, abs=1e-6)
