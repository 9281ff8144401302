"""The loop: what it writes, in which order, how it resumes and how it stops. Real stages on tiny data."""

import dataclasses
import math
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from run_helpers import assembled, cut_back

from minimind_jax import huge_pages
from minimind_jax.config.sections import CheckpointConfig, ModelSettings, OptimizerConfig, SampleConfig, TrainingConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.hf_config import from_hf_config, to_hf_config
from minimind_jax.data.batches import open_data
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.losses.language_model import make_language_model_loss
from minimind_jax.model.config import RopeScaling
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.runs.parts import open_rows, run_parameters
from minimind_jax.runs.report import write_report
from minimind_jax.runs.stage import on_rows, train_run
from minimind_jax.stages import STAGES, start
from minimind_jax.training.checkpoint import Checkpoints
from minimind_jax.training.defaults import planned_steps
from minimind_jax.training.loop import Loop
from minimind_jax.training.packed import check_same_data
from minimind_jax.training.run import RunFolder
from minimind_jax.training.stop import Interrupted
from minimind_jax.training.tracking import WALL_CLOCK, read_metrics


def comparable(run):
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_metrics(run.metrics_file)]


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    samples = SampleConfig(prompts=("the cat", "你好"), max_new_tokens=4)
    return world.pretrain(
        tmp_path_factory.mktemp("runs") / "whole", training={"log_every": 4, "sample_every": 12}, samples=samples
    )


@pytest.fixture(scope="module")
def whole(config):
    return RunFolder(start(config))


@pytest.fixture
def copy(whole, config, tmp_path):
    """(a copy of the finished run, its settings)."""
    shutil.copytree(whole.path, tmp_path / "copy")
    return RunFolder(tmp_path / "copy"), dataclasses.replace(config, run=str(tmp_path / "copy"))


def test_metrics_follow_the_settings(whole, config, world):
    every = comparable(whole)
    assert [row["step"] for row in every if "loss" in row] == list(range(1, 25))
    rows = [row for row in every if "loss" not in row or "tokens" in row]  # the others have the loss alone
    kinds = [(row["step"], next(k for k in ("loss", "val_loss", "samples", "exported") if k in row)) for row in rows]
    assert kinds == [
        (0, "val_loss"), (0, "samples"), (1, "loss"), (4, "loss"), (5, "val_loss"), (8, "loss"), (10, "val_loss"),
        (12, "loss"), (12, "samples"), (15, "val_loss"), (16, "loss"), (20, "loss"), (20, "val_loss"),
        (24, "loss"), (24, "val_loss"), (24, "samples"), (24, "exported"),
    ]  # fmt: skip
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[0] == pytest.approx(math.log(304), abs=0.1) and losses[-1] < losses[0] - 0.5
    assert {"learning_rate", "grad_norm", "nll", "tokens", "router_loss"} <= rows[2].keys()
    batches, _ = open_data("text", config, Tokenizer.load(world.folder / "tokenizer"))
    trained = np.cumsum([batch["loss_weights"].sum() for batch in batches.iterate(0, 24)])
    assert [row["tokens"] for row in rows if "tokens" in row] == [trained[s - 1] for s in (1, 4, 8, 12, 16, 20, 24)]
    timed = [row for row in read_metrics(whole.metrics_file) if "tokens_per_second" in row]
    assert [row["step"] for row in timed] == [4, 8, 12, 16, 20, 24]


