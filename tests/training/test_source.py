"""The seam between the loop and what it trains on: a source that makes its batches from the model itself."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from run_helpers import assembled, rows_of

from minimind_jax.config.sections import CheckpointConfig, OptimizerConfig
from minimind_jax.errors import UserError
from minimind_jax.losses import Metric
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.runs.parts import run_parameters
from minimind_jax.training.checkpoint import Checkpoints
from minimind_jax.training.loop import train
from minimind_jax.training.optimizer import Group
from minimind_jax.training.run import RunFolder
from minimind_jax.training.source import Recipe
from minimind_jax.training.stop import Interrupted

ROWS, T, STRIDE = 8, 32, 4


class Rollouts:
    """Four batches at a time, of tokens that follow from the live parameters, the step and the seed.

    cut_at: the step at whose batch the run is asked to stop. calls: the steps for which parameters were looked at.
    """

    stride = STRIDE

    def __init__(self, seed=0, cut_at=None):
        self.seed, self.cut_at, self.calls, self.is_open = seed, cut_at, [], False

    def planned_steps(self, training):
        return training.steps

    def record(self):
        return {"seed": self.seed}

    def check_record(self, earlier):
        if earlier != self.record():
            raise UserError("these are other rollouts")
        return "rollouts go on"

    def facts(self, steps):
        return {"training data": "rollouts", "steps": str(steps)}

    def begin(self, step, steps, is_stopping):
        self.is_open = True

    def next(self, step, params):
        if step == self.cut_at:
            os.kill(os.getpid(), signal.SIGTERM)
        told = {}
        if step % STRIDE == 0:
            self.calls.append(step)
            weight = float(sum(np.abs(leaf).sum(dtype=np.float64) for leaf in jax.tree.leaves(jax.device_get(params))))
            rng = np.random.default_rng([self.seed, step, hash(weight) % 2**32])
            self.tokens = rng.integers(3, 300, (STRIDE, ROWS, T + 1)).astype(np.int32)
            told = {"reward": weight}
        tokens = self.tokens[step % STRIDE]
        positions = np.broadcast_to(np.arange(T, dtype=np.int32), (ROWS, T))
        ones = np.ones((ROWS, T), np.int32)
        return {
            "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segment_ids": ones,
            "loss_weights": ones.astype(np.float32),
        }, told  # fmt: skip

    def close(self):
        self.is_open = False


class Success:
    """Some number that is larger for other parameters."""

    def describe(self):
        return "some tasks"

    def __call__(self, params, is_stopping):
        return {"success": float(np.asarray(params["norm"]["scale"]).sum())}


@pytest.fixture
def settings(world, tmp_path):
    training = {"steps": 16, "eval_every": 6, "log_every": 100, "watch": "max success"}
    return world.pretrain(tmp_path / "run", training=training, checkpoint=CheckpointConfig(every=3, keep=9))


def train_on(config, source, **given):
    """Of the layers the second alone is trained, and the embedding at a rate of its own."""
    run = assembled("pretrain", config)
    run.folder.create()
    parameters = run_parameters(run)._replace(
        groups=(Group("words", lambda path: path[0] == "embed", OptimizerConfig(learning_rate=1e-3), 0.5),),
        layers=lambda path: [1] if path[0] == "layers" else None,
    )
    given = {"loss_fn": make_language_model_loss(run.model), "evaluation": Success(), **given}
    recipe = Recipe(source, parameters=parameters, **given)
    return train(config, recipe, stage="test", model=run.model, run=run.folder, mesh=run.mesh)


def test_a_run_is_saved_stopped_and_evaluated_between_strides_and_goes_on_exactly(settings, tmp_path, capsys):
    source = Rollouts()
    whole = train_on(settings, source, skip_above={"loss": 1e9})
    run = RunFolder(settings.run)
    rows = rows_of(run.path)
    assert source.calls == [0, 4, 8, 12] and not source.is_open
    assert run.checkpoint_steps() == [4, 8, 12, 16]  # due after 3, 6, 9, 12, 15 and the last
    assert [row["step"] for row in rows if "val_success" in row] == [0, 8, 12, 16]  # due after 6, 12 and the last
    assert [row["step"] for row in rows if "reward" in row] == [1, 5, 9, 13]
    assert "rollouts" in run.read_environment()["run"]["training data"]

    cut = dataclasses.replace(settings, run=str(tmp_path / "cut"))
    with pytest.raises(Interrupted):
        train_on(cut, Rollouts(cut_at=5), skip_above={"loss": 1e9})
    assert RunFolder(cut.run).checkpoint_steps() == [4, 8]
    again = Rollouts()
    ended = train_on(cut, again, skip_above={"loss": 1e9})
    assert again.calls == [8, 12]
    assert "rollouts go on" in capsys.readouterr().out
    assert rows_of(cut.run) == rows
    for got, wanted in zip(jax.tree.leaves(ended.params), jax.tree.leaves(whole.params), strict=True):
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()
    start = run_parameters(assembled("pretrain", settings)).load()
    for got, before in zip(jax.tree.leaves(ended.params["layers"]), jax.tree.leaves(start["layers"]), strict=True):
        assert np.asarray(got)[0].tobytes() == np.asarray(before)[0].tobytes()
        assert np.asarray(got)[1].tobytes() != np.asarray(before)[1].tobytes()
    with pytest.raises(UserError, match="these are other rollouts"):
        train_on(cut, Rollouts(seed=1))


def test_a_limit_on_a_metric_forbids_the_rest_of_its_stride(settings, capsys):
    """As PPO stops a rollout's updates early; the next rollout is trained on again."""
    loss = make_language_model_loss(assembled("pretrain", settings).model)

    def loss_fn(params, batch, key):
        numerator, count, metrics = loss(params, batch, key)
        first = batch["tokens"][0, 0]
        return numerator, count, {**metrics, "approx_kl": Metric(first.astype("float32"))}

    class Marked(Rollouts):
        def next(self, step, params):
            batch, told = super().next(step, params)
            batch["tokens"][0, 0] = 5 if step in (5, 7, 11) else 1
            return batch, {**told, "step_weight": float(np.abs(np.asarray(params["norm"]["scale"])).sum())}

    settings = dataclasses.replace(settings, training=dataclasses.replace(settings.training, log_every=1))
    train_on(settings, Marked(), loss_fn=loss_fn, skip_above={"approx_kl": 4.0})
    rows = {row["step"]: row for row in rows_of(settings.run) if "loss" in row}
    moved = [step for step in range(1, 16) if rows[step]["step_weight"] != rows[step + 1]["step_weight"]]
    assert moved == [1, 2, 3, 4, 5, 9, 10, 11, 13, 14, 15]  # not 6, 7, 8 of the second rollout, and not 12
    assert [rows[step].get("skipped/approx_kl") for step in (5, 6, 7, 8, 9, 12, 16)] == [None, 1, 2, 3, 3, 4, 4]
    with Checkpoints(RunFolder(settings.run).checkpoints) as kept:
        assert kept.record(16)["skipped/approx_kl"] == 4 and kept.record(16)["skipped"] == 0
    told = capsys.readouterr().out
    assert "1 of 6 updates were skipped so far: approx_kl was above 4" in told and "4 of 12 updates" in told


