"""Names of files and folders are compared by what they mean: a run in a project that was moved goes on."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from minimind_jax.config.fields import names_of
from minimind_jax.config.sections import DataConfig
from minimind_jax.config.stages import DistillConfig, PretrainConfig
from minimind_jax.convert.load import base_folder
from minimind_jax.errors import UserError
from minimind_jax.training.origin import check_start_models, find_models
from minimind_jax.training.places import changes
from minimind_jax.training.run import RunFolder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project's folder, which is the working directory, with tokenizers, a model of a run, and data."""
    folder = tmp_path / "project"
    for name in ("tok", "other_tok", "runs/base/model", "hub/qwen", "data"):
        (folder / name).mkdir(parents=True)
    (folder / "tok" / "tokenizer.json").write_text("1")
    (folder / "other_tok" / "tokenizer.json").write_text("2")
    shutil.copytree(folder / "tok", folder / "copy_of_tok")
    for name in ("runs/base/model", "hub/qwen"):
        (folder / name / "config.json").write_text("{}")
    (folder / "link").symlink_to("tok")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("key", "before", "now", "same"),
    [
        ("tokenizer", "tok", "./tok/", True),
        ("tokenizer", "tok", "data/../tok", True),
        ("tokenizer", "tok", "link", True),
        ("tokenizer", "tok", "PROJECT/tok", True),
        ("init_from", "base", "PROJECT/runs/base", True),
        ("tokenizer", "tok", "copy_of_tok", True),
        ("tokenizer", "tok", "other_tok", False),
        ("tokenizer", "tok", "", False),
        ("init_from", "base", "runs/base", True),
        ("init_from", "base", "./runs/base/model/", True),
        ("teacher.model", "runs/base", "base", True),
        ("init_from", "base", "hub/qwen", False),
        ("init_from", "gs://b/runs/a", "gs://b/runs/a/model/", True),
        ("init_from", "gs://b/runs/a", "gs://b/runs/b", False),
        ("data.train", ["data/a.jsonl", "b"], ["./data/a.jsonl", "./b"], True),
        ("data.train", ["a", "b"], ["b", "a"], False),
        ("data.train", ["a"], ["a", "b"], False),
        ("seed", "1", "./1", False),
    ],
)
def test_names_of_the_same_thing(project, key, before, now, same):
    now = [f"{project}/{name}" for name in now] if isinstance(now, list) else now.replace("PROJECT", str(project))
    for pair in ((before, now), (now, before)):
        found = changes(names_of(DistillConfig), *({key: value} for value in pair))
        assert found == ({} if same else {key: f"{pair[0]} -> {pair[1]}"})


NAMES = ("tok", "base", "data/text.jsonl")


def config_of(run, tokenizer, init_from, data):
    data = DataConfig((str(data),))
    return PretrainConfig(run=str(run), tokenizer=str(tokenizer), init_from=str(init_from), data=data)


def named_from_the_root(root):
    return config_of(root / "runs/more", root / "tok", root / "runs/base", root / "data/text.jsonl")


@pytest.mark.parametrize("was_absolute", [True, False])
def test_a_project_that_was_moved(project, monkeypatch, was_absolute):
    run = RunFolder("runs/more").create()
    run.write_config(named_from_the_root(project) if was_absolute else config_of("more", *NAMES))
    run.write_environment({})
    moved = project.rename(project.with_name("elsewhere"))
    monkeypatch.chdir(moved)
    for now in (named_from_the_root(moved), config_of("runs/more", *NAMES)):
        assert RunFolder("runs/more").changed_settings(now) == {}
    monkeypatch.chdir(moved.parent)
    inside = RunFolder(moved / "runs" / "more")
    now = named_from_the_root(moved)
    assert inside.changed_settings(now) == {}
    assert Path(inside.then().current(str(project / "tok") if was_absolute else "tok")) == moved / "tok"
    changed = dataclasses.replace(now, tokenizer=str(moved / "other_tok"), init_from=str(moved / "hub/qwen"))
    assert list(inside.changed_settings(changed)) == ["init_from", "tokenizer"]


@pytest.mark.parametrize("name", ["more", "runs/more", "PROJECT/runs/more"])
def test_the_base_of_an_adapter_is_found_after_a_move(project, monkeypatch, capsys, name):
    run = RunFolder("runs/more").create()
    run.write_config(config_of(name.replace("PROJECT", str(project)), *NAMES))
    run.write_environment({})
    run.model.mkdir()
    base = {"peft_type": "LORA", "base_model_name_or_path": str(project / "hub/qwen")}
    (run.model / "adapter_config.json").write_text(json.dumps(base))
    moved = project.rename(project.with_name("elsewhere"))
    monkeypatch.chdir(moved.parent)
    for _ in range(2):
        assert base_folder(moved / "runs/more/model") == moved / "hub/qwen"
    assert capsys.readouterr().err.count("moved together") == 1
    (moved / "hub/qwen").rename(moved / "gone")
    with pytest.raises(UserError, match="--base FOLDER"):
        base_folder(moved / "runs/more/model")


def test_a_model_or_tokenizer_that_was_renamed_or_copied(project):
    (project / "runs/base/model/model.safetensors").write_bytes(b"weights")
    config = config_of("more", *NAMES)
    run = RunFolder("runs/more").create()
    check_start_models(run, config, find_models(config))
    run.write_config(config)
    run.write_environment({})
    (project / "tok").rename(project / "words")
    (project / "runs/base/model").rename(project / "hub/mine")
    renamed = dataclasses.replace(config, tokenizer="words", init_from="hub/mine")
    assert run.changed_settings(renamed) == {}
    (project / "hub/mine/model.safetensors").write_bytes(b"other")
    (project / "words/tokenizer.json").write_text("3")
    assert list(run.changed_settings(renamed)) == ["init_from", "tokenizer"]


def test_a_run_of_an_older_version_is_compared_from_here(project):
    run = RunFolder("runs/more").create()
    run.write_config(config_of("more", *NAMES))
    assert run.then() is None
    assert run.changed_settings(config_of("./runs/more", "./tok", "runs/base", project / "data" / "text.jsonl")) == {}
