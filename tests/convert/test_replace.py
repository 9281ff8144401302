"""Writing into a folder that holds something: what is whose, what is refused, and what a kill leaves."""

import contextlib
import os

import jax
import pytest

from minimind_jax.convert.hf import load_hf, save_hf
from minimind_jax.convert.peft import rank_table, save_peft
from minimind_jax.data.tokenizer import Tokenizer
from minimind_jax.errors import UserError
from minimind_jax.folders import is_adapter
from minimind_jax.model.lora import init_adapters, join


def test_a_kill_at_any_move_leaves_the_old_model_the_new_one_or_none(make_model, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    old, new = make_model("dense"), make_model("dense")
    new[1]["norm"]["scale"] = new[1]["norm"]["scale"] * 2
    move, left = os.replace, [0]

    def replace(source, target):
        if not left[0]:
            raise Killed
        left[0] -= 1
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for moves in range(4):  # config.json, generation_config.json and the weights
        folder = tmp_path / str(moves)
        left[0] = 99
        save_hf(folder, *old, max_shard_bytes=20_000)
        (folder / "README.md").write_text("mine")
        left[0] = moves
        with pytest.raises(Killed) if moves < 3 else contextlib.nullcontext():
            save_hf(folder, *new, dtype="float32")
        if moves < 3:
            with pytest.raises(UserError, match=r"config\.json: no such file"):
                load_hf(folder)
            left[0] = 99
            save_hf(folder, *new, dtype="float32")
        assert (load_hf(folder)[1]["norm"]["scale"] == new[1]["norm"]["scale"]).all()
        names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
        assert {file.name for file in folder.iterdir()} == names


OTHERS = ["README.md", ".git/HEAD", "eval/r.json", "model.gguf", "src/main.py", "additional_chat_templates/notes.md"]
STALE = [
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json"),
    *("adapter_model.safetensors", "additional_chat_templates/tools.jinja", "chat_template.json", "merges.txt"),
]


def fill(folder, names, text="{}"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_others_files_stay_and_stale_ones_of_a_model_go(make_model, tokenizer, tmp_path):
    folder = tmp_path / "repo"
    fill(folder, [*OTHERS, *STALE, "config.json"])
    save_hf(folder, *make_model("dense"), tokenizer)
    assert [name for name in OTHERS if not (folder / name).is_file()] == []
    assert [name for name in STALE if (folder / name).exists()] == []
    assert load_hf(folder) and Tokenizer.load(folder)

    config, params = make_model("dense")
    table = rank_table(config, 2, ["q_proj"], {})
    params = join(params, init_adapters(jax.random.key(0), params, table, 4.0, False))
    save_peft(folder, params, table, base="base")
    assert is_adapter(folder) and not (folder / "model.safetensors").exists()
    assert [name for name in OTHERS if not (folder / name).is_file()] == []


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["setup.py", "src/main.py"], "not a model folder .* setup.py, src"),
        (["tokenizer.json"], "not a model folder .* tokenizer.json"),
        (["config.json", "model.fp16.safetensors"], r"model\.fp16\.safetensors"),
        (["config.json", "ema.bin", "consolidated.safetensors"], "consolidated.safetensors, ema.bin"),
        (["config.json", "model.safetensors/x"], "holds model.safetensors"),
        (["config.json", "vocab.json", "merges.txt"], "holds merges.txt, vocab.json, but no weights"),
        (["config.json", "tokenizer.json", "README.md"], "holds tokenizer.json, but no weights"),
        (["adapter_config.json", "added_tokens.json"], "holds added_tokens.json, but no weights"),
    ],
)
def test_a_folder_that_cannot_be_told_apart_is_refused_with_a_list(names, told, make_model, tmp_path):
    fill(tmp_path / "out", names)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=told):
        save_hf(tmp_path / "out", *make_model("dense"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ['{"port": 8080}', "[1]", "port = 8080", '{"_class_name": "UNet"}'])
def test_the_config_of_another_program_is_not_written_over(text, make_model, tmp_path):
    fill(tmp_path / "out", ["config.json", "src/main.py"], text)
    with pytest.raises(UserError, match=r"config\.json is not a model's"):
        save_hf(tmp_path / "out", *make_model("dense"))
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_a_new_repository_takes_a_model(make_model, tmp_path):
    fill(tmp_path / "repo", [".git/HEAD", ".gitattributes", "README.md", "LICENSE"])
    save_hf(tmp_path / "repo", *make_model("dense"))
    assert (tmp_path / "repo" / ".git" / "HEAD").is_file() and load_hf(tmp_path / "repo")


def test_a_read_only_file_is_not_written_over(make_model, tmp_path):
    save_hf(tmp_path, *make_model("dense"))
    (tmp_path / "model.safetensors").chmod(0o444)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds model\.safetensors, which may not be written over .*chmod u\+w"):
        save_hf(tmp_path, *make_model("dense"), dtype="float32")
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_adapter_does_not_replace_the_model_it_needs(make_model, tmp_path):
    config, params = make_model("dense")
    save_hf(tmp_path / "base", config, params)
    (tmp_path / "link").symlink_to("base")
    table = rank_table(config, 2, ["q_proj"], {})
    params = join(params, init_adapters(jax.random.key(0), params, table, 4.0, False))
    for name in ("base", "link"):
        with pytest.raises(UserError, match="the base model's own folder"):
            save_peft(tmp_path / name, params, table, base=tmp_path / "base")
    assert load_hf(tmp_path / "base")


def test_a_file_system_with_one_mode_for_all_files_holds_models(make_model, tmp_path, monkeypatch):
    def chmod(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", chmod)
    before = os.umask(0o077)  # the mode that safetensors sets itself
    try:
        assert load_hf(save_hf(tmp_path / "model", *make_model("dense")))
    finally:
        os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_files_get_the_usual_mode(umask, make_model, tokenizer, tmp_path):
    config, params = make_model("dense")
    before = os.umask(umask)
    try:
        table = rank_table(config, 2, ["q_proj"], {})
        adapted = join(params, init_adapters(jax.random.key(0), params, table, 4.0, False))
        save_hf(tmp_path / "whole", config, params, tokenizer, max_shard_bytes=20_000)
        save_peft(tmp_path / "adapter", adapted, table, base="base", tokenizer=tokenizer)
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for name in ("whole", "adapter") for file in (tmp_path / name).iterdir()}
    assert modes == {0o666 & ~umask}
