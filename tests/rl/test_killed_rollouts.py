"""Runs that learn from reward, killed in the rollout, in the reward, in the update and in the save, end as those that
were not: bit for bit. Asked to stop, they do so within seconds."""

import dataclasses
import os
import random
import signal
import time
from pathlib import Path

import killed_world
import psutil
import pytest
from kills import check_same, finish, wait_for_step
from worlds import write_lines

from minimind_jax.config.rl import (
    AgentConfig,
    AgentSettings,
    CriticConfig,
    GRPOConfig,
    PolicyConfig,
    PPOConfig,
    RewardsConfig,
    RolloutConfig,
)
from minimind_jax.config.sections import CheckpointConfig
from minimind_jax.training.run import RunFolder

HERE = Path(killed_world.__file__)
PLACES = ("rollout", "reward", "update", "save")
CONFIGS = {
    "grpo": (
        GRPOConfig,
        {"policy": PolicyConfig(updates=2, minibatches=2, refill=1, beta=0.1, kl_target=0.3, kl_horizon=100.0)},
    ),
    "ppo": (
        PPOConfig,
        {
            "policy": dataclasses.replace(PPOConfig().policy, minibatches=2, max_kl=0.5),
            "critic": CriticConfig(learning_rate=1e-2, warmup=2),
        },
    ),
    "agent": (
        AgentConfig,
        {
            "agent": AgentSettings(environment=f"{HERE}:Calculates", turns=2, observation_tokens=32),
            "policy": PolicyConfig(minibatches=2, updates=2),
        },
    ),
}


@pytest.fixture
def config_of(make, base, tmp_path, monkeypatch):
    monkeypatch.setenv(killed_world.MARK, str(tmp_path / "mark"))
    monkeypatch.setenv(killed_world.TOKENIZER, f"{base}/model")
    prompts = [{"prompt": f"the {n} cat", "answer": n} for n in range(24)]
    file = write_lines(tmp_path / "prompts.jsonl", prompts)

    def config_of(stage, run, rollouts, **changes):
        kind, own = CONFIGS[stage]
        rollout = RolloutConfig(prompts=4, completions=4, max_new_tokens=12)
        settings = {"rollout": rollout, "rewards": RewardsConfig(use=(f"{HERE}:short",)), **own, **changes}
        return make(
            kind, tmp_path / run, file, rate=3e-2, checkpoint=CheckpointConfig(every=1, keep=2),
            data={"seq_len": 96, "val_fraction": 0.25},
            training={"steps": 4 * rollouts, "eval_every": 12, "eval_rows": 2, "batch_tokens": None}, **settings,
        )  # fmt: skip

    return config_of


def wait_for(place, run, process, rollout):
    """Until the run is there, in that rollout or just behind it."""
    stride, mark = 4, Path(os.environ[killed_world.MARK])
    wait_for_step(run, rollout * stride + (1 if place == "update" else stride), process)
    if place == "rollout":
        while process.is_alive() and rollout * stride + stride not in run.checkpoint_steps():
            time.sleep(0.001)
    if place == "reward":
        mark.unlink(missing_ok=True)
        while process.is_alive() and not mark.exists():
            time.sleep(0.001)


def children(process):
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes, seconds):
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("stage", CONFIGS)
def test_twenty_kills(config_of, start, stage):
    kills, rng = 20, random.Random(stage)
    whole, killed = (config_of(stage, name, kills + 1) for name in ("whole", "killed"))
    run = RunFolder(killed.run)
    finish(start(stage, whole), whole)
    for kill in range(kills):
        process = start(stage, killed)
        wait_for(PLACES[kill % len(PLACES)], run, process, kill)
        time.sleep(rng.uniform(0, 0.05))
        workers = children(process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path(f"{killed.run}.log").read_text("utf-8")[-3000:]
        assert workers
        assert_gone(workers, 10)
    finish(start(stage, killed), killed)
    check_same(RunFolder(whole.run), run)
