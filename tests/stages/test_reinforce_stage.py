"""The stages that learn from reward: learning, resuming, and what they refuse."""

import dataclasses

import pytest
from run_helpers import KEEP_ALL, assert_resumes_exactly, rows_of
from worlds import ADAPTERS, write_lines

from minimind_jax.config.rl import CriticConfig, GRPOConfig, PolicyConfig, PPOConfig, RewardsConfig, RolloutConfig
from minimind_jax.errors import UserError
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder

SHORT = RewardsConfig(use=("length(1, 6)",))  # what the untrained model, which rarely ends, does not do


@pytest.fixture
def grpo(make, tmp_path):
    prompts = [{"prompt": f"the {n} cat", "answer": n} for n in range(24)]
    config = make(
        GRPOConfig,
        tmp_path / "grpo",
        write_lines(tmp_path / "prompts.jsonl", prompts),
        data={"seq_len": 64, "val_fraction": 0.25},
        training={"steps": 16, "eval_every": 8, "eval_rows": 4, "batch_tokens": None},
        rate=3e-2,
        rollout=RolloutConfig(prompts=4, completions=8, max_new_tokens=12),
        rewards=SHORT,
    )
    return config


def test_grpo_learns_what_is_rewarded(grpo):
    run = RunFolder(start(grpo))
    rows = rows_of(run.path)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 16
    first, last = (sum(row["reward"] for row in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last > first + 0.3
    assert steps[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert steps[0]["val/ratio"] == pytest.approx(1, abs=1e-6)
    judged = [row for row in rows if "val_reward" in row]
    assert judged[-1]["val_reward"] > judged[0]["val_reward"]
    assert {"val_success", "val_pass@4", "val_length"} <= judged[0].keys()
    assert (run.path / "rollouts" / "step_000008.md").is_file()
    assert "reward" in run.report_file.read_text("utf-8")


VARIANTS = {
    "several updates": {"policy": PolicyConfig(updates=2, minibatches=2, max_kl=1.0)},
    "reference": {"policy": PolicyConfig(beta=0.1, kl_target=0.5, kl_horizon=100.0)},
    "adapters": {"policy": PolicyConfig(beta=0.1), "lora": ADAPTERS},
    "refill": {"policy": PolicyConfig(refill=2)},
    "ahead": {"rollout": RolloutConfig(prompts=4, completions=8, max_new_tokens=12, ahead=1, correction="token")},
}


QUICK = ("ahead",)


@pytest.mark.parametrize(
    "changes",
    [pytest.param(own, marks=[] if name in QUICK else [pytest.mark.slow], id=name) for name, own in VARIANTS.items()],
)
def test_a_run_resumes_exactly(grpo, changes, tmp_path):
    assert_resumes_exactly(dataclasses.replace(grpo, checkpoint=KEEP_ALL, **changes), tmp_path)


@pytest.mark.slow
def test_ppo_resumes_exactly(grpo, tmp_path):
    policy = dataclasses.replace(PPOConfig().policy, minibatches=2, max_kl=0.5)
    own = {field.name: getattr(grpo, field.name) for field in dataclasses.fields(grpo)}
    ppo = PPOConfig(**{**own, "critic": CriticConfig(learning_rate=1e-2, warmup=2)})
    assert_resumes_exactly(dataclasses.replace(ppo, policy=policy, checkpoint=KEEP_ALL), tmp_path)


def test_settings_that_do_not_fit_are_refused(grpo):
    wrong = dataclasses.replace(grpo.rollout, ahead=1)
    with pytest.raises(UserError, match=r"rollout\.correction"):
        start(dataclasses.replace(grpo, rollout=wrong))
    with pytest.raises(ValueError, match="k2"):
        PolicyConfig(beta=0.1, kl_estimator="k1")
