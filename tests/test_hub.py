"""Models by their name on the hub, from a real server on this machine that speaks the hub's API."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serve
from huggingface_hub import constants

from minimind_jax import hub
from minimind_jax.config.sections import CheckpointConfig, DataConfig, MeshConfig, TrainingConfig
from minimind_jax.config.stages import SFTConfig
from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.load import base_folder
from minimind_jax.convert.peft import save_peft
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.lora import PROJECTIONS, init_adapters
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.seeds import named_key
from minimind_jax.sharding import init_params, make_mesh
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As Qwen's folders are: shards with an index, a tied embedding with more rows than the tokenizer has words,
    several end tokens, files that no training needs."""
    root = tmp_path_factory.mktemp("hub")
    tokenizer = train_bpe(["a small text of words"], root / "tokenizer", 300)
    config = ModelConfig(
        vocab_size=384, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    params = init_params(LanguageModel(config), named_key(0, "init"), make_mesh(MeshConfig()))
    save_hf(root / "model", config, params, tokenizer, max_shard_bytes=4000)
    for name, values in (("config.json", {"eos_token_id": 2}), ("generation_config.json", {"eos_token_id": [2, 0]})):
        file = root / "model" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    (root / "model/README.md").write_text("# model")
    (root / "model/model.gguf").write_bytes(b"0" * 1000)
    (root / "model/onnx").mkdir()
    (root / "model/onnx/config.json").write_text("{}")
    assert len(list((root / "model").glob("*.safetensors"))) > 1
    return root / "model"


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    with serve() as server:
        server.models["Own/Tiny"] = {OLD: folder}
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        forget()
        yield server
    forget()


def forget():
    hub._fetch.cache_clear()
    hub.pin({})


def test_only_the_files_that_are_needed_are_fetched_and_once(server, folder):
    found = resolve_model_folder("Own/Tiny", "init_from")
    assert resolve_model_folder("Own/Tiny") == found and found.name == OLD
    names = {file.name for file in found.iterdir()}
    assert names == {file.name for file in folder.iterdir()} - {"README.md", "model.gguf", "onnx"}
    assert sum("/revision/" in request for request in server.asked) == 1


def test_of_a_tokenizer_no_weights_are_fetched(server):
    tokenizer = Tokenizer.load("Own/Tiny")
    assert tokenizer.vocab_size > 256 and not list(tokenizer.folder.glob("*.safetensors"))
    assert list(resolve_model_folder("Own/Tiny").glob("*.safetensors"))  # fetched when they are needed


def test_a_folder_of_that_name_wins(server, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "Own/Tiny")
    assert resolve_model_folder("Own/Tiny").name == "Tiny" and not server.asked
    assert Tokenizer.load("Own/Tiny").folder.name == "Tiny" and not server.asked


def test_a_revision_may_be_named(server, folder):
    server.models["Own/Tiny"] = {OLD: folder, NEW: folder}
    assert resolve_model_folder("Own/Tiny").name == NEW
    assert resolve_model_folder(f"Own/Tiny@{OLD}").name == OLD


def test_a_transfer_that_breaks_off_goes_on(server, folder):
    server.cut = 2000
    found = resolve_model_folder("Own/Tiny")
    for file in found.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "name, words",
    [
        ("Own/Gated", "accept terms"),
        ("Own/Private", "HF_TOKEN"),
        ("my/model", "does not exist, or is private"),
        ("Own/Tiny@gone", "has no revision gone"),
        ("Own/Busy", "gave no answer"),
    ],
)
def test_what_cannot_be_fetched_is_told_with_the_command_that_would(server, name, words):
    server.refused |= {"Own/Gated": (403, "GatedRepo"), "Own/Private": (401, "RepoNotFound"), "Own/Busy": (500, "")}
    with pytest.raises(UserError) as caught:
        resolve_model_folder(name, "init_from")
    text = str(caught.value)
    assert words in text and "neither a Hugging Face folder nor a run" in text
    assert f"hf download {name.split('@')[0]}" in text and "give init_from the folder" in text


def test_offline_takes_the_cache_or_says_so(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve_model_folder("Own/Tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = resolve_model_folder("Own/Tiny")
    server.asked.clear()
    forget()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model_folder("Own/Tiny") == found and not server.asked


@pytest.mark.parametrize("name", ["runs/foo", "./a/b", "a/b/c", "/a/b", "~/a", "sft", "a/", "a b/c"])
def test_paths_are_never_asked_for(server, name):
    with pytest.raises(UserError, match="neither a Hugging Face folder nor a run") as caught:
        resolve_model_folder(name)
    assert not server.asked and "hf download" not in str(caught.value)


def test_several_processes_fetch_at_once(server):
    code = "from minimind_jax.folders import resolve_model_folder as find; print(find('Own/Tiny'))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in running}
    assert len(found) == 1 and found.pop().endswith(OLD)
    files = [request for request in server.asked if request.startswith("GET") and ".safetensors" in request]
    assert len(files) == len(set(files))


def test_a_run_goes_on_from_the_commit_it_began_with_without_the_hub(server, folder, tmp_path, monkeypatch):
    (tmp_path / "chats.jsonl").write_text(
        '{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "text"}]}\n' * 8
    )
    config = SFTConfig(
        run=str(tmp_path / "run"),
        init_from="Own/Tiny",
        data=DataConfig(train=(str(tmp_path / "chats.jsonl"),), val_fraction=0.0, seq_len=64, packing="best_fit"),
        training=TrainingConfig(steps=2, batch_tokens=64),
        checkpoint=CheckpointConfig(every=1),
    )
    start(config)
    run = RunFolder(tmp_path / "run")
    assert run.read_environment()["hub"] == {"Own/Tiny": OLD}
    assert json.loads((run.model / "config.json").read_text())["vocab_size"] == 384
    changed = tmp_path / "newer"
    shutil.copytree(folder, changed)
    (changed / "config.json").write_text("{}")
    server.models["Own/Tiny"][NEW] = changed
    server.asked.clear()
    forget()
    start(dataclasses.replace(config, training=TrainingConfig(steps=3, batch_tokens=64)))
    assert not server.asked and run.read_environment()["hub"] == {"Own/Tiny": OLD}


def test_an_adapter_names_its_base_as_the_hub_does(server, tmp_path):
    base = resolve_model_folder("Own/Tiny")
    table = {name: (1,) if name == "q_proj" else (0,) for name in PROJECTIONS}
    adapters = init_adapters(named_key(0, "lora"), load_hf(base)[1], table, alpha=2, rslora=False)
    save_peft(tmp_path / "adapter", adapters, table, base=base)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("Own/Tiny", OLD)
    assert base_folder(tmp_path / "adapter") == base
    assert hub.origin_of(tmp_path) is None and hub.origin_of(Path("models--a--b/other/c")) is None
