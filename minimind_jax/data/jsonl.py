"""Records from files: JSON lines (plain, gzip, zstd), CSV and Parquet, each with the place it came from."""

import csv
import dataclasses
import glob
import gzip
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".parquet")
MAX_LINE = 1 << 28  # bytes; more is no record but a file without line ends, and would fill the memory
_EXTRA, _MISSING = "\0more columns", "\0no column"  # marks of a row of CSV that does not fit its header
csv.field_size_limit(MAX_LINE)
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Record:
    """One JSON object. line counts from 1 (in Parquet: the row); where is `file:line`, as error messages name it."""

    where: str
    file: Path
    line: int
    value: dict[str, Any]


def expand_paths(paths: Iterable[str | Path]) -> list[Path]:
    """The files that files, folders (searched to the bottom) and globs stand for, each group in sorted order.

    Folders are searched through links too; names that begin with a dot are left out. Raises UserError for a path that
    does not exist or cannot be read, a glob or folder that holds none, and an unknown file type.
    """
    files: list[Path] = []
    for given in paths:
        try:
            files += _expand(given)
        except (OSError, RuntimeError) as error:  # a name too long, a folder that is closed to us, ~nobody
            raise UserError(f"{given}: cannot be read: {error}") from error
    return files


def _expand(given: str | Path) -> list[Path]:
    if not str(given):  # Path("") is the current folder
        raise UserError("the name of a data file is empty; give a file, a folder or a glob")
    path = Path(given).expanduser()
    if path.is_dir():
        found = _files_below(path)
        if not found:
            raise UserError(f"{given}: no data in this folder; expected files ending in {', '.join(SUFFIXES)}")
    elif path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{given}: unknown file type; expected a name ending in {', '.join(SUFFIXES)}")
        return [path]
    elif path.exists():
        raise UserError(f"{given}: neither a file nor a folder (data is read more than once, so a pipe will not do)")
    elif glob.has_magic(str(given)):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"{given}: no file matches; expected files ending in {', '.join(SUFFIXES)}")
    else:
        raise UserError(f"{given}: no such file (looked in {Path.cwd()}); check the name")
    for file in found:
        if not file.is_file():
            raise UserError(f"{file}: a link that leads nowhere, or no file; remove it, or name the files you mean")
    return found


def _files_below(folder: Path) -> list[Path]:
    """Raises OSError for a folder that cannot be read, which Path.rglob passes over without a word."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(root) in seen:  # a link to where we have been
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        found += [Path(root, name) for name in names if name.endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def iter_records(paths: Iterable[str | Path], on_bad: Callable[[UserError], None] | None = None) -> Iterator[Record]:
    """The records of all files in order. Blank lines are passed over; a byte order mark is tolerated.

    on_bad: called with the error of a broken line, which is then skipped; without it the error is raised.
    Raises UserError with file and line for a line that is no JSON object, and for a file without records.
    """
    for file in expand_paths(paths):
        empty = True
        for line, raw in iter_lines(file):
            empty = False
            try:
                yield parse_line(raw, file, line)
            except UserError as error:
                if on_bad is None:
                    raise
                on_bad(error)
        if empty:
            raise UserError(f"{file}: the file is empty; expected one JSON object a line")


def iter_lines(file: Path) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """(line number from 1, line) of one file without its blank lines; the row as a dict for CSV and Parquet."""
    if file.name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(file), start=1)
        return
    if file.name.endswith(".csv"):
        yield from _csv_rows(file)
        return
    line = 0
    try:
        with _open(file) as stream:
            while raw := stream.readline(MAX_LINE + 1):
                line += 1
                if len(raw) > MAX_LINE:
                    raise UserError(f"{file}:{line}: longer than {MAX_LINE:,} bytes; expected one JSON object a line")
                raw = raw.removeprefix(_BOM)  # in any line: files with the mark are joined end to end
                if raw.strip():
                    yield line, raw
    except (EOFError, OSError, zlib.error, *_zstd_errors()) as error:
        raise UserError(f"{file}:{line + 1}: cannot be read: {error}") from error


def parse_line(raw: bytes | dict[str, Any], file: Path, line: int) -> Record:
    """A line as `iter_lines` gives it -> Record. Raises UserError if it is not UTF-8, not JSON or not an object."""
    where = f"{file}:{line}"
    if isinstance(raw, dict):
        if _EXTRA in raw or _MISSING in raw.values():
            raise UserError(
                f"{where}: {'more' if _EXTRA in raw else 'fewer'} columns than the header has; text with commas or "
                "line ends stands in double quotes"
            )
        return Record(where, file, line, raw)
    try:
        value = _RECORDS.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "; the NUL bytes look like UTF-16, save the file as UTF-8" if b"\0" in raw else ""
        raise UserError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object a line{hint}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # NaN, a number too large, a field given twice
        raise UserError(f"{where}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f'{where}: a JSON {type(value).__name__}; expected an object, as in {{"text": ...}}')
    return Record(where, file, line, value)


def decode_json(text: str) -> Any:
    """`json.loads` without the values Python adds to JSON: NaN and Infinity, which would be rendered as such.

    Raises ValueError.
    """
    return _STRICT.decode(text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _each_once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(fields)
    if len(value) < len(fields):
        names = [name for name, _ in fields]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the field {twice[:40]!r} twice")
    return value


_STRICT = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite)
_RECORDS = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_each_once)


def _open(file: Path) -> io.BufferedIOBase:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(file))
    return open(file, "rb")


class _ZstdFile(io.RawIOBase):
    """The frames of a .zst file, one after another. zstandard's own reader takes half a frame for the end of the file.

    Raises EOFError there.
    """

    def __init__(self, file: Path):
        self._decompressor = _zstandard(file).ZstdDecompressor()
        self._file = open(file, "rb")
        self._frame, self._compressed, self._ready = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 14)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a compressed frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready, self._compressed = self._frame.decompress(self._compressed), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstandard(file: Path):
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{file}: reading .zst needs zstandard: pip install 'minimind-jax[formats]'") from error
    return zstandard


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows under the header, each with the number of its last line."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restkey=_EXTRA, restval=_MISSING, strict=True)
            twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
            if twice:
                raise UserError(f"{file}:1: the header has the column {twice[0][:40]!r} twice; rename one")
            for row in reader:
                yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file}: not a readable CSV file in UTF-8: {error}") from error


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading .parquet needs pyarrow: pip install 'minimind-jax[formats]'") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from error
