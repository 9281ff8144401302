"""Runs that learn from reward, killed in the rollout, in the reward, in the update and in the save, end as those that
were not: bit for bit. Asked to stop, they do so within seconds."""

import dataclasses
import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from kills import check_same, cluster_of, comparable, finish, wait_for_step
from pairs import outputs, start_one, start_pair
from worlds import WORDS, write_lines

from minimind_jax import stages
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
from minimind_jax.config.sections import CheckpointConfig, MeshConfig
from minimind_jax.training.run import RunFolder, plain

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
            "agent": AgentSettings(environment="killed_world.py:Calculates", turns=2, observation_tokens=32),
            "policy": PolicyConfig(minibatches=2, updates=2),
        },
    ),
}


# Of runs of two processes: nothing is evaluated and few sequences are written, since whoever starts traces all anew.
LESS = {
    "rollout": RolloutConfig(prompts=4, completions=2, max_new_tokens=12),
    "training": {"eval_every": 0},
    "data": {"val_fraction": 0.0},
}


@pytest.fixture(scope="session")
def talker(world, base, tmp_path_factory):
    """A model that has learned to answer in a word or two, and so to end."""
    folder = tmp_path_factory.mktemp("talker")
    asked = [{"role": "user", "content": "the cat"}]
    answers = [[*asked, {"role": "assistant", "content": word}] for word in WORDS for _ in range(8)]
    file = write_lines(folder / "words.jsonl", [{"conversations": each} for each in answers])
    config = world.sft(folder / "talker", init_from=base, tokenizer="", checkpoint=CheckpointConfig(0))
    training = dataclasses.replace(config.training, steps=60, eval_every=0)
    data = dataclasses.replace(config.data, train=(file,), seq_len=64)
    return str(stages.start(dataclasses.replace(config, data=data, training=training)))


@pytest.fixture
def config_of(make, talker, tmp_path):
    prompts = [{"prompt": f"the {n} cat", "answer": n} for n in range(24)]
    file = write_lines(tmp_path / "prompts.jsonl", prompts)
    own_file = shutil.copy(Path(__file__).with_name("killed_world.py"), tmp_path)
    (tmp_path / "tokenizer").symlink_to(f"{talker}/model")

    def config_of(stage, run, rollouts, training=(), data=(), **changes):
        kind, own = CONFIGS[stage]
        if agent := own.get("agent"):
            own = {**own, "agent": dataclasses.replace(agent, environment=f"{tmp_path}/{agent.environment}")}
        rollout = RolloutConfig(prompts=4, completions=4, max_new_tokens=12)
        settings = {"rollout": rollout, "rewards": RewardsConfig(use=(f"{own_file}:short",)), **own, **changes}
        return make(
            kind, tmp_path / run, file, rate=1e-3, checkpoint=CheckpointConfig(every=1, keep=2), init_from=talker,
            data={"seq_len": 128, "val_fraction": 0.25, **dict(data)},
            training={"steps": 4 * rollouts, "eval_every": 12, "eval_rows": 2, "batch_tokens": None, **dict(training)},
            **settings,
        )  # fmt: skip

    return config_of


def wait_for(place, run, process, rollout):
    """Until the run is there, in that rollout or just behind it."""
    stride, mark = 4, run.path.parent / "mark"
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
    if stage == "agent":
        turns = [row["turns/mean"] for row in comparable(run) if "turns/mean" in row]
        assert 1.5 < turns[0] < 2  # the calculator has answered


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGINT)]
)
def test_being_asked_to_stop_within_a_long_rollout_saves_and_exits_within_seconds(
    config_of, start, tmp_path, count, number
):
    """Its environment hangs; nothing is left behind, and the run goes on as if nothing had been. Of two processes the
    second alone is asked, and both stop."""
    whole, stopped = (config_of("agent", name, 4, **(LESS if count > 1 else {})) for name in ("whole", "stopped"))

    def start_all(config):
        return [start("agent", config, cluster=each) for each in (cluster_of(count) if count > 1 else [None])]

    def finish_all(config):
        for process in start_all(config):
            finish(process, config)

    finish_all(whole)
    run, hang = RunFolder(stopped.run), tmp_path / "hang"
    processes = start_all(stopped)
    wait_for_step(run, 5, processes[0])
    hang.touch()
    time.sleep(4)  # longer than `play.PATIENCE`
    workers = [worker for process in processes for worker in children(process)]
    asked, code = time.monotonic(), 128 + (number if count == 1 else signal.SIGTERM)  # which the others are told of
    os.kill(processes[-1].pid, number)
    for process in processes:
        process.join(30)
        assert process.exitcode == code, Path(f"{stopped.run}.log").read_text("utf-8")[-3000:]
    assert time.monotonic() - asked < 10 * count
    assert_gone(workers, 10)
    saved = run.checkpoint_steps()[-1]
    assert saved in (8, 12) and comparable(run)[-1]["step"] == saved
    hang.unlink()
    finish_all(stopped)
    check_same(RunFolder(whole.run), run)


