"""Runs that are killed and resumed end as those that were not: bit for bit, on other numbers of devices to 1e-6.

Every run is a process of its own, forked from a server that has imported the library, and is ended by SIGKILL: at
moments drawn during start-up, and at and after steps drawn from the whole run, saves and evaluations included.
"""

import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from minimind_jax import stages
from minimind_jax.config.sections import OptimizerConfig
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import WALL_CLOCK, read_metrics

STEPS_PER_KILL = 8


@pytest.fixture(scope="module")
def start():
    """start(stage, config, devices) -> a process that trains."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["minimind_jax.stages.next_token"])

    def start(stage, config, devices=1):
        cache = jax.config.jax_compilation_cache_dir
        process = server.Process(target=run_stage, args=(stage, config, devices, cache))
        process.start()
        return process

    return start


def run_stage(stage, config, devices, cache):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    log = os.open(f"{config.run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    stages.start(config)


def finish(process, config):
    process.join(120)
    assert process.exitcode == 0, Path(f"{config.run}.log").read_text("utf-8")[-3000:]


def train_with_kills(start, stage, config, kills, seed=0, variants=((1, 1),)):
    """Kills `config`'s run `kills` times, then lets it finish. variants: (devices, loader workers), taken in turn."""
    rng, run = random.Random(seed), RunFolder(config.run)
    for kill in range(kills + 1):
        devices, workers = variants[kill % len(variants)]
        data = dataclasses.replace(config.data, loader_workers=workers)
        process = start(stage, dataclasses.replace(config, data=data), devices)
        if kill == kills:
            finish(process, config)
            return
        if kill % 4 == 3:
            time.sleep(rng.uniform(0, 3))
        else:
            wait_for_step(run, kill * STEPS_PER_KILL + rng.randrange(STEPS_PER_KILL), process)
            time.sleep(rng.choice([0, rng.uniform(0, 0.1)]))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, Path(f"{config.run}.log").read_text("utf-8")[-3000:]


def wait_for_step(run, step, process):
    """Until the metrics hold `step`; looks at the end of the file only, to be quick."""
    needle = f'{{"step": {step},'.encode()
    while process.is_alive():
        if run.metrics_file.exists() and needle in run.metrics_file.read_bytes():
            return
        time.sleep(0.001)


def comparable(run: RunFolder) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_metrics(run.metrics_file)]


def final_state(run: RunFolder) -> dict[str, np.ndarray]:
    """The newest checkpoint by name of the array, read onto one device."""
    here = SingleDeviceSharding(jax.devices()[0])
    with ocp.training.Checkpointer(run.checkpoints) as checkpointer:
        stored = checkpointer.metadata().metadata
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for k, x in stored.items()}
        return {name: np.asarray(array) for name, array in checkpointer.load(abstract_state=abstract).items()}


def check_same(left: RunFolder, right: RunFolder, tolerance: float = 0):
    """Metrics, the exported model, and the last checkpoint with the optimizer's state. tolerance: relative to the
    largest value of an array."""
    rows = comparable(left), comparable(right)
    assert [(row["step"], list(row)) for row in rows[0]] == [(row["step"], list(row)) for row in rows[1]]
    if not tolerance:
        assert rows[0] == rows[1]
        assert (left.model / "model.safetensors").read_bytes() == (right.model / "model.safetensors").read_bytes()
    for mine, other in zip(*rows, strict=True):
        for key in mine.keys() - {"samples", "exported"}:
            assert mine[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (mine["step"], key)
    for read in (final_state, lambda run: load_file(run.model / "model.safetensors")):
        mine, other = read(left), read(right)
        assert mine.keys() == other.keys()
        for name in mine:
            scale = np.abs(mine[name]).max(initial=0)
            np.testing.assert_allclose(mine[name], other[name], rtol=0, atol=tolerance * scale, err_msg=name)


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
