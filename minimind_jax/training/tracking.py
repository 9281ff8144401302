"""Where the numbers of a run go: metrics.jsonl always, and TensorBoard, W&B, SwanLab or trackio by choice.

metrics.jsonl holds one object a line, each with `step`. All values are exact functions of the run's settings and data,
and a resumed run writes the very lines an uninterrupted one does, but for the keys in WALL_CLOCK.
"""

import contextlib
import functools
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimind_jax.agreement import exchange
from minimind_jax.config.sections import TrackingConfig
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.folders import holds_model
from minimind_jax.paths import GrowingObject, as_path, is_remote
from minimind_jax.shell import needing
from minimind_jax.texts import is_there
from minimind_jax.training.run import RunFolder, write_text

WALL_CLOCK = ("seconds", "tokens_per_second", "mfu", "time/rollout", "time/rewards", "time/score")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none if it does not exist. A last line that a kill cut off is left out. Raises
    UserError when another line is not a JSON object with `step`."""
    path = as_path(path)
    if not is_there(path):
        return []
    with disk_errors(f"{path} cannot be read", "put back a copy of it"):
        lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError(f"step is {row['step']!r}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):
                break  # what follows the last newline: nothing, or a line that was being written
            raise UserError(
                f"{path}:{number}: not a JSON object with a step ({error}); mend or remove the line"
            ) from error
        rows.append(row)
    return rows


def export_row(step: int, written: str, model_step: int | None = None) -> dict[str, Any]:
    """The last row of a finished run: its model is written, in the dtype `written`, or adapters in theirs; that of
    `model_step` where it is not the last."""
    earlier = {} if model_step in (None, step) else {"model_step": model_step}
    return {"step": step, "exported": written, **earlier}


def append_export(run: RunFolder, row: dict[str, Any]) -> None:
    """Adds an `export_row`; the last thing that a run writes, which makes it finished."""
    if is_remote(run.metrics_file):
        write_text(run.metrics_file, run.metrics_file.read_text("utf-8") + _line(row))
    else:
        with run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def is_exported(run: RunFolder) -> bool:
    """Whether the run has written its model and all else, and no training has gone on since: one that does removes the
    `exported` row before it writes anything else (see `MetricsWriter`), so a longer run that is cut off is not taken
    for finished."""
    rows = read_metrics(run.metrics_file)
    return bool(rows) and "exported" in rows[-1] and holds_model(run.model)


class MetricsWriter(contextlib.AbstractContextManager):
    """Appends rows to the run's metrics.jsonl and to the chosen loggers.

    start_step: the checkpoint's step the run goes on from, 0 at its start; rows of later steps are removed first, and
        so is the `exported` row: the run is not finished until it has written its model again.
    settings: a plain dict that loggers show beside the curves.
    active: false on all processes but the first, which write nothing.

    Use as a context manager. Raises UserError when a logger's package is not installed or the file cannot be written.
    """

    def __init__(
        self, run: RunFolder, tracking: TrackingConfig, *, start_step: int, settings: dict, active: bool = True
    ):
        self.path = run.metrics_file
        self._file = None
        self._loggers: list[tuple[Callable[[int, dict], None], Callable[[], None]]] = []
        # A run that starts anew writes its step 0 again; a resumed one keeps what was measured there.
        rows = read_metrics(self.path) if start_step else []
        self.rows = [row for row in rows if row["step"] <= start_step and "exported" not in row]
        # All processes must know the same rows (what is done, what is not) before the first one adds to them.
        exchange()
        if not active:
            return
        text = "".join(_line(row) for row in self.rows)
        write_text(self.path, text)
        self._loggers = [LOGGERS[name](run, tracking.project, start_step, settings) for name in tracking.loggers]
        # Line by line onto a disk; into an object store now and then, and at `sync`.
        is_object = is_remote(self.path)
        self._file = GrowingObject(self.path, text) if is_object else self.path.open("a", encoding="utf-8", buffering=1)

    def __exit__(self, *_) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # every line has been flushed, or its failure raised
                self._file.close()
        for _, close in self._loggers:
            close()

    def sync(self) -> None:
        """Returns once every row is where a later process finds it; for before a checkpoint."""
        if self._file is not None:
            self._file.flush()

    def has(self, step: int, key: str) -> bool:
        """Whether a row of `step` with `key` is written already (before the run was cut off)."""
        return any(row["step"] == step and key in row for row in reversed(self.rows))

    def write(self, step: int, tell: bool = True, /, **values: Any) -> None:
        """One row: numbers (null where not finite), or anything else JSON holds; only numbers go to the loggers, and
        only if they are to be told."""
        lost = {key: None for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
        row = {"step": step, **values, **lost}
        self.rows.append(row)
        if self._file is None:
            return
        with disk_errors(f"cannot write {self.path}", "make room and run again to resume"):
            self._file.write(_line(row))
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for log, _ in self._loggers if tell else ():
            log(step, numbers)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _tensorboard(run: RunFolder, project: str, start_step: int, settings: dict):
    tensorboard = _import("tensorboardX", "tensorboard")
    writer = tensorboard.SummaryWriter(str(run.path / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(step: int, numbers: dict) -> None:
        for name, value in numbers.items():
            writer.add_scalar(f"{'val' if name.startswith('val_') else 'train'}/{name}", value, step)
        writer.flush()

    return log, writer.close


def _service(run: RunFolder, project: str, start_step: int, settings: dict, logger: str):
    """W&B, or another whose package is used as W&B's is."""
    package = _import(logger, logger)
    id = _tracking_id(run, start_step)
    # The client's own files: in the run's folder, or in a temporary one of this machine.
    folder = tempfile.mkdtemp(prefix="minimind-") if is_remote(run.path) else str(run.path)
    own = {
        "wandb": {"name": run.path.name, "id": id, "dir": folder},
        "swanlab": {"name": run.path.name, "id": id, "log_dir": os.path.join(folder, "swanlab")},
        # It resumes by name, and names must not clash when a run is trained anew.
        "trackio": {"name": f"{run.path.name}-{id[:6]}"},
    }
    package.init(project=project, resume="allow", config=settings, **own[logger])
    return lambda step, numbers: package.log(numbers, step=step), package.finish


LOGGERS = {
    "tensorboard": _tensorboard,
    **{name: functools.partial(_service, logger=name) for name in ("wandb", "swanlab", "trackio")},
}


def _import(module: str, logger: str):
    with needing(
        f"tracking.loggers names {logger}, whose package {module} is missing; leave it out or install it", "track"
    ):
        return __import__(module)


def _tracking_id(run: RunFolder, start_step: int) -> str:
    """The id of this run on a tracking service: the same when it is resumed, a new one when it starts anew."""
    file = run.path / ".tracking_id"
    if not start_step or not file.is_file():
        write_text(file, uuid.uuid4().hex[:20] + os.linesep)
    return file.read_text("utf-8").strip()
