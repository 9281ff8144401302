"""metrics.jsonl is exact after a kill, and loggers that are chosen really get the numbers."""

import json
import sys

import pytest

from minimind_jax.config.sections import TrackingConfig
from minimind_jax.errors import UserError
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import MetricsWriter, read_metrics

NO_LOGGERS = TrackingConfig()


def write_steps(run, steps, start_step=0, tracking=NO_LOGGERS, **options):
    with MetricsWriter(run, tracking, start_step=start_step, settings={"seed": 1}, **options) as writer:
        for step in steps:
            writer.write(step, loss=1.0 / (step + 1))
    return writer


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run").create()


def test_rows_after_the_checkpoint_are_removed_at_resume(run):
    write_steps(run, range(1, 8))
    write_steps(run, range(5, 8), start_step=4)
    interrupted = run.metrics_file.read_bytes()
    run.metrics_file.unlink()
    write_steps(run, range(1, 8))
    assert interrupted == run.metrics_file.read_bytes()


def test_a_run_that_starts_anew_replaces_the_file(run):
    write_steps(run, range(0, 5))
    write_steps(run, range(0, 2))
    assert [row["step"] for row in read_metrics(run.metrics_file)] == [0, 1]


def test_a_torn_last_line_is_left_out_and_a_torn_other_line_is_an_error(run):
    write_steps(run, range(1, 4))
    whole = run.metrics_file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        run.metrics_file.write_bytes(whole[: -cut - 1])
        assert [row["step"] for row in read_metrics(run.metrics_file)] == [1, 2]
    write_steps(run, [3], start_step=2)
    assert run.metrics_file.read_bytes() == whole
    run.metrics_file.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        read_metrics(run.metrics_file)


def test_what_was_written_before_the_kill_is_known(run):
    with MetricsWriter(run, TrackingConfig(), start_step=0, settings={}) as writer:
        writer.write(4, loss=1.0)
        writer.write(4, val_loss=2.0)
    writer = write_steps(run, [], start_step=4)
    assert writer.has(4, "val_loss") and not writer.has(4, "samples") and not writer.has(3, "loss")


def test_numbers_json_does_not_have_become_null(run):
    with MetricsWriter(run, TrackingConfig(), start_step=0, settings={}) as writer:
        writer.write(1, loss=float("nan"), grad_norm=float("inf"), samples=[{"text": "日"}])
    assert json.loads(run.metrics_file.read_text("utf-8")) == {
        "step": 1, "loss": None, "grad_norm": None, "samples": [{"text": "日"}]
    }  # fmt: skip


def test_other_processes_write_nothing(run):
    write_steps(run, [1], active=False)
    assert not run.metrics_file.exists()


def test_tensorboard_gets_the_scalars(run):
    pytest.importorskip("tensorboardX", reason="needs the track extra")
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(run, TrackingConfig(loggers=("tensorboard",)), start_step=0, settings={}) as writer:
        writer.write(3, loss=0.5, samples=[])
        writer.write(3, val_loss=0.25)
    (file,) = (run.path / "tensorboard").iterdir()
    scalars = {(v.tag, event.step): v.simple_value for event in _events(file, Event) for v in event.summary.value}
    assert scalars == {("train/loss", 3): 0.5, ("val/val_loss", 3): 0.25}


def _events(file, event_type):
    data = file.read_bytes()
    while data:  # a record: length (8 bytes), its checksum (4), the message, its checksum (4)
        length = int.from_bytes(data[:8], "little")
        yield event_type.FromString(data[12 : 12 + length])
        data = data[16 + length :]


@pytest.mark.parametrize(("logger", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_names_its_extra(run, monkeypatch, logger, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"names {logger}, whose package {module} .*pip install .*tensorboardX"):
        write_steps(run, [1], tracking=TrackingConfig(loggers=(logger,)))
