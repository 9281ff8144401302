"""The folder of a run, on a disk or in an object store (gs://, see `paths`).

runs/NAME/
  config.yaml        the settings of the run, readable by --config
  environment.json   versions, devices, and the facts printed at the start
  metrics.jsonl      one JSON object a line, in the order of the steps
  checkpoints/       Orbax, only for resuming
  labels.json        of a classifier: its labels in the order of their numbers
  profile/           a trace, where training.profile_steps asks for one
  model/             the Hugging Face folder, written at the end
  results.md         what a stage found about its model, part of the report
  report.md, loss.png
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import platform
import sys
from pathlib import Path, PurePath
from typing import Any

import jax
import yaml
from filelock import FileLock, Timeout

from minimind_jax.config.fields import names_of
from minimind_jax.config.sections import RUN_LENGTHS
from minimind_jax.errors import UserError, disk_errors
from minimind_jax.folders import PIPELINE, resolve_run
from minimind_jax.hub import used_commits
from minimind_jax.paths import absolute, as_path, is_remote, write_object
from minimind_jax.signals import uninterrupted
from minimind_jax.texts import is_there, read_object, read_text
from minimind_jax.training.checkpoint_files import unfit_for_checkpoints
from minimind_jax.training.places import Then, changes

PACKAGES = ("minimind-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


class RunFolder:
    """The files of one run. Nothing is created before `create`.

    Of the run that is under way, kept in environment.json:
    asked: settings that follow from the data, by dotted key, as they were asked for: mostly None. `config.yaml` has
        the values they got. content: hashes of the data files, by setting. start_models: see `training.origin`.
    """

    def __init__(self, path: str | Path):
        self.path = as_path(path)
        if is_remote(self.path) and not str(self.path).startswith("gs://"):
            raise UserError(f"{self.path}: checkpoints can be kept on a disk or in Google Cloud Storage (gs://)")
        self.config_file = self.path / "config.yaml"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.labels_file = self.path / "labels.json"
        self.model = self.path / "model"
        self.report_file = self.path / "report.md"
        self.results_file = self.path / "results.md"
        self.pictures = self.path / "pictures"  # that it shows
        self.loss_picture = self.path / "loss.png"
        self.asked: dict[str, Any] = {}
        self.content: dict[str, list[str]] = {}
        self.start_models: dict[str, str] = {}
        # One lock object a folder and process: whoever has it may take it again. It is let go with the last RunFolder.
        self._lock = None if is_remote(self.path) else FileLock(self.path / ".lock", is_singleton=True)

    def create(self) -> "RunFolder":
        """Makes the folder. Raises UserError where that is impossible, or no checkpoint could be saved."""
        if unfit := unfit_for_checkpoints(self.path):
            raise UserError(
                f"the path of the run's folder, {absolute(self.path)}, has {unfit} in it, and checkpoints cannot be "
                "saved there; rename that folder, or choose another with --run"
            )
        with disk_errors(f"cannot create the run folder {self.path}", "choose another with --run"):
            self.path.mkdir(parents=True, exist_ok=True)
        return self

    def lock(self) -> None:
        """Keeps other processes from training in this folder as long as this object lives. Raises UserError when one
        does already: two writers would mix their metrics and checkpoints. An object store has no locks; there it is up
        to the user."""
        if self._lock is None:
            return
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.path} is being trained in by another process; wait for it, stop it, or choose another run name"
            ) from None

    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints that are whole on disk, ascending."""
        if not self.checkpoints.is_dir():
            return []
        steps = [path for path in self.checkpoints.iterdir() if path.name.isdigit()]
        if is_remote(self.checkpoints):  # where a checkpoint cannot be renamed when it is whole
            steps = [path for path in steps if (path / "commit_success.txt").exists()]
        return sorted(int(path.name) for path in steps)

    def check_resume(self, resume: str) -> None:
        """Raises UserError when `resume` (auto, must, never) does not allow what is there, or no run wrote it."""
        if is_there(self.path / PIPELINE):  # as a model it would mean the pipeline's last stage
            raise UserError(f"{self.path} holds the runs of a pipeline; choose another run name")
        steps = self.checkpoint_steps()
        made_by_run = steps or self.metrics_file.is_file() or self.environment_file.is_file()
        written = (self.config_file, self.report_file, self.results_file, self.loss_picture)
        if not made_by_run and (foreign := [str(file) for file in written if file.is_file()]):
            raise UserError(
                f"{', '.join(foreign)} is not of a run (no {self.metrics_file.name} and no "
                f"{self.environment_file.name} beside it) and would be overwritten; choose another run name, or move "
                "that file"
            )
        if resume == "must" and not steps:
            raise UserError(
                f"resume=must, but {self.checkpoints} holds no checkpoint; check the run's name, or use resume=auto "
                "to start it"
            )
        if resume == "never" and steps:
            raise UserError(
                f"resume=never, but {self.path} holds checkpoints (the newest of step {steps[-1]}); choose another "
                "run name, or remove that folder"
            )

    def write_config(self, config) -> None:
        """The dataclass `config` as YAML that --config reads back."""
        write_text(self.config_file, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))

    def read_config(self) -> dict | None:
        """The settings the run was last started with; None if it never was."""
        if not is_there(self.config_file):
            return None
        mend = "put back a copy of it, or choose another run name"
        try:
            values = yaml.safe_load(read_text(self.config_file, mend))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.config_file} is not valid YAML: {' '.join(str(error).split())}; {mend}") from error
        if not isinstance(values, dict):
            raise UserError(f"{self.config_file} holds no settings; {mend}")
        return values

    def changed_settings(self, config) -> dict[str, str]:
        """`old -> new` of every dotted key that differs from the settings the run was last started with; how to resume
        it and the folder's name do not count. Empty for a run that was never started. A setting that did not exist then
        had its default, and one that is left open as it was then has the value that followed from the data. Names of
        files and folders differ when they mean others."""
        written = self.read_config()
        if written is None:
            return {}
        now = flat(plain(config))
        now |= self.settled(now)
        former = {key: default for key, (default, _) in config.FORMER.items()}  # of nobody's choice, so no change
        before = {key: value for key, value in flat(written).items() if key in now or former.get(key, now) != value}
        before = {**flat(plain(type(config)())), **before}
        changed = changes(names_of(type(config)), before, now, self.then())
        return {key: change for key, change in changed.items() if key not in ("resume", "run")}

    def then(self) -> Then | None:
        """Where the run's settings were written, as far as that is known."""
        run = (self.read_config() or {}).get("run")
        noted = self.read_environment()
        directory = noted.get("directory", "")
        if not run or is_remote(self.path) or not (directory or os.path.isabs(run)):
            return None
        directory = Path(directory or Path.cwd())
        return Then(directory, directory / resolve_run(run), absolute(self.path), noted.get("start_models", {}))

    def settled(self, asked: dict) -> dict:
        """Values that the run has, by dotted key, of the settings that followed from its data and are `asked` for (all
        settings by dotted key) as they were when it was last started; {} for a run that has not begun."""
        open_then = self.read_environment().get("asked", {})
        if not open_then or not (self.checkpoint_steps() or self.metrics_file.is_file()):
            return {}
        has_length = any(asked[key] is not None for key in RUN_LENGTHS)
        before = flat(self.read_config() or {})
        return {
            key: before[key]
            for key, value in open_then.items()
            if key in before and key in asked and asked[key] == value and not (key in RUN_LENGTHS and has_length)
        }

    def write_environment(self, facts: dict) -> None:
        """environment.json: what computes, `facts`, which are printed at the start, and what is noted of the run."""
        known = {
            "versions": package_versions(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "backend": jax.default_backend(),
            "devices": [device.device_kind for device in jax.devices()],
            "processes": jax.process_count(),
            "command": sys.argv,
            "date": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
            "directory": os.getcwd(),
            "run": plain(facts),
            "asked": self.asked,
            "content": self.content,
            "start_models": self.start_models,
            "hub": used_commits(),
        }
        write_text(self.environment_file, json.dumps(known, indent=2, ensure_ascii=False) + "\n")

    def read_environment(self) -> dict:
        mend = "remove it: it only tells what the run was started with"
        return read_object(self.environment_file, mend) if is_there(self.environment_file) else {}

    def start_hashes(self) -> dict[str, str]:
        """The `start_models` that its checkpoints were made with; {} where none is, or nothing was noted."""
        return self.read_environment().get("start_models", {}) if self.checkpoint_steps() else {}


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's numbers."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def flat(tree: dict, prefix: str = "") -> dict:
    """{dotted key: value} of nested dictionaries."""
    pairs = {}
    for key, value in tree.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return pairs


def plain(value):
    """`value` in the types of JSON and YAML: dataclasses as dicts, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, PurePath) else value


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` in one step: a reader, or a kill, sees the old file or the new one. Raises UserError
    when it cannot be written."""
    if is_remote(path):
        write_object(path, text)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(f"cannot write {path}", "free some space or choose another run"):
            # Bytes of a name that are not UTF-8, which Python keeps as halves of surrogate pairs, become \\udcff.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_figure(path: Path, figure: Any, dpi: int) -> None:
    """Replaces `path` by a PNG of a figure of matplotlib's, which no signal cuts off half way."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with uninterrupted():
        path.write_bytes(drawn.getvalue())
