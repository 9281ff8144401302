"""Records from files: JSON lines (plain, gzip, zstd) and Parquet, each with the place it came from."""

import dataclasses
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
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

    Raises UserError for a path that does not exist, a glob or folder that holds none, and an unknown file type.
    """
    files: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not found:
                raise UserError(f"{given}: no data in this folder; expected files ending in {', '.join(SUFFIXES)}")
            files += found
        elif path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"{given}: unknown file type; expected a name ending in {', '.join(SUFFIXES)}")
            files.append(path)
        elif glob.has_magic(str(given)):
            found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.name.endswith(SUFFIXES))
            if not found:
                raise UserError(f"{given}: no file matches; expected files ending in {', '.join(SUFFIXES)}")
            files += found
        else:
            raise UserError(f"{given}: no such file (looked in {Path.cwd()}); check the name")
    return files


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
    """(line number from 1, line) of one file without its blank lines; the row as a dict for Parquet."""
    if file.name.endswith(".parquet"):
        yield from enumerate(_parquet_rows(file), start=1)
        return
    line = 0
    try:
        with _open(file) as stream:
            for line, raw in enumerate(stream, start=1):
                if line == 1:
                    raw = raw.removeprefix(_BOM)
                if raw.strip():
                    yield line, raw
    except (EOFError, OSError, zlib.error, *_zstd_errors()) as error:
        raise UserError(f"{file}:{line + 1}: cannot be read: {error}") from error


def parse_line(raw: bytes | dict[str, Any], file: Path, line: int) -> Record:
    """A line as `iter_lines` gives it -> Record. Raises UserError if it is not UTF-8, not JSON or not an object."""
    where = f"{file}:{line}"
    if isinstance(raw, dict):
        return Record(where, file, line, raw)
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object a line"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise UserError(f"{where}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f'{where}: a JSON {type(value).__name__}; expected an object, as in {{"text": ...}}')
    return Record(where, file, line, value)


def _open(file: Path) -> io.BufferedIOBase:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.endswith(".zst"):
        return io.BufferedReader(
            _zstandard(file).ZstdDecompressor().stream_reader(open(file, "rb"), read_across_frames=True)
        )
    return open(file, "rb")


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


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: reading .parquet needs pyarrow: pip install 'minimind-jax[formats]'") from error
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable Parquet file: {error}") from error
