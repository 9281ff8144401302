"""Writing a model into a folder: it takes an older one's place when it is complete; what is no model's stays."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from minimind_jax.data.tokenizer import TOKENIZER_FILES
from minimind_jax.errors import UserError, explained
from minimind_jax.folders import ADAPTER_CONFIG, holds_model
from minimind_jax.paths import is_remote, upload_folder
from minimind_jax.signals import telling, uninterrupted
from minimind_jax.texts import listed, read_object, read_text

MARKS = ("config.json", ADAPTER_CONFIG)  # each makes a folder a model's; removed first and written last
_TEMPLATES = "additional_chat_templates"
_PART = r"(-\d+-of-\d+)?"
# What a model's folder holds, of those written here and those of transformers and peft.
_OURS = re.compile(
    rf"model{_PART}\.safetensors|pytorch_model{_PART}\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|adapter_model\.(safetensors|bin)|tokenizer\.model|chat_template\.json"
    r"|(generation_|processor_|preprocessor_)config\.json"
)
# Keys of which every model's configuration has one.
_MODEL_KEYS = {"model_type", "architectures", "transformers_version", "hidden_size", "peft_type"}
_BESIDE = re.compile(r"\..*|(readme|licen[sc]e|notice)(\..*)?", re.IGNORECASE)  # what a new repository begins with
_STAGED = ".minimind-new"


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder whose files take the place of the model in `folder` at the end, or vanish if the body fails.

    An older model's files that the new one has not are removed; what else is there stays. The files are written into a
    folder inside and then moved, those in MARKS last, so a kill leaves the older model, the new one, or no model.
    Raises UserError when they cannot be written, or `check_replaceable` refuses the folder.
    """
    write = _uploading(folder) if is_remote(folder) else _replacing(folder.resolve())  # through a link
    with telling(lambda: f"{folder}: no model was written{_kept(folder)}; give the command again"), write as staged:
        yield staged


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    check_replaceable(folder)
    staged, is_new = folder / _STAGED, not folder.exists()
    try:
        try:
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            yield staged
            _seal(staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        with uninterrupted():
            _move_into_place(staged, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: the model could not be written: {reason}{_kept(folder)}") from error


def _kept(folder: Path) -> str:
    return "; the older model there is unchanged" if holds_model(folder) else ""


def check_replaceable(folder: Path) -> None:
    """Raises UserError, with a list, unless a model can be written into a folder and nothing of others is lost: there
    must be an older model, or as good as nothing, and no weights that would be taken for the new model's."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the output must be a folder")
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [entry.name for entry in entries]
    if not any(mark in names for mark in MARKS) and _STAGED not in names:  # that is what a kill leaves
        if others := [name for name in names if not _BESIDE.fullmatch(name)]:
            raise UserError(
                f"{folder} exists and is not a model folder (no config.json): it holds {listed(others)}; choose "
                "another output"
            )
    for mark in MARKS:
        if mark in names and not _is_of_model(folder / mark):
            raise UserError(
                f"{folder / mark} is not a model's (none of {', '.join(sorted(_MODEL_KEYS))} in it) and would be "
                "written over; move that file, or choose another output"
            )
    is_told = _is_told_as_model(folder, names)
    words = [] if is_told else [name for name in names if name in TOKENIZER_FILES]
    locked = [entry.name for entry in entries if _is_ours(entry.name) and _is_locked(entry)]
    unclear = [entry.name for entry in entries if _is_unclear(entry)]
    for found, why in (
        (words, "but no weights, and config.json is empty: they may be an older model's, and would go; move them"),
        (locked, "which may not be written over (read-only); make it writable (chmod u+w)"),
        (unclear, "which programs would take for weights of the new model, or its files for theirs; move them"),
    ):
        if found:
            raise UserError(f"{folder} holds {listed(found)}, {why}, or choose another output")


def _is_ours(name: str) -> bool:
    return name in MARKS or name in TOKENIZER_FILES or _OURS.fullmatch(name) is not None


def _is_unclear(entry: Path) -> bool:
    """Whether something is neither a file of a model as they are written here nor clearly something else."""
    if _is_ours(entry.name):
        return entry.is_dir()
    return entry.suffix in (".safetensors", ".bin") and entry.name != "training_args.bin"


def _is_told_as_model(folder: Path, names: Collection[str]) -> bool:
    """Whether anything in a folder with one of MARKS tells that its files are a model's."""
    if _STAGED in names or any(name.endswith((".safetensors", ".bin")) for name in names):
        return True
    marks = [mark for mark in MARKS if mark in names]
    return not marks or any(_values(folder / mark) for mark in marks)


def _is_of_model(config: Path) -> bool:
    """Whether a file that has the name of a model's configuration is one, or empty."""
    values = _values(config)
    return values is not None and (not values or bool(values.keys() & _MODEL_KEYS))


def _values(config: Path) -> dict[str, Any] | None:
    """What a configuration holds, {} for an empty file; None if it is none."""
    try:
        return read_object(config) if read_text(config).strip() else {}
    except UserError:
        return None


def _is_locked(entry: Path) -> bool:
    """Whether somebody took the right to write into a file away; putting another in its place needs no such right."""
    return not is_remote(entry) and entry.is_file() and not entry.is_symlink() and not entry.stat().st_mode & 0o222


def _seal(staged: Path) -> None:
    """Gives the files, which some libraries write for their owner only, the usual mode, and waits for the disk."""
    mode = (staged / _mark_in(staged)).stat().st_mode
    for file in staged.iterdir():
        if file.stat().st_mode != mode:  # some file systems have one mode for all files and refuse to set any
            file.chmod(mode)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _move_into_place(staged: Path, folder: Path) -> None:
    for mark in MARKS:
        (folder / mark).unlink(missing_ok=True)
    files = sorted(staged.iterdir(), key=lambda file: file.name in MARKS)
    for stale in _stale(folder, {file.name for file in files}):
        stale.unlink()
    with contextlib.suppress(OSError):  # it is not there, or others' files are in it
        (folder / _TEMPLATES).rmdir()
    for file in files:
        os.replace(file, folder / file.name)
    staged.rmdir()


def _stale(folder: Path, new: Collection[str]) -> list[Path]:
    """The files of an older model that the new one has not, what makes it a model first."""
    if not folder.is_dir():
        return []
    found = [entry for entry in folder.iterdir() if _is_ours(entry.name) and entry.name not in new]
    if (folder / _TEMPLATES).is_dir():
        found += [entry for entry in (folder / _TEMPLATES).iterdir() if entry.suffix == ".jinja"]
    return sorted(found, key=lambda entry: entry.name not in MARKS)


@contextlib.contextmanager
def _uploading(folder: Path) -> Iterator[Path]:
    """An empty folder on this machine whose files take the place of the model in `folder`, in an object store."""
    check_replaceable(folder)
    with (
        explained(f"{folder}: the model could not be written", OSError, SafetensorError),
        tempfile.TemporaryDirectory(prefix="minimind-") as name,
    ):
        staged = Path(name)
        yield staged
        stale = _stale(folder, {file.name for file in staged.iterdir()})
        upload_folder(staged, folder, last=_mark_in(staged), stale=stale)


def _mark_in(staged: Path) -> str:
    """The file that makes a folder a model's."""
    return next(mark for mark in reversed(MARKS) if (staged / mark).exists())
