"""The files of a run's folder are whole and readable, and one process at a time writes them."""

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

from minimind_jax.config.sections import DataConfig, ModelSettings, OptimizerConfig, TrainingConfig
from minimind_jax.config.stages import PretrainConfig
from minimind_jax.errors import UserError
from minimind_jax.folders import resolve_run
from minimind_jax.runs.begin import Found, check_settings, leaving_nothing, remove_unused
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import append_export, export_row


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    run = RunFolder(tmp_path / "run").create()
    code = "import sys; from minimind_jax.training.run import RunFolder; RunFolder(sys.argv[1]).lock(); print('locked')"

    def another_process():
        return subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)

    run.lock()
    run.lock()  # the process that has it may go on to a next stage in the same folder
    assert "is being trained in by another process" in another_process().stderr
    other = RunFolder(tmp_path / "other").create()
    assert subprocess.run([sys.executable, "-c", code, str(other.path)], capture_output=True).returncode == 0
    other.lock()


def test_config_is_read_back_and_compared_without_resume(tmp_path):
    run = RunFolder(tmp_path / "run").create()
    config = PretrainConfig(data=DataConfig(train=("ü.jsonl", "b")), tokenizer="tok")
    assert run.changed_settings(config) == {}  # nothing to compare with
    run.write_config(config)
    assert yaml.safe_load(run.config_file.read_text("utf-8"))["data"]["train"] == ["ü.jsonl", "b"]
    assert run.changed_settings(dataclasses.replace(config, resume="must")) == {}
    assert run.changed_settings(dataclasses.replace(config, seed=7)) == {"seed": "42 -> 7"}


def test_a_setting_that_the_older_version_did_not_have_counts_as_its_default(tmp_path):
    run = RunFolder(tmp_path / "run").create()
    config = PretrainConfig(tokenizer="tok")
    run.write_config(config)
    written = yaml.safe_load(run.config_file.read_text("utf-8"))
    del written["optimizer"]["cautious_decay"]
    run.config_file.write_text(yaml.safe_dump(written), "utf-8")
    assert run.changed_settings(config) == {}
    cautious = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, cautious_decay=True))
    assert run.changed_settings(cautious) == {"optimizer.cautious_decay": "False -> True"}


def test_resume_modes(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.check_resume("auto")
    run.check_resume("never")
    with pytest.raises(UserError, match=r"resume=must, but .*checkpoints holds no checkpoint"):
        run.check_resume("must")
    (run.checkpoints / "30").mkdir(parents=True)
    (run.checkpoints / "40.orbax-checkpoint-tmp").mkdir()
    assert run.checkpoint_steps() == [30]
    run.check_resume("must")
    run.check_resume("auto")
    with pytest.raises(UserError, match=r"resume=never, but .* holds checkpoints \(the newest of step 30\)"):
        run.check_resume("never")


def test_a_config_that_no_run_wrote_is_not_overwritten(tmp_path):
    run = RunFolder(tmp_path / "run").create()
    run.config_file.write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml is not of a run .* would be overwritten"):
        run.check_resume("auto")
    run.metrics_file.write_text("")
    run.check_resume("auto")


@pytest.mark.parametrize("name", ["report.md", "results.md", "loss.png"])
def test_what_others_wrote_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is not of a run .* would be overwritten"):
        RunFolder(tmp_path).check_resume("auto")


def test_environment_holds_versions_devices_and_facts(tmp_path):
    run = RunFolder(tmp_path).create()
    run.write_environment({"parameters": 12, "files": ("a",)})
    recorded = json.loads(run.environment_file.read_text("utf-8"))
    assert recorded["versions"]["jax"] and recorded["devices"] and recorded["run"] == {"parameters": 12, "files": ["a"]}
    assert run.read_environment() == recorded


def test_a_run_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot create the run folder"):
        RunFolder(tmp_path / "file" / "run").create()


def test_a_run_goes_on_only_with_the_model_and_start_it_has(tmp_path, capsys):
    run = RunFolder(tmp_path / "run").create()
    config = PretrainConfig(tokenizer="tok", optimizer=OptimizerConfig(learning_rate=5e-4))
    run.write_config(config)

    def check(changed):
        check_settings(run, Found.look(run, changed))

    check(dataclasses.replace(config, seed=1))  # nothing was saved yet
    (run.checkpoints / "5").mkdir(parents=True)
    faster = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e-3))
    check(faster)
    assert "optimizer.learning_rate 0.0005 -> 0.001" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"started with other settings \(model.rope_theta None -> 500.0\)"):
        check(dataclasses.replace(config, model=ModelSettings(rope_theta=500.0)))
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    append_export(run, export_row(5, "float32"))
    with pytest.raises(UserError, match=r"finished with other settings \(optimizer.learning_rate"):
        check(faster)
    check(dataclasses.replace(config, export_dtype="float32"))
    check(dataclasses.replace(config, training=TrainingConfig(steps=9)))


def test_a_run_that_could_not_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails():
        run = RunFolder(resolve_run("new"))
        with leaving_nothing(run.path):
            run.create().lock()
            run.checkpoints.mkdir()
            raise UserError("no")

    with pytest.raises(UserError, match="no"):
        fails()
    assert list(tmp_path.iterdir()) == []
    kept = RunFolder("runs/new").create()
    with pytest.raises(UserError, match="no"):
        fails()
    assert kept.path.is_dir()
    (tmp_path / "more" / "log").mkdir(parents=True)
    (tmp_path / "more" / "log" / "a.txt").write_text("mine")
    remove_unused(tmp_path / "more")
    assert (tmp_path / "more" / "log" / "a.txt").is_file()