def test_validation_is_the_loss_of_the_exported_model_on_the_held_out_rows(whole, config, world):
    architecture, params = load_hf(whole.model)
    tokenizer = Tokenizer.load(whole.model)
    _, val = open_data("text", config, tokenizer)
    nll = tokens = num_bytes = 0.0
    for batch in val.eval_batches(config.training.eval_rows):
        logits, _ = LanguageModel(architecture).apply(params, batch["tokens"], batch["positions"], batch["segment_ids"])
        logits = np.asarray(logits, np.float64)
        log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_probs -= logits.max(-1, keepdims=True)
        weights = batch["loss_weights"]
        nll -= (np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0] * weights).sum()
        tokens += weights.sum()
        num_bytes += (batch["target_bytes"] * (weights > 0)).sum()
    last = [row for row in comparable(whole) if "val_loss" in row][-1]
    assert last["val_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert last["val_bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    total = last["val_loss"] * tokens  # float32, and its quotient is not rounded once more
    assert total == pytest.approx(float(np.float32(total)), rel=1e-14)


def test_the_run_folder_is_complete(whole, config):
    assert whole.checkpoint_steps()[-1] == 24
    assert whole.changed_settings(config) == {}
    facts = whole.read_environment()["run"]
    assert "28,384 parameters" in facts["model"] and facts["steps"].startswith("24 (")
    assert "packed" in facts["training data"] and "attention path" in facts["compute"]
    assert "bits per byte" in whole.report_file.read_text("utf-8") and whole.loss_picture.stat().st_size > 10_000


def test_a_finished_run_is_not_run_again(whole, config, capsys):
    before = whole.metrics_file.stat().st_mtime_ns
    assert start(config) == whole.path
    assert "is finished; its model is" in capsys.readouterr().out
    assert whole.metrics_file.stat().st_mtime_ns == before


def longer(config, steps=26, **changes):
    training = dataclasses.replace(config.training, steps=steps, log_every=1000)
    return dataclasses.replace(config, training=training, **changes)


def test_a_longer_run_that_is_cut_off_is_not_taken_for_the_finished_one(copy, monkeypatch, capsys):
    run, config = copy

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "run", cut_off)
        start(longer(config))
    told = " ".join(capsys.readouterr().out.split())
    assert "planned for 24 steps and is now for 26" in told and "goes from 3.00e-04 to 3.10e-04 at step 25" in told
    start(longer(config, optimizer=OptimizerConfig(learning_rate=1e-4)))
    assert [row["step"] for row in comparable(run) if "exported" in row] == [26]


def test_memory_is_given_back_after_the_first_step_and_where_it_is_short(copy, monkeypatch):
    _, config = copy
    given = []
    monkeypatch.setattr(huge_pages, "give_back", lambda: given.append("back"))
    monkeypatch.setattr(huge_pages, "is_short", lambda: True)
    start(longer(config))
    assert len(given) == 2


def test_a_finished_run_without_checkpoints_is_not_trained_over(copy, capsys):
    run, config = copy
    shutil.rmtree(run.checkpoints)
    before = run.metrics_file.read_bytes()
    start(config)
    assert "is finished" in capsys.readouterr().out
    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=r"model is there, but .*checkpoints holds no checkpoint to go on from"):
            start(longer(config, resume=resume))
    assert run.metrics_file.read_bytes() == before


def test_a_model_folder_is_not_trained_in(whole, config, tmp_path):
    folder = str(shutil.copytree(whole.model, tmp_path / "model"))
    before = sorted(os.listdir(folder))
    with pytest.raises(UserError, match=r"model is a Hugging Face model, not the folder of a run"):
        start(dataclasses.replace(config, run=folder, init_from=folder))
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("step", [15, 24])
def test_a_run_cut_off_between_save_and_evaluation_ends_as_if_it_had_not_been(whole, config, tmp_path, step):
    path = tmp_path / "cut"
    if step == 24:
        shutil.copytree(whole.path, path)
    else:
        stopped = dataclasses.replace(config, run=str(path), checkpoint=CheckpointConfig(every=15))
        start(stopped)
    run = RunFolder(path)
    cut_back(run, step)
    start(dataclasses.replace(config, run=str(path), resume="must"))
    assert comparable(run) == comparable(whole)
    assert (run.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


def train_directly(config, sample_fn=None, loss_fn=None):
    run = assembled("pretrain", config)
    run.folder.create()
    loss_fn = loss_fn or make_language_model_loss(run.model)
    return train_run(run, on_rows(run, loss_fn, run_parameters(run), open_rows(run)), sample_fn)


def test_a_signal_saves_the_step_in_progress(world, tmp_path):
    config = world.pretrain(tmp_path / "run", training={"sample_every": 7}, checkpoint=CheckpointConfig(0))
    asked = []

    def sample_fn(params):
        asked.append(None)
        if len(asked) == 2:  # at step 7
            os.kill(os.getpid(), signal.SIGTERM)
        return []

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        train_directly(config, sample_fn)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert RunFolder(config.run).checkpoint_steps() == [7]
    assert train_directly(config, lambda params: []).step == 24
    rows = comparable(RunFolder(config.run))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 25))
    assert [row["step"] for row in rows if "samples" in row] == [0, 7, 14, 21, 24]


