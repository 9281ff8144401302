"""What version 0.1 left on a disk goes on: cut-off runs with their checkpoints, token caches, models and adapters.

`fixtures/version_0_1.tar.xz` holds tokenised data, a model, an adapter over it and five runs as a kill after step 4
of 8 left them; `ends/` has the losses and weights with which the same runs ended there when nobody cut them off.
"""

import hashlib
import json
import shutil
import tarfile

import numpy as np
import pytest
from safetensors.numpy import load_file

from minimind_jax import cli
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import read_metrics

STAGES = {"sft": "sft", "lora": "sft", "dpo": "dpo", "classify": "classify", "distill": "distill"}


@pytest.fixture(scope="module")
def unpacked(fixtures_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(fixtures_dir / "version_0_1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "kept"


@pytest.fixture
def kept(unpacked, tmp_path, monkeypatch):
    folder = shutil.copytree(unpacked, tmp_path / "kept")
    _move_caches(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINIMIND_CACHE", str(folder / "cache"))
    return folder


def _move_caches(folder):
    """As if the data had been tokenised here: a cache is named after what it was made from, paths included."""
    for info_file in list(folder.glob("cache/tokens/*/info.json")):
        info = json.loads(info_file.read_text())
        for file in info["source"]["files"]:
            file[0] = file[0].replace("/home/ann/kept", str(folder))
        info_file.write_text(json.dumps(info))
        key = hashlib.sha256(json.dumps(info["source"], sort_keys=True).encode()).hexdigest()[:32]
        info_file.parent.rename(folder / "cache" / "tokens" / key)


def minimind(*words):
    assert cli.main([str(word) for word in words]) == 0


@pytest.mark.parametrize("name", STAGES)
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(kept, name):
    run, caches = RunFolder(kept / "runs" / name), sorted(kept.glob("cache/tokens/*/tokens.bin"))
    written = {file: file.stat().st_mtime_ns for file in caches}
    minimind(STAGES[name], "--config", run.path / "config.yaml", "--resume", "must")
    losses = {row["step"]: row["loss"] for row in read_metrics(run.metrics_file) if "loss" in row}
    ends = json.loads((kept / "ends" / f"{name}.json").read_text())
    assert sorted(losses) == sorted(map(int, ends))
    np.testing.assert_allclose([losses[int(step)] for step in ends], list(ends.values()), rtol=2e-5)
    (file,) = run.model.glob("*.safetensors")
    found, whole = load_file(file), load_file(kept / "ends" / f"{name}.safetensors")
    assert found.keys() == whole.keys()
    for tensor, values in whole.items():  # bfloat16 where the model is exported so
        np.testing.assert_allclose(found[tensor].astype(np.float32), values.astype(np.float32), rtol=1e-2, atol=2e-4)
    after = {file: file.stat().st_mtime_ns for file in kept.glob("cache/tokens/*/tokens.bin")}
    assert after == written, "the tokens were made anew, though those of the earlier version are there"


def test_a_model_and_an_adapter_are_read(kept, capsys):
    minimind("evaluate", "perplexity", "chats.jsonl", "--model", "runs/chat")
    assert "372 tokens: loss 5.4" in capsys.readouterr().out
    minimind("convert", "to-hf", "runs/chat", "copy", "--dtype", "float32")
    minimind("convert", "merge-lora", "adapter", "merged", "--base", "runs/chat")
    base, merged = load_file("copy/model.safetensors"), load_file("merged/model.safetensors")
    assert base.keys() == merged.keys()
    changed = [name for name in base if not np.array_equal(base[name], merged[name].astype(np.float32))]
    assert len(changed) == 2 * 7 and all("proj" in name for name in changed)


def test_a_checkpoint_becomes_a_model(kept):
    minimind("convert", "to-hf", "runs/sft", "of-checkpoint", "--checkpoint", 4)
    assert load_file("of-checkpoint/model.safetensors").keys() == load_file("ends/sft.safetensors").keys()
