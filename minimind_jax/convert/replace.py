"""Writing a model's folder: it appears, or replaces an older one, in one step when it is complete."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minimind_jax.errors import UserError
from minimind_jax.folders import ADAPTER_CONFIG, holds_model
from minimind_jax.paths import is_remote, upload_folder


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end, or vanishes if the body fails."""
    if is_remote(folder):
        with _uploading(folder) as partial:
            yield partial
        return
    folder = folder.resolve()  # through a link, and with a name of its own if it was given as "."
    if folder.exists() and not (folder.is_dir() and (holds_model(folder) or not any(folder.iterdir()))):
        raise UserError(f"{folder} exists and is not a model folder (no config.json); choose another output")
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():  # a kill between the two renames below
            old.rename(folder)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _flush_to_disk(file)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = "; the older model there is unchanged" if folder.exists() else ""
        raise UserError(f"{folder}: the model could not be written: {reason}{kept}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _uploading(folder: Path) -> Iterator[Path]:
    """An empty folder on this machine whose files replace those of `folder`, in an object store, at the end."""
    if folder.is_dir() and not holds_model(folder) and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not a model folder (no config.json); choose another output")
    try:
        with tempfile.TemporaryDirectory(prefix="minimind-") as partial:
            yield Path(partial)
            upload_folder(Path(partial), folder, last=_last_file(Path(partial)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error


def _last_file(partial: Path) -> str:
    """The file that makes a folder a model."""
    return ADAPTER_CONFIG if (partial / ADAPTER_CONFIG).exists() else "config.json"


def _flush_to_disk(file: Path):
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError, which names the file, for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
