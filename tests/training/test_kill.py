"""Runs that are killed and resumed end as those that were not: bit for bit, on other numbers of devices to 1e-6.

Every run is a process of its own, forked from a server that has imported the library, and is ended by SIGKILL: at
moments drawn during start-up, and at and after steps drawn from the whole run, saves and evaluations included.
"""

import os
import signal
import time

import pytest
from kills import STEPS_PER_KILL, check_same, comparable, finish, train_with_kills, wait_for_step

from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.training.run import RunFolder


def check_kills(world, start, tmp_path, stage, kills, tolerance=0, variants=((1, 1),), **changes):
    training = {"steps": (kills + 1) * STEPS_PER_KILL}
    whole, killed = (
        getattr(world, stage)(tmp_path / name, training=training, **changes) for name in ("whole", "killed")
    )
    finish(start(stage, whole), whole)
    train_with_kills(start, stage, killed, kills, variants=variants)
    check_same(RunFolder(whole.run), RunFolder(killed.run), tolerance)
    assert not list(RunFolder(killed.run).checkpoints.glob("*tmp*"))


@pytest.fixture(scope="module")
def whole(world, start, tmp_path_factory):
    """A run of three times STEPS_PER_KILL steps that nothing cut off."""
    config = world.pretrain(tmp_path_factory.mktemp("runs") / "whole")
    finish(start("pretrain", config), config)
    return RunFolder(config.run)


def test_two_kills(world, start, whole, tmp_path):
    config = world.pretrain(tmp_path / "killed")
    train_with_kills(start, "pretrain", config, kills=2, variants=((1, 1), (1, 3)))
    assert comparable(whole)[-1] == {"step": 24, "exported": "float32"}
    check_same(whole, RunFolder(config.run))


def test_being_asked_to_stop_saves_and_exits_within_seconds(world, start, whole, tmp_path):
    config = world.pretrain(tmp_path / "stopped")
    run = RunFolder(config.run)
    for number, step in ((signal.SIGTERM, 2), (signal.SIGINT, 13)):
        process = start("pretrain", config)
        wait_for_step(run, step, process)
        asked = time.monotonic()
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == 128 + number
        assert time.monotonic() - asked < 10
        saved, written = run.checkpoint_steps()[-1], comparable(run)[-1]["step"]
        assert saved == written >= step
    process = start("pretrain", config)
    finish(process, config)
    check_same(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_twenty_kills(world, start, tmp_path, stage):
    check_kills(world, start, tmp_path, stage, kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_twenty_kills_with_other_numbers_of_loader_workers(world, start, tmp_path, stage):
    check_kills(world, start, tmp_path, stage, kills=20, variants=((1, 1), (1, 0), (1, 4), (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_twenty_kills_with_other_numbers_of_devices(world, start, tmp_path, stage):
    # The devices' sums are rounded in another order, and Adam makes most of it where a gradient is next to nothing: its
    # first steps are as long as any. Over these 168 steps: 3e-7 so (parameters 1.6e-7, Adam's averages 2.8e-7), 1.3e-6
    # with the default learning rate from the first step on. A step left out or done twice would show as 8e-5.
    check_kills(
        world,
        start,
        tmp_path,
        stage,
        kills=20,
        tolerance=1e-6,
        variants=((1, 1), (2, 1), (8, 1), (4, 1)),
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=40),
    )
