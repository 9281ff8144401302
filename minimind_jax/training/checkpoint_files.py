"""The files of a checkpoint: the path by which Orbax finds them, their checksums, and taking a checkpoint away."""

import contextlib
import glob
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath

from etils import epath

from minimind_jax.paths import absolute, is_remote

CHECKSUMS = "checksums.json"
_BLOCK = 1 << 22


class LiteralPath(type(epath.Path())):
    """A path on a disk whose `glob` takes only its argument for a pattern, not the folders above: Orbax looks for its
    files with it, and finds none below a folder such as `exp[lr=3e-3]` otherwise."""

    def glob(self, pattern: str) -> Iterator["LiteralPath"]:
        return (self / name for name in glob.glob(pattern, root_dir=os.fspath(self)))


def orbax_path(folder: PurePath) -> Path:
    """The path to give to Orbax for `folder`."""
    return folder if is_remote(folder) else LiteralPath(absolute(folder))


def unfit_for_checkpoints(folder: PurePath) -> str:
    """What in the folder's path TensorStore cannot write, so that a run there could not save; "" if nothing is."""
    if is_remote(folder):
        return ""
    text = str(absolute(folder))
    if any("\udc80" <= letter <= "\udcff" for letter in text):
        return "bytes that are not UTF-8"
    return "a backslash" if "\\" in text and os.sep == "/" else ""


def write_checksums(checkpoint: Path) -> None:
    """Writes the size and CRC-32 of every file of a checkpoint that is whole into its CHECKSUMS."""
    sums = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in _checksums(checkpoint).items()}
    whole = checkpoint / CHECKSUMS
    # A store shows a file when it is whole; on a disk half of one would pass for damage.
    part = whole if is_remote(checkpoint) else checkpoint / f"{CHECKSUMS}.part"
    part.write_text(json.dumps({"files": sums}, indent=1) + "\n", encoding="utf-8")
    if part != whole:
        part.replace(whole)


def damage(checkpoint: Path) -> str | None:
    """What differs between a checkpoint's files and its checksums; "" if nothing does, None if it has no checksums."""
    try:
        if not (checkpoint / CHECKSUMS).exists():
            return None
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in expected.items()}
        found = _checksums(checkpoint)
    except OSError as error:  # of a failing disk, a broken link, or rights
        return f"{error.filename or 'a file of it'}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {CHECKSUMS} is damaged ({type(error).__name__})"
    for name, (size, crc) in expected.items():
        if name not in found:
            return f"its file {name} is missing"
        if found[name][0] != size:
            return f"its file {name} has {found[name][0]} bytes in place of {size}"
        if found[name][1] != crc:
            return f"the bytes of its file {name} have changed since they were written"
    return ""


def remove(checkpoint: Path) -> None:
    """Takes a checkpoint away, in one step for whoever lists the folder: a kill leaves no half of one."""
    if is_remote(checkpoint):
        (checkpoint / "commit_success.txt").unlink(missing_ok=True)
        checkpoint.rmtree()
        return
    # A name that Orbax takes for a save that was cut off, and removes at the next start.
    leaving = checkpoint.with_name(f"{checkpoint.name}.orbax-checkpoint-tmp-old")
    with contextlib.suppress(FileNotFoundError):  # somebody took it away himself, to make room
        checkpoint.rename(leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _checksums(folder: Path, prefix: str = "") -> dict[str, tuple[int, str]]:
    """{path below the folder: (bytes, CRC-32)} of all files but CHECKSUMS, also half written."""
    sums: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            sums |= _checksums(path, f"{prefix}{path.name}/")
        elif not (prefix + path.name).startswith(CHECKSUMS):
            sums[prefix + path.name] = _checksum(path)
    return sums


def _checksum(file: Path) -> tuple[int, str]:
    size = crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, f"{crc:08x}"
