"""Settings of the algorithm that cannot go together are refused, and each refusal says what to do."""

import re

import pytest
import yaml

from minimind_jax.config.rl import GRPOConfig, PolicyConfig, PPOConfig
from minimind_jax.runs.effect import check_effect
from tests.conftest import ROOT

WRONG = {
    "the loss cispo needs the highest ratio": {"loss": "cispo"},
    "of the loss clip, not of cispo": {"loss": "cispo", "cap": 5.0, "dual_clip": 3.0},
    "the loss sapo has none": {"loss": "sapo", "level": "sequence"},
    "or above 1 such as 3": {"dual_clip": 0.5},
    "it is above that, such as 4": {"cap": 1.2, "epsilon_high": 0.28},
    "set policy.kl_estimator k1": {"beta": 0.1, "kl_placement": "reward"},
    "has no gradient as a loss": {"beta": 0.1, "kl_estimator": "k1"},
    "the weight to begin with": {"kl_target": 6.0},
    "gae is not; take batch or none": {"advantage": "gae"},
    "batch is not; take batch or none": {"advantage": "batch"},
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_cannot_go_together_are_refused(message):
    with pytest.raises(ValueError, match=message):
        PolicyConfig(**WRONG[message])


def test_those_of_the_papers_are_taken():
    PolicyConfig(cap=4.0, dual_clip=3.0)
    PolicyConfig(loss="cispo", cap=5.0, level="sequence")
    PolicyConfig(loss="sapo", beta=0.1, kl_estimator="k3")
    PolicyConfig(advantage="gae", scale="none", beta=0.1, kl_placement="reward", kl_estimator="k1", kl_target=6.0)


ALGORITHMS = re.findall(r"^\| [A-Z].*`\{.*", (ROOT / "docs/rl.md").read_text("utf-8"), re.MULTILINE)


@pytest.mark.parametrize("line", ALGORITHMS)
def test_each_setting_of_the_algorithms_in_the_docs_has_an_effect(line, capsys):
    kind = PPOConfig if "gae" in line else GRPOConfig
    for settings in re.findall(r"`(\{.*?\})`", line):
        check_effect(kind(policy=PolicyConfig(**yaml.safe_load(settings))))
    assert "without effect" not in capsys.readouterr().out