def test_a_loss_that_is_not_finite_stops_with_the_last_checkpoint_kept(world, tmp_path, capsys):
    config = world.pretrain(tmp_path / "run", training={"steps": 8}, checkpoint=CheckpointConfig(every=2))
    bad_step = 5
    run = assembled("pretrain", config)
    language_model_loss = make_language_model_loss(run.model)
    batches, _ = open_rows(run)
    *_, bad_batch = batches.iterate(0, bad_step)

    def loss_fn(params, batch, key):
        numerator, denominator, metrics = language_model_loss(params, batch, key)
        is_bad = (batch["tokens"] == bad_batch["tokens"]).all()
        return jax.numpy.where(is_bad, jax.numpy.nan, numerator), denominator, metrics

    with pytest.raises(UserError, match=r"step 5: the loss \(nan\).*; checkpoint 4 is kept.*learning_rate"):
        train_directly(config, loss_fn=loss_fn)
    assert RunFolder(config.run).checkpoint_steps() == [2, 4]
    goes_on = dataclasses.replace(config, training=dataclasses.replace(config.training, stop_on_nan=False))
    assert train_directly(goes_on, loss_fn=loss_fn).step == 8
    rows = {row["step"]: row for row in comparable(RunFolder(config.run)) if "loss" in row}
    assert rows[5]["loss"] is None and math.isfinite(rows[8]["loss"])
    assert [rows[step].get("skipped") for step in (4, 5, 8)] == [None, 1, 1]
    assert "1 of 5 updates were skipped so far" in capsys.readouterr().out
    assert "| skipped updates | 1 of 8" in write_report(RunFolder(config.run), STAGES).read_text("utf-8")
    with Checkpoints(RunFolder(config.run).checkpoints) as kept:
        assert kept.record(8)["skipped"] == 1  # as version 0.1 reads it


def test_a_run_most_of_whose_updates_are_skipped_stops(world, tmp_path, capsys):
    """29 of 30 were skipped, and a model was written."""
    training = {"steps": 30, "stop_on_nan": False, "eval_every": 0}
    config = world.pretrain(tmp_path / "run", training=training, checkpoint=CheckpointConfig(0))
    language_model_loss = make_language_model_loss(assembled("pretrain", config).model)

    def loss_fn(params, batch, key):
        numerator, denominator, metrics = language_model_loss(params, batch, key)
        return numerator * jax.numpy.nan, denominator, metrics

    with pytest.raises(UserError, match=r"10 of 10 updates were skipped so far.*Most of them were, so .*Try a lower"):
        train_directly(config, loss_fn=loss_fn)
    told = [line for line in capsys.readouterr().out.splitlines() if "were skipped so far" in line]
    assert len(told) == 4  # after 1, 2, 4 and 8


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(copy):
    run, config = copy
    cut_back(run, 24)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, intermediate_size=96))
    with pytest.raises(UserError, match=r"another model or optimizer: params\.layers\.mlp\.\w+\.kernel has shape"):
        start(wider)
    with pytest.raises(UserError, match="is at step 24 already, beyond the 10 steps asked for"):
        start(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=10)))
    with pytest.raises(UserError, match="of another model or optimizer: opt_state"):
        start(dataclasses.replace(config, optimizer=OptimizerConfig(name="muon")))


def test_changed_data_is_refused_and_moved_files_are_the_same_data(copy, world, tmp_path, capsys):
    _, config = copy
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((world.folder / "text.jsonl").read_bytes())
    same = dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(moved),)))
    start(same)
    assert "warning: the tokenizer" not in capsys.readouterr().out
    with moved.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"data has changed since the checkpoint \(documents 120 -> 121, tokens"):
        start(dataclasses.replace(same, seed=config.seed, training=TrainingConfig(steps=30, batch_tokens=256)))
    with pytest.raises(UserError, match=r"seed 42 -> 7"):
        start(dataclasses.replace(config, seed=7))


