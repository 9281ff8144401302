"""Caches of tokens and features on this machine: which there are, which are useless, and removing them while runs go on
(`minimind data cache`).

An open cache holds a shared lock on its info.json, and whoever makes one holds KEY.lock, so that nothing is removed
that a process maps or writes. The time of change of info.json is that of the last use.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import filelock
from rich.filesize import decimal

from minimind_jax.config.sections import FilesConfig
from minimind_jax.config.tools import CacheConfig
from minimind_jax.data.formats import VERSION as FORMATS_VERSION
from minimind_jax.data.kinds import KINDS
from minimind_jax.data.template import rendering_fingerprint
from minimind_jax.errors import UserError
from minimind_jax.paths import cache_home
from minimind_jax.texts import listed

try:
    import fcntl
except ImportError:  # Windows, which keeps a file that is mapped from being removed
    fcntl = None

FORMAT_VERSION = 1  # of the files of a cache, and of what `documents.py` puts into them
DAY = 24 * 60 * 60  # seconds
_NAME = re.compile(r"\.?(?P<key>[0-9a-f]{32})(\.\d+\.tmp)?")  # a cache, or what is left of one that was cut off


@dataclasses.dataclass(frozen=True)
class StoredCache:
    """A cache on disk."""

    folder: Path
    files: tuple[str, ...]  # paths of the data it was made from
    kind: str  # of `kinds.KINDS`, features, unfinished (being made, or left by a killed process) or damaged
    size: int  # in bytes
    last_used: float  # seconds since 1970
    stale: bool  # no run can use it again

    @property
    def key(self) -> str:
        return _NAME.fullmatch(self.folder.name)["key"]


def cache_root(data: FilesConfig) -> Path:
    return cache_home(data.cache_dir) / "tokens"


def lock_file(folder: Path) -> Path:
    """The file that whoever makes or removes this cache holds locked."""
    return folder.with_name(f"{_NAME.fullmatch(folder.name)['key']}.lock")


def stored_caches(root: Path) -> list[StoredCache]:
    """All caches of a folder, the last used first."""
    found = []
    for folder in root.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process removes or renames it
            if folder.is_dir() and _NAME.fullmatch(folder.name):
                found.append(_look_at(folder))
    return sorted(found, key=lambda cache: -cache.last_used)


def _look_at(folder: Path) -> StoredCache:
    size = sum(file.stat().st_size for file in folder.iterdir())
    if folder.name.startswith("."):
        return StoredCache(folder, (), "unfinished", size, folder.stat().st_mtime, stale=True)
    info_file = folder / "info.json"
    try:
        info = json.loads(info_file.read_text(encoding="utf-8"))
        files = tuple(path for path, *_ in info["source"]["files"])
        is_stale = _is_stale(info["source"], folder.parent)
        return StoredCache(folder, files, info["kind"], size, info_file.stat().st_mtime, is_stale)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return StoredCache(folder, (), "damaged", size, folder.stat().st_mtime, stale=True)


def _is_stale(source: dict[str, Any], root: Path) -> bool:
    """Whether a file is not what it was, or this version of the program would make something else of it."""
    try:
        same_files = file_identities((path for path, *_ in source["files"]), root) == source["files"]
    except OSError:  # gone, or on a disk that is away; without its files a cache is not found either
        same_files = False
    return (
        not same_files
        or (source["format"], source.get("formats")) != (FORMAT_VERSION, FORMATS_VERSION)
        or source.get("rendering") != rendering(source["kind"])
    )


def rendering(kind: str) -> str | None:
    """What the documents of a cache depend on beyond data, tokenizer and settings."""
    return rendering_fingerprint() if kind in KINDS and KINDS[kind].rendered else None


def open_in_use(path: Path) -> BinaryIO:
    """Opens info.json, notes the time, and keeps the cache from being removed until the file is closed."""
    file = open(path, "rb")
    with contextlib.suppress(OSError):  # not ours to write
        os.utime(path)
    with contextlib.suppress(OSError):  # a file system without locks
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_SH)
    return file


def is_in_use(cache: StoredCache) -> bool:
    """Whether a process has it open or is making it."""
    try:
        with _reserved(cache.folder):
            return False
    except (filelock.Timeout, BlockingIOError):
        return True
    except OSError:  # not ours to write, so not ours to lock
        return False


def remove_cache(cache: StoredCache) -> bool:
    """Removes a cache unless it is in use; whether it is gone. Raises UserError if it cannot be removed."""
    try:
        with _reserved(cache.folder):
            doomed = cache.folder.with_name(f".{cache.key}.{os.getpid()}.tmp")  # so that half of it is never opened
            cache.folder.rename(doomed)
            shutil.rmtree(doomed)
    except (filelock.Timeout, BlockingIOError):
        return False
    except FileNotFoundError:  # somebody else has removed it meanwhile
        return True
    except OSError as error:
        raise UserError(f"{cache.folder}: cannot be removed: {error}") from error
    return True


@contextlib.contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    """Keeps others from opening or making this cache. Raises Timeout or BlockingIOError if one does already."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(filelock.FileLock(lock_file(folder), timeout=0))
        if fcntl and (folder / "info.json").exists():
            info = stack.enter_context(open(folder / "info.json", "r+b"))  # NFS locks only what is open for writing
            fcntl.flock(info, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


# The command


def run(config: CacheConfig) -> list[StoredCache]:
    """Lists or removes the caches that `config` means; none is removed that a process has open.

    Returns what is left, or was listed. Raises UserError for a cache that cannot be removed.
    """
    root = cache_root(FilesConfig(cache_dir=config.cache_dir))
    asked = [cache for cache in stored_caches(root) if time.time() - cache.last_used >= config.days * DAY]
    if config.clear:
        unwanted = [cache for cache in asked if cache.stale or config.clear == "all"]
        removed = [cache for cache in unwanted if remove_cache(cache)]
        kept = [cache for cache in unwanted if cache not in removed]
        print(f"removed {_amount(removed)}" + (f"; kept {_amount(kept)}, in use" if kept else ""))
        return stored_caches(root)
    print(f"{root}: {_amount(asked)}")
    for cache in asked:
        print(_line(cache))
        if cache.files:
            print(f"          {listed(cache.files, 3)}")
    return asked


def _line(cache: StoredCache) -> str:
    age = int((time.time() - cache.last_used) / DAY)
    used = "used today" if age < 1 else f"used {age:,} day{'s' * (age > 1)} ago"
    state = "in use" if is_in_use(cache) else "stale" if cache.stale else ""
    return f"{cache.key[:8]}  {cache.kind:<12}  {decimal(cache.size):>9}  {used}  {state}".rstrip()


def _amount(caches: list[StoredCache]) -> str:
    noun = "cache" if len(caches) == 1 else "caches"
    return f"{len(caches):,} {noun}, {decimal(sum(cache.size for cache in caches))}"


# What is in data files. Size and time do not tell: a file copied with its times, or put back by a backup, has other
# bytes and both the same. Reading takes about a second a gigabyte, a small share of tokenising it.

REMEMBERED = "contents.json"
SETTLED_SECONDS = 2.0  # a file changed since may change again within the clock's tick


def file_identities(files: Iterable[str | Path], root: Path) -> list[list]:
    """[path, size, hash of the bytes] of each. root: folder where hashes are remembered, if it can be written.

    A hash is remembered with the file's size, times and inode, of which the time of change cannot be set, and made anew
    when one of them differs. Raises OSError for a file that is gone.
    """
    known = _remembered(root)
    found, new = [], {}
    for file in files:
        path = str(Path(file).resolve())
        stat = os.stat(path)
        marks = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        *before, content = known.get(path, [None])
        if before != marks:
            content = _hash(path)
            if time.time() - stat.st_ctime > SETTLED_SECONDS:
                new[path] = [*marks, content]
        found.append([path, stat.st_size, content])
    if new:
        _remember(root, new)
    return found


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _remembered(root: Path) -> dict[str, list]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((root / REMEMBERED).read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _remember(root: Path, new: dict[str, list]) -> None:
    """Adds to what is remembered. Of two processes at once one may lose its additions, which costs a reading."""
    temporary = root / f".{REMEMBERED}.{os.getpid()}"
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_remembered(root), **new}), "utf-8")
        os.replace(temporary, root / REMEMBERED)