def test_the_best_follows_the_watched_number_and_takes_the_room_of_the_last(settings, monkeypatch):
    values = {0: 9.0, 4: 1.0, 8: 3.0, 12: 2.0}

    class Given(Success):
        asked = 0

        def __call__(self, params, is_stopping):
            step, self.asked, self.params = 4 * self.asked, self.asked + 1, params
            return {"success": values[step], "loss": float(step)}

    training = dataclasses.replace(settings.training, eval_every=4, patience=1)
    config = dataclasses.replace(settings, training=training, checkpoint=CheckpointConfig(every=0, keep=1))
    evaluation, gone, restore = Given(), [], Checkpoints.restore

    def restore_and_look(*arguments):
        gone.extend(leaf.is_deleted() for leaf in jax.tree.leaves(evaluation.params))
        return restore(*arguments)

    monkeypatch.setattr(Checkpoints, "restore", restore_and_look)
    found = train_on(config, Rollouts(), evaluation=evaluation)
    assert gone and all(gone)  # there may be no room for two states
    assert (found.step, found.model_step) == (12, 8)
    assert RunFolder(config.run).checkpoint_steps() == [8, 12]


def test_a_watched_number_that_no_evaluation_gives_is_named(settings):
    training = dataclasses.replace(settings.training, watch="max accuracy")
    with pytest.raises(UserError, match="watch is max accuracy, and an evaluation of this run gives success"):
        train_on(dataclasses.replace(settings, training=training), Rollouts())