def test_resume_never_and_must(whole, config, tmp_path):
    with pytest.raises(UserError, match=r"resume=never, but .* holds checkpoints"):
        start(dataclasses.replace(config, resume="never"))
    with pytest.raises(UserError, match=r"resume=must, but .* holds no checkpoint"):
        start(dataclasses.replace(config, resume="must", run=str(tmp_path / "new")))


def test_sft_starts_from_a_run_and_trains_the_answers(whole, world, tmp_path):
    config = world.sft(
        tmp_path / "sft",
        init_from=str(whole.path),
        tokenizer="",
        model=ModelSettings(),
        training={"sample_every": 24},
        data={"system_prompt_probability": 0.2, "empty_think_removal": 0.8},
        samples=SampleConfig(prompts=("the cat",), max_new_tokens=4),
    )
    run = RunFolder(start(config))
    rows = comparable(run)
    batches, _ = open_data("conversation", config, Tokenizer.load(whole.model))
    first = next(batches.iterate(0, 1))
    trained, present = first["loss_weights"].sum(), (first["segment_ids"] > 0).sum()
    assert next(row for row in rows if "loss" in row)["tokens"] == trained < present
    val = [row["val_loss"] for row in rows if "val_loss" in row]
    assert val[-1] < val[0]
    assert load_hf(run.model)[0].hidden_size == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "needs a tokenizer: give --tokenizer FOLDER, or --init_from"),
        ({"model": ModelSettings(vocab_size=300)}, r"has 304 tokens, more than the model's vocabulary of 300"),
        (
            {"init_from": "WHOLE", "model": ModelSettings(hidden_size=64)},
            r"model\.hidden_size is 64, but the model .* 32",
        ),
        ({"init_from": "nowhere"}, "neither a Hugging Face folder nor a run"),
        (
            {"data": {"seq_len": 512}, "training": {"batch_tokens": 512}},
            r"data\.seq_len 512 is above the model's context of 256 tokens \(model\.max_position_embeddings\); set",
        ),
        (
            {"samples": SampleConfig(prompts=("a",), max_new_tokens=300)},
            r"of 'a' and samples\.max_new_tokens 300 exceed the model's context of 256",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(whole, world, tmp_path, changes, message):
    if changes.get("init_from") == "WHOLE":
        changes = {**changes, "init_from": str(whole.path)}
    with pytest.raises(UserError, match=message):
        start(world.pretrain(tmp_path / "run", **changes))


@pytest.mark.parametrize(("rope_type", "original"), [("yarn", 256), ("linear", 256), ("dynamic", 64)])
def test_a_rope_scaling_makes_the_context_of_the_model_that_is_there_longer(
    whole, world, tmp_path, rope_type, original
):
    def context(**settings):
        model = ModelSettings(rope_scaling=RopeScaling(rope_type, 2.0, original), **settings)
        config = world.sft(tmp_path / "sft", init_from=str(whole.path), tokenizer="", model=model)
        architecture = assembled("sft", config).model.config
        assert from_hf_config(to_hf_config(architecture, "float32")) == architecture
        return architecture.max_position_embeddings

    assert context() == max(256, 2 * original)
    assert context(max_position_embeddings=300) == 300


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"steps": 7}, 7),
        ({}, 30),
        ({"epochs": 0.1}, 3),
        ({"epochs": 2.5}, 75),
        ({"epochs": 0.001}, 1),
        ({"tokens": 1001}, 11),
    ],
)
def test_length_of_a_run(training, steps):
    assert planned_steps(TrainingConfig(**training), 30, 3000) == steps


def test_the_same_data_needs_no_warning():
    record = {"cache": "a", "tokens": 5}
    assert check_same_data(record, record) is None
    assert "it is exact only if" in check_same_data(record, {**record, "cache": "b"})
    with pytest.raises(UserError, match="tokens 5 -> 6"):
        check_same_data(record, {"cache": "b", "tokens": 6})