def cluster_file(config, tmp_path):
    """The settings as a file for the command line."""
    file = tmp_path / f"{Path(config.run).name}.yaml"
    file.write_text(yaml.safe_dump(plain(config)), "utf-8")
    return ["--config", str(file)]


def assert_close(left, right):
    """The same metrics to 1e-5, and text of the same length."""
    for got, wanted in zip(comparable(left), comparable(right), strict=True):
        assert got.keys() == wanted.keys()
        for key in got.keys() - {"exported"}:
            assert got[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), (got["step"], key)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, fsdp=2), MeshConfig(data=1, tensor=2)], ids=str)
def test_two_processes_do_what_one_does(config_of, tmp_path, mesh):
    """Each plays its share of the prompts; or both the same, where they share the rows of a step. Two rollouts: sums in
    another order differ in their last bits, and in a third one a token may be drawn that is another for it."""
    one, pair = config_of("grpo", "one", 2), config_of("grpo", "pair", 2, mesh=mesh)
    outputs([start_one(tmp_path, "grpo", *cluster_file(one, tmp_path))], 0)
    outputs(start_pair(tmp_path, "grpo", *cluster_file(pair, tmp_path)), 0)
    assert_close(RunFolder(pair.run), RunFolder(one.run))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [("grpo", 20), ("ppo", 6), ("agent", 6)])
def test_two_processes_killed_again_and_again(config_of, start, stage, kills):
    """Twenty kills of one run, and six of others; each takes 7 CPU seconds of each process."""
    whole, killed = (config_of(stage, name, kills + 1, **LESS) for name in ("whole", "killed"))
    run, rng = RunFolder(killed.run), random.Random(stage)

    def start_two(config):
        return [start(stage, config, cluster=each) for each in cluster_of(2)]

    def finish_two(config):
        for process in start_two(config):
            finish(process, config)

    finish_two(whole)
    for kill in range(kills):
        processes = start_two(killed)
        wait_for(PLACES[kill % len(PLACES)], run, processes[0], kill)
        time.sleep(rng.uniform(0, 0.1))
        workers = [worker for process in processes for worker in children(process)]
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL, Path(f"{killed.run}.log").read_text("utf-8")[-3000:]
        assert_gone(workers, 10)
    finish_two(killed)
    check_same(RunFolder(whole.run), run)


@pytest.mark.slow
def test_of_two_processes_one_alone_is_asked_to_stop_or_is_killed(config_of, tmp_path):
    """Both stop with everything saved; or both end, and the other says why."""
    long = config_of("grpo", "long", 10_000)
    run, command = RunFolder(long.run), ["grpo", *cluster_file(long, tmp_path)]

    def begun(step):
        processes = start_pair(tmp_path, *command)
        while not any(row["step"] >= step for row in comparable(run)):
            assert all(process.poll() is None for process in processes), outputs(processes)
            time.sleep(0.05)
        return processes

    processes = begun(1)
    os.kill(processes[1].pid, signal.SIGTERM)
    first, _ = outputs(processes, 128 + signal.SIGTERM)
    saved = run.checkpoint_steps()[-1]
    assert f"stopped at step {saved} of 40000 with everything saved" in first and saved % 4 == 0

    processes = begun(saved + 5)
    processes[1].kill()
    first, _ = outputs(processes, -signal.SIGKILL, *range(1, 128), -signal.SIGABRT)
    assert "another task died" in first  # JAX's words, when it has not heard of it for a while
