"""LoRA in a stage: what is trained, saved, resumed and refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from run_helpers import KEEP_ALL, assert_resumes_exactly, export_newest, last, rows_of, with_chats
from safetensors.numpy import load_file
from worlds import ADAPTERS

from minimind_jax.config.sections import LoRAConfig, OptimizerConfig
from minimind_jax.convert.hf import load_hf
from minimind_jax.convert.load import base_folder, load_merged
from minimind_jax.errors import UserError
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder


def test_lora_trains_saves_and_holds_adapters_only(lora, world, base, capsys):
    config = with_chats(lora, world)
    run = RunFolder(start(config))
    assert "adapters" in run.read_environment()["run"]
    assert last(run.path, "val_loss") < rows_of(run.path)[0]["val_loss"] - 0.02
    tensors = load_file(run.model / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7 and not (run.model / "model.safetensors").exists()
    assert base_folder(run.model) == RunFolder(base).model
    sizes = sum(path.stat().st_size for path in (run.checkpoints / "24").rglob("*") if path.is_file())
    assert sizes < 400_000
    assert "merge-lora" in capsys.readouterr().out
    assert rows_of(run.path)[-1]["exported"] == "adapters in float32"


@pytest.mark.slow
def test_lora_resumes_exactly(lora, world, tmp_path):
    config = dataclasses.replace(
        with_chats(lora, world), checkpoint=KEEP_ALL, lora=dataclasses.replace(ADAPTERS, dropout=0.2)
    )
    assert_resumes_exactly(config, tmp_path)


def test_a_base_that_changed_is_told(lora, world, base, tmp_path):
    copy = shutil.copytree(RunFolder(base).model, tmp_path / "base")
    config = dataclasses.replace(with_chats(lora, world), init_from=str(copy))
    start(config)
    shutil.rmtree(RunFolder(config.run).model)
    tensors = load_file(copy / "model.safetensors")
    from safetensors.numpy import save_file

    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, copy / "model.safetensors")
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=30))
    with pytest.raises(UserError, match=r"init_from .* holds other weights than when .* was started"):
        start(longer)


@pytest.mark.slow
def test_an_adapter_is_trained_further_or_merged(lora, world, make, tmp_path):
    first = RunFolder(start(with_chats(lora, world)))
    config = dataclasses.replace(with_chats(lora, world), run=str(tmp_path / "more"), init_from=str(first.path))
    more = RunFolder(start(config))
    assert rows_of(more.path)[0]["val_loss"] == pytest.approx(last(first.path, "val_loss"), abs=1e-5)
    assert base_folder(more.model) == base_folder(first.model)
    with pytest.raises(UserError, match=r"has the ranks q_proj 4, .* and lora asks for q_proj 8.*merge-lora"):
        start(dataclasses.replace(config, run=str(tmp_path / "other"), lora=dataclasses.replace(ADAPTERS, rank=8)))
    whole = dataclasses.replace(config, run=str(tmp_path / "whole"), lora=LoRAConfig(), optimizer=OptimizerConfig())
    merged = RunFolder(start(whole))
    assert rows_of(merged.path)[0]["val_loss"] == pytest.approx(last(first.path, "val_loss"), abs=1e-5)
    assert (merged.model / "model.safetensors").is_file()


def test_a_checkpoint_of_adapters_is_exported_whole(lora, world, tmp_path):
    run = RunFolder(start(dataclasses.replace(with_chats(lora, world), checkpoint=KEEP_ALL)))
    assert export_newest(run.path, tmp_path / "out", "float32") == 24
    config, params = load_hf(tmp_path / "out")
    expected_config, expected = load_merged(run.model)
    assert config == expected_config
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


def test_lora_needs_a_model(lora, world):
    config = dataclasses.replace(with_chats(lora, world), init_from="", tokenizer=str(world.folder / "tokenizer"))
    with pytest.raises(UserError, match="there is no model to adapt"):
        start(config)
