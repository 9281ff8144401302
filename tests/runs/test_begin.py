"""A run is begun once: what it is made of is found once and passed down."""

import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from run_helpers import with_chats
from safetensors.numpy import load_file, save_file

from minimind_jax import folders, sharding
from minimind_jax.config.stages import PretrainConfig, SFTConfig
from minimind_jax.data.batches import open_data
from minimind_jax.errors import UserError
from minimind_jax.runs.adapters import plan_adapters
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder

ONCE = [sharding.make_mesh, folders.resolve_model_folder, RunFolder.changed_settings, open_data, plan_adapters]


def test_what_a_run_is_made_of_is_found_once(make, world, tmp_path, monkeypatch):
    counts = Counter()

    def counted(function):
        def call(*args, **kwargs):
            counts[function] += 1
            return function(*args, **kwargs)

        return call

    for function in ONCE:
        places = [*(module for name, module in sys.modules.items() if name.startswith("minimind_jax")), RunFolder]
        for place in places:
            if getattr(place, function.__name__, None) is function:
                monkeypatch.setattr(place, function.__name__, counted(function))
    start(with_chats(make(SFTConfig, tmp_path / "run", "sft", data={"train": ()}, training={"steps": 1}), world))
    assert counts == dict.fromkeys(ONCE, 1)


def test_settings_that_a_run_cannot_go_on_with_are_refused(make, world, tmp_path, capsys):
    """Its batch followed from the data, and rows of 48 do not divide it; another stage has other settings."""

    def begin(config=SFTConfig, steps=2, seq_len=64):
        data, training = {"train": (), "seq_len": seq_len}, {"steps": steps, "batch_tokens": None}
        start(with_chats(make(config, tmp_path / "run", "sft", data=data, training=training), world))

    begin(steps=1)
    with pytest.raises(UserError, match=r"does not divide by data\.seq_len.*set them as they were"):
        begin(seq_len=48)
    with pytest.raises(UserError, match="run is a run of sft; choose another run name for pretrain"):
        begin(PretrainConfig)
    (tmp_path / "run" / "config.yaml").unlink()
    begin()
    assert "is finished; its model is" in capsys.readouterr().out


def test_held_out_files_that_are_trained_on_are_told(make, world, tmp_path, capsys):
    data = {"train": (), "val": (str(world.folder / "chat.jsonl"),)}
    start(with_chats(make(SFTConfig, tmp_path / "run", "sft", data=data, training={"steps": 1}), world))
    assert "warning: 1 of the files of data.val are in data.train, too" in capsys.readouterr().out


@pytest.mark.parametrize(("damage", "words"), [("nan", "infinite or none"), ("cut", "not a complete safetensors file")])
def test_damaged_weights_are_told_before_the_data_are_read(make, base, tmp_path, damage, words):
    model = shutil.copytree(Path(base) / "model", tmp_path / "model")
    file = model / "model.safetensors"
    if damage == "nan":
        tensors = load_file(file)
        tensors["model.norm.weight"][3] = np.nan
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=words):
        start(make(SFTConfig, tmp_path / "run", "no such file.jsonl", init_from=str(model)))
    assert not (tmp_path / "run").exists()
