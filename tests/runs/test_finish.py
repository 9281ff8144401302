"""The end of a run: asked to stop while the model or the report is written."""

import dataclasses
import os
import signal

import pytest

from minimind_jax.runs import finish
from minimind_jax.signals import Stopped, answering
from minimind_jax.stages import start
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import is_exported


@pytest.mark.parametrize("at", ["save_hf", "write_report"])
def test_a_run_that_is_stopped_at_its_end_says_what_is_saved_and_goes_on(world, tmp_path, monkeypatch, capsys, at):
    config = world.pretrain(tmp_path / "run")
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=2))
    run, write = RunFolder(config.run), getattr(finish, at)

    def stopped(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments, **named)

    with monkeypatch.context() as patched, pytest.raises(Stopped) as stop, answering():
        patched.setattr(finish, at, stopped)
        start(config)
    told = capsys.readouterr()
    assert stop.value.code == 143 and "The model is" not in told.out
    assert f"the training of {run.path} is done and saved" in told.err and "the same command goes on" in told.err
    assert not is_exported(run) and run.model.exists() == (at == "write_report")
    assert not run.report_file.exists() and not list(run.path.rglob("*.tmp"))
    start(config)
    assert is_exported(run) and run.report_file.exists()
