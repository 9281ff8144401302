"""Files that others wrote: each kind of damage is told with the file's name, in whichever file it is."""

import json
import shutil

import pytest

from minimind_jax.config.sections import MeshConfig
from minimind_jax.config.settings import read_yaml
from minimind_jax.convert.hf import load_hf, read_hf_config, save_hf
from minimind_jax.convert.peft import read_adapter_config
from minimind_jax.data.tokenizer import Tokenizer, train_bpe
from minimind_jax.errors import UserError
from minimind_jax.inference.generation_config import read_generation_config
from minimind_jax.model.config import ModelConfig
from minimind_jax.model.transformer import LanguageModel
from minimind_jax.seeds import named_key
from minimind_jax.sharding import init_params, make_mesh
from minimind_jax.texts import read_object, read_text
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import read_metrics

TINY = ModelConfig(
    vocab_size=320, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["a small text of words"], folder / "tokenizer", 300)
    params = init_params(LanguageModel(TINY), named_key(0, "init"), make_mesh(MeshConfig()))
    save_hf(folder / "whole", TINY, params, tokenizer, max_shard_bytes=1000)
    return folder / "whole"


def folder_in_its_place(file):
    file.unlink(missing_ok=True)
    file.mkdir()


def link_to_nothing(file):
    file.unlink(missing_ok=True)
    file.symlink_to("gone")


DAMAGE = {
    "a folder": folder_in_its_place,
    "a link to nothing": link_to_nothing,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_text('{"model_type": "qwen3", "vocab'),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "UTF-16": lambda file: file.write_text("{}", encoding="utf-16"),
    "a list": lambda file: file.write_text("[1, 2]"),
    "nested": lambda file: file.write_text("[" * 100_000),
}
READERS = {
    "config.json": read_hf_config,
    "tokenizer.json": Tokenizer.load,
    "tokenizer_config.json": Tokenizer.load,
    "special_tokens_map.json": Tokenizer.load,
    "generation_config.json": lambda folder: read_generation_config(folder),
    "adapter_config.json": read_adapter_config,
    "model.safetensors.index.json": load_hf,
    "model-00001-of-00002.safetensors": load_hf,
    "config.yaml": lambda folder: RunFolder(folder).read_config(),
    "environment.json": lambda folder: RunFolder(folder).read_environment(),
    "own.yaml": lambda folder: read_yaml(folder / "own.yaml"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(model_folder, tmp_path, name, damage):
    if damage == "empty" and name == "own.yaml":
        return  # a config without settings
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    if name.endswith(".safetensors"):
        name = min(file.name for file in folder.glob("model-*.safetensors"))
    DAMAGE[damage](folder / name)
    with pytest.raises(UserError) as caught:
        READERS[name if name in READERS else "model-00001-of-00002.safetensors"](folder)
    assert name in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("damage", ["a folder", "a link to nothing", "binary", "UTF-16"])
@pytest.mark.parametrize("name", ["chat_template.jinja", "metrics.jsonl"])
def test_a_damaged_text_is_named(model_folder, tmp_path, name, damage):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    DAMAGE[damage](folder / name)
    if name == "metrics.jsonl" and damage in ("binary", "UTF-16"):
        with (folder / name).open("ab") as file:
            file.write(b"\n")
    readers = {
        "chat_template.jinja": Tokenizer.load,
        "metrics.jsonl": lambda _: read_metrics(folder / name),
    }
    with pytest.raises(UserError, match=name):
        readers[name](folder)


@pytest.mark.parametrize(
    "name, value",
    [
        ("vocab_size", "many"), ("vocab_size", None), ("vocab_size", [1]), ("vocab_size", 1.5), ("vocab_size", True),
        ("hidden_size", 10**30), ("num_attention_heads", 0), ("head_dim", "4"), ("head_dim", {}), ("model_type", ["a"]),
        ("tie_word_embeddings", "false"), ("rms_norm_eps", float("nan")), ("rms_norm_eps", None), ("rope_theta", "x"),
        ("rope_theta", float("inf")), ("rope_scaling", "yarn"), ("rope_scaling", {"rope_type": ["yarn"]}),
        ("layer_types", 3), ("architectures", 7), ("eos_token_id", "end"), ("eos_token_id", ["a"]),
        ("max_position_embeddings", "long"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_a_model_configuration_is_named(model_folder, tmp_path, name, value):
    config = json.loads((model_folder / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json"):
        read_hf_config(tmp_path)


def test_a_byte_order_mark_is_no_damage(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_object(file) == {"a": 1}
    with pytest.raises(UserError, match=r"gone\.json cannot be read: No such file"):
        read_text(tmp_path / "gone.json")
