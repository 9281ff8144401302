"""Runs in processes of their own, which tests kill: forked from a server that has imported the library."""

import dataclasses
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src import compiler, distributed
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp
from pairs import free_port
from safetensors.numpy import load_file

from minimind_jax import stages
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import WALL_CLOCK, read_metrics

STEPS_PER_KILL = 8


@pytest.fixture(scope="module")
def start():
    """start(stage, config, devices) -> a process that trains. cluster: what joins it to others, see `cluster_of`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["minimind_jax.stages.next_token", "minimind_jax.stages.reinforce"])

    def start(stage, config, devices=1, cluster=None):
        cache = jax.config.jax_compilation_cache_dir
        process = server.Process(target=run_stage, args=(stage, config, devices, cache, cluster or {}))
        process.start()
        return process

    return start


def cluster_of(count):
    """The variables of each of so many processes of one run."""
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [{**own, "JAX_PROCESS_ID": str(index)} for index in range(count)]


def run_stage(stage, config, devices, cache, cluster):
    if cluster:
        os.environ.update(cluster)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        keep_programs_of_all()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    log = os.open(f"{config.run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    stages.start(config)


def keep_programs_of_all():
    """Of a cluster JAX has only the first process keep what it compiled, and on a CPU the others have programs of their
    own: they would compile them anew in every test, and whenever they are started again."""
    write = compiler._cache_write

    def as_first(*given):
        with mock.patch.object(distributed.global_state, "process_id", 0):
            write(*given)

    compiler._cache_write = as_first


def finish(process, config):
    process.join(300)
    assert process.exitcode == 0, Path(f"{config.run}.log").read_text("utf-8")[-3000:]


def wait_for_step(run, step, process):
    """Until the metrics hold `step`; looks at the end of the file only, to be quick."""
    needle = f'{{"step": {step},'.encode()
    while process.is_alive():
        if run.metrics_file.exists() and needle in run.metrics_file.read_bytes():
            return
        time.sleep(0.005)


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
