"""`minimind convert to-hf --checkpoint`: checkpoints of finished and of cut off runs as Hugging Face folders."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from minimind_jax.cli import main
from minimind_jax.config.sections import CheckpointConfig, OptimizerConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder

CHECKPOINTS = CheckpointConfig(every=2, keep=3)


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A finished run with checkpoints of the steps 2, 4 and 6."""
    config = world.pretrain(
        tmp_path_factory.mktemp("runs") / "base",
        training={"steps": 6, "eval_every": 1},
        checkpoint=CHECKPOINTS,
        export_dtype="bfloat16",
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-2),
    )
    return RunFolder(start(config))


def to_hf(run, output, *arguments):
    return main(["convert", "to-hf", str(run.path), str(output), *arguments])


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def set_val_losses(run, losses):
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    rows = [row for row in rows if "val_loss" not in row]
    rows += [{"step": step, "val_loss": loss} for step, loss in losses.items()]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "copy")
    return RunFolder(tmp_path / "copy")


def test_the_newest_is_the_run_s_own_model_bit_for_bit(run, tmp_path, capsys):
    before = sorted(path for path in run.path.rglob("*"))
    assert to_hf(run, tmp_path / "out", "--checkpoint", "newest") == 0
    assert "step 6 of " in capsys.readouterr().out
    assert files(tmp_path / "out") == files(run.model)
    assert sorted(path for path in run.path.rglob("*")) == before


def test_the_best_is_the_one_with_the_lowest_validation_loss_of_those_that_are_there(copy, tmp_path, capsys):
    set_val_losses(copy, {0: 9.0, 2: 3.0, 3: 1.0, 4: 2.0, 6: 2.5})
    assert to_hf(copy, tmp_path / "best", "--checkpoint", "best", "--dtype", "float32") == 0
    assert "step 4 of " in capsys.readouterr().out
    stored = ocp.load(copy.checkpoints / "4")
    written = load_file(tmp_path / "best" / "model.safetensors")
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], stored["params.embed.embedding"])
    kernel_DF = stored["params.layers.mlp.up_proj.kernel"][1]
    np.testing.assert_array_equal(written["model.layers.1.mlp.up_proj.weight"], np.asarray(kernel_DF).T)
    assert to_hf(copy, tmp_path / "four", "--checkpoint", "4", "--dtype", "float32") == 0
    assert files(tmp_path / "four") == files(tmp_path / "best")


def test_a_run_that_was_cut_off_has_checkpoints_only(world, run, tmp_path, capsys):
    config = world.sft(
        tmp_path / "chat",
        init_from=str(run.path),
        tokenizer="",
        training={"steps": 2},
        checkpoint=CHECKPOINTS,
        export_dtype="float16",
    )
    chat = RunFolder(start(dataclasses.replace(config, model=type(config.model)())))
    chat.model.rename(tmp_path / "whole")
    assert to_hf(chat, tmp_path / "out") == 2
    assert f"convert to-hf {chat.path} OUTPUT --checkpoint newest" in capsys.readouterr().err
    assert to_hf(chat, tmp_path / "out", "--checkpoint", "newest") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert load_hf(tmp_path / "out")[0] == load_hf(run.model)[0]


def test_what_is_not_there_is_told_with_what_is(copy, tmp_path, capsys):
    def message(*arguments):
        assert to_hf(copy, tmp_path / "out", *arguments) == 2
        return capsys.readouterr().err

    assert "no checkpoint of step 3; " in message("--checkpoint", "3")
    assert "holds those of the steps 2, 4, 6" in message("--checkpoint", "3")
    set_val_losses(copy, {1: 3.0})
    assert "at a step with a validation loss; " in message("--checkpoint", "best")
    copy.config_file.write_text(copy.config_file.read_text().replace("vocab_size: 304", "vocab_size: 320"))
    assert "params.embed.embedding has shape (304, 32) there" in message("--checkpoint", "newest")
    shutil.rmtree(copy.checkpoints)
    assert "holds no checkpoint" in message("--checkpoint", "newest")
    copy.environment_file.unlink()
    assert "should name the run's stage" in message("--checkpoint", "newest")
    copy.config_file.unlink()
    assert "is not a run (no " in message("--checkpoint", "newest")
    assert "checkpoint is 'latest'; it must be newest, best or a step" in message("--checkpoint", "latest")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_told(copy, tmp_path, capsys):
    for file in (copy.checkpoints / "4").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    assert to_hf(copy, tmp_path / "out", "--checkpoint", "4") == 2
    told = capsys.readouterr().err
    assert "4 cannot be read: " in told and "remove that folder: the one of step 2 is used" in told
    assert "Traceback" not in told and len(told.splitlines()) == 1


def test_a_damaged_newest_one_is_passed_over(copy, tmp_path, capsys):
    set_val_losses(copy, {2: 3.0, 4: 2.0, 6: 1.0})
    file = max((copy.checkpoints / "6").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    file.write_bytes(file.read_bytes()[::-1])
    for which in ("newest", "best"):
        assert to_hf(copy, tmp_path / which, "--checkpoint", which) == 0
        told = capsys.readouterr().out
        assert "6 cannot be read: the bytes of its file " in told and "step 4 of " in told
    assert files(tmp_path / "newest") == files(tmp_path / "best") != files(copy.model)
    assert to_hf(copy, tmp_path / "six", "--checkpoint", "6") == 2


def test_a_run_over_several_devices_is_exported_on_one(copy, run, tmp_path):
    copy.config_file.write_text(copy.config_file.read_text().replace("  fsdp: 1\n", "  fsdp: 2\n"))
    assert to_hf(copy, tmp_path / "out", "--checkpoint", "newest") == 0
    assert files(tmp_path / "out") == files(run.model)
