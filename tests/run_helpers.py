"""What tests of runs share."""

import dataclasses
import json
import shutil

from minimind_jax.config.sections import CheckpointConfig
from minimind_jax.config.tools import ToHFConfig
from minimind_jax.runs.export import export_checkpoint
from minimind_jax.runs.parts import assemble
from minimind_jax.sharding import make_mesh
from minimind_jax.stages import STAGES, start
from minimind_jax.training.origin import find_models
from minimind_jax.training.run import RunFolder
from minimind_jax.training.tracking import WALL_CLOCK, read_metrics

KEEP_ALL = CheckpointConfig(every=4, keep=10)


def assembled(stage, config):
    """The parts of a run that has not begun."""
    return assemble(STAGES[stage], config, RunFolder(config.run), make_mesh(config.mesh), find_models(config))


def export_newest(run, output, dtype=None):
    """The step of the checkpoint that is written to `output`."""
    asked = ToHFConfig(source=str(run), output=str(output), checkpoint="newest", dtype=dtype)
    return export_checkpoint(STAGES, asked)


def with_chats(config, world):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=(str(world.folder / "chat.jsonl"),)))


def rows_of(run):
    return [{k: v for k, v in row.items() if k not in WALL_CLOCK} for row in read_metrics(RunFolder(run).metrics_file)]


def last(run, key):
    return next(row[key] for row in reversed(rows_of(run)) if key in row)


def cut_back(run, step):
    """The folder as a kill right after the save of `step` leaves it, with a line torn off."""
    for other in run.checkpoint_steps():
        if other > step:
            shutil.rmtree(run.checkpoints / str(other))
    assert run.checkpoint_steps()[-1] == step
    shutil.rmtree(run.model)
    rows = run.metrics_file.read_text("utf-8").splitlines(keepends=True)
    steps = [json.loads(row)["step"] for row in rows]
    kept = [row for row, at in zip(rows, steps, strict=True) if at < step or (at == step and '"loss"' in row)]
    run.metrics_file.write_text("".join(kept) + '{"step": 99, "lo', "utf-8")


def assert_resumes_exactly(config, tmp_path, step=12):
    """A run cut off right after the save of `step` ends with the metrics and the model of one that was not."""
    whole = RunFolder(start(config))
    copy = RunFolder(shutil.copytree(whole.path, tmp_path / "cut"))
    cut_back(copy, step)
    start(dataclasses.replace(config, run=str(copy.path), resume="must"))
    assert rows_of(copy.path) == rows_of(whole.path)
    for file in whole.model.glob("*.safetensors"):
        assert (copy.model / file.name).read_bytes() == file.read_bytes()
