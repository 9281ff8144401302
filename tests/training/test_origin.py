"""Start models that were trained anew in place: noticed before anything is computed from them."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from minimind_jax.config.stages import DistillConfig, DPOConfig, SFTConfig, TeacherConfig
from minimind_jax.convert import identity
from minimind_jax.errors import UserError
from minimind_jax.training import origin
from minimind_jax.training.run import RunFolder


def write_model(folder, value):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": np.full(1000, value, np.float32)}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def start(tmp_path):
    """Starts a run, as far as its start models go: of one that is cut off after a checkpoint."""

    def start(config):
        run = RunFolder(tmp_path / "run").create()
        origin.check_start_models(run, config, origin.find_models(config))
        run.write_environment({})
        (run.checkpoints / "3").mkdir(parents=True, exist_ok=True)

    return start


@pytest.mark.parametrize("cls", [SFTConfig, DPOConfig, DistillConfig])
def test_a_start_model_trained_anew_is_refused_by_name(tmp_path, start, cls):
    base = write_model(tmp_path / "base", 1.0)
    config = cls(init_from=base)
    start(config)
    start(config)
    write_model(tmp_path / "base", 2.0)
    with pytest.raises(UserError, match=r"init_from .*base holds other weights than when .*run was started"):
        start(config)
    write_model(tmp_path / "base", 1.0)
    start(config)


def test_so_are_a_teacher_and_the_base_of_an_adapter(tmp_path, start):
    base, teacher = write_model(tmp_path / "base", 1.0), write_model(tmp_path / "teacher", 1.0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    save_file({"a": np.ones(3, np.float32)}, adapter / "adapter_model.safetensors")
    config = DistillConfig(init_from=str(adapter), teacher=TeacherConfig(model=teacher))
    start(config)
    write_model(tmp_path / "teacher", 2.0)
    with pytest.raises(UserError, match=r"teacher.model .*teacher holds other weights"):
        start(config)
    write_model(tmp_path / "teacher", 1.0)
    write_model(tmp_path / "base", 2.0)
    with pytest.raises(UserError, match=r"init_from .*adapter holds other weights"):
        start(config)


def test_of_large_files_blocks_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE_BYTES", 100)
    monkeypatch.setattr(identity, "BLOCK_BYTES", 16)
    found = {identity.weights_hash(tmp_path / "base") for value in (1.0, 2.0) if write_model(tmp_path / "base", value)}
    assert len(found) == 2
