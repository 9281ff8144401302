"""Names become folders."""

from pathlib import Path

import pytest

from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_model_folder, resolve_run


def test_a_bare_name_is_under_runs_and_a_path_is_kept(tmp_path):
    assert resolve_run("small") == Path("runs/small")
    assert resolve_run(str(tmp_path / "x")) == tmp_path / "x"
    assert resolve_run("./here") == Path("here")
    with pytest.raises(UserError, match="run is empty"):
        resolve_run("")


def test_a_model_is_a_folder_or_that_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("hub", "runs/base/model"):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text("{}")
    assert resolve_model_folder("hub") == Path("hub")
    assert resolve_model_folder("base") == Path("runs/base/model")
    assert resolve_model_folder("runs/base") == Path("runs/base/model")
    assert resolve_model_folder(str(tmp_path / "runs/base/model")) == tmp_path / "runs/base/model"


def test_an_unfinished_or_absent_model_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/cut").mkdir(parents=True)
    Path("runs/cut/config.yaml").write_text("run: cut\n")
    with pytest.raises(UserError, match=r"init_from: the run runs/cut has no model/ yet.*to-hf runs/cut OUTPUT"):
        resolve_model_folder("cut", "init_from")
    with pytest.raises(UserError, match=r"model 'nothing' is neither .* runs/nothing/model/config.json"):
        resolve_model_folder("nothing")
