"""What is in data files, told by a hash of all their bytes.

Size and time do not tell: a file copied with its times, or put back by a backup, has other bytes and both the same. A
hash is remembered with the file's size, times and inode, of which the time of change cannot be set, and made again when
one of them differs. Reading takes about a second a gigabyte, a small share of tokenising it.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

REMEMBERED = "contents.json"
SETTLED_SECONDS = 2.0  # a file changed since may change again within the clock's tick


def file_identities(files: Iterable[str | Path], root: Path) -> list[list]:
    """[path, size, hash of the bytes] of each. root: folder where hashes are remembered, if it can be written.

    Raises OSError for a file that is gone.
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
