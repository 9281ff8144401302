"""Folders on this machine's disks (pathlib) and in object stores (`gs://bucket/...`, etils.epath), told apart here.

An object store has neither rename, append nor lock. One object is replaced in one step; a folder is whole when the
object that is written last is there; a file that grows is written anew as a whole now and then.
"""

import atexit
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path, PurePath

from minimind_jax.errors import UserError, explained
from minimind_jax.shell import install_command

UPLOAD_SECONDS = 30


def as_path(name: str | os.PathLike) -> Path:
    """A pathlib.Path, or an epath.Path (the same methods) for a name such as gs://bucket/folder. Raises UserError for a
    store that is unknown or whose package is not installed."""
    text = os.fspath(name)
    if "://" not in text:
        return Path(text)
    from etils import epath  # imported here: most runs are on a disk

    try:
        path = epath.Path(text)
    except KeyError:
        raise UserError(
            f"{text}: this kind of path is not known; a folder on a disk or in Google Cloud Storage (gs://) is"
        ) from None
    _check_store("/".join(text.split("/")[:3]))
    return path


@functools.cache
def _check_store(bucket: str) -> None:
    from etils import epath

    try:
        epath.Path(bucket).exists()
    except Exception as error:
        hint = f"; gs:// needs more packages: {install_command('gcs')}" if bucket.startswith("gs://") else ""
        raise UserError(f"{bucket} cannot be used: {error}{hint}") from error


def cache_home(given: str = "") -> Path:
    """The folder for what is kept between runs: `given`, $MINIMIND_CACHE or ~/.cache/minimind_jax. Raises UserError
    where that is below a home folder and none is known."""
    given = given or os.environ.get("MINIMIND_CACHE", "")
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "minimind_jax"
    except RuntimeError:
        raise UserError("your home folder is not known (HOME is not set); set MINIMIND_CACHE to a folder") from None


def is_remote(path: PurePath) -> bool:
    """Whether a path of `as_path` is in an object store."""
    return "://" in os.fspath(path)


def absolute(path: PurePath) -> Path:
    """The path from the root on, links followed; paths in object stores are."""
    return path if is_remote(path) else Path(path).resolve()


@functools.cache
def local_folder(folder: Path) -> Path:
    """`folder`, or for one in an object store a copy of its files that lives as long as this process."""
    if not is_remote(folder):
        return folder
    copy = Path(tempfile.mkdtemp(prefix=f"minimind-{folder.name}-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    with explained(f"{folder} could not be read", Exception):
        for file in folder.iterdir():
            if file.is_file():
                file.copy(copy / file.name)
    return copy


def upload_folder(source: Path, folder: Path, last: str, stale: Sequence[Path]) -> None:
    """Puts the files of `source` into `folder`, in an object store, and takes `stale` away from there.

    last: the file without which the folder is not whole: it is removed first and written last.
    Raises UserError.
    """
    from etils import epath

    names = sorted((file.name for file in source.iterdir()), key=lambda name: (name == last, name))
    with explained(f"{folder} could not be written", Exception):  # every store has errors of its own
        (folder / last).unlink(missing_ok=True)
        for file in stale:
            file.unlink()
        for name in names:
            epath.Path(source / name).copy(folder / name, overwrite=True)
    local_folder.cache_clear()


def write_object(path: Path, text: str) -> None:
    """Replaces an object in one step. Raises UserError when it cannot be written."""
    with explained(f"cannot write {path}", Exception):
        path.write_text(text)


class GrowingObject:
    """A text in an object store that grows: the whole of it is written anew, at most every UPLOAD_SECONDS, and by
    `flush` and `close`."""

    def __init__(self, path: Path, text: str):
        self._path, self._parts = path, [text]
        self._uploaded, self._uploaded_at = 1, time.monotonic()

    def write(self, text: str) -> None:
        self._parts.append(text)
        if time.monotonic() - self._uploaded_at > UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._uploaded == len(self._parts):
            return
        write_object(self._path, "".join(self._parts))
        self._uploaded, self._uploaded_at = len(self._parts), time.monotonic()

    close = flush
