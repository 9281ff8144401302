"""Files as they are written: where they can go, in an older one's place when they are whole; records as lines."""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError
from minimind_jax.signals import telling, uninterrupted

TABLES = {".csv": ",", ".tsv": "\t"}  # the separator of files whose names end so
NOT_WRITTEN = (".parquet", ".arrow", ".xlsx", ".xls", ".gz", ".zst")  # names that promise a form which is not written


def check_output(
    output: Path,
    inputs: Iterable[Path],
    tables: bool = False,
    complete: str | None = "; remove it, or choose another name",
) -> None:
    """Raises UserError, before any work, for an output that could not be written at its end, that is there already, or
    whose name promises another form than JSON lines (or, with `tables`, than those and TABLES).

    complete: what is said of one that is there; None writes over it.
    """
    ending = output.suffix.lower()
    if ending in NOT_WRITTEN or (ending in TABLES and not tables):
        forms = f".jsonl{' (or .csv, .tsv for a table)' if tables else ''}"
        raise UserError(f"output {output}: JSON lines are written; choose a name that ends in {forms}")
    if not output.parent.is_dir():
        raise UserError(f"output {output}: there is no folder {output.parent}; create it first")
    if output.is_dir():
        raise UserError(f"output {output} is a folder; give the name of a file")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"output {output}: nothing can be written into {output.parent}; choose another place")
    if output.resolve() in [file.resolve() for file in inputs]:
        raise UserError(f"output {output} is one of the files of input; choose another place")
    if complete is not None and output.exists():
        raise UserError(f"output {output} is there already{complete}")


@contextlib.contextmanager
def replacing_files(*files: Path) -> Iterator[list[Path]]:
    """Names to write to, beside `files`, whose places they take at the end, in that order, or vanish if the body fails.
    Raises UserError when they cannot be written."""
    partial = [file.with_name(f".{file.name}.partial") for file in files]
    kept = "; the older one there is unchanged" if files[0].exists() else ""
    try:
        with telling(lambda: f"{files[0]} was not written{kept}; give the command again"):
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            for file in partial:
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            with uninterrupted():
                for written, file in zip(partial, files, strict=True):
                    os.replace(written, file)
    except OSError as error:
        reason = error.strerror or f"{error} (is the disk full?)"  # NumPy counts what it could write
        raise UserError(f"{files[0]}: could not be written: {reason}{kept}") from error
    finally:
        for file in partial:
            with contextlib.suppress(OSError):  # its folder is a file: the user has been told
                file.unlink(missing_ok=True)


def table_line(columns: Iterable[str], separator: str) -> Callable[[dict[str, Any]], str]:
    """What makes a line of a table with these columns of a record; the first has the header above it.

    Lists and objects stand as JSON in their cells, None as an empty one.
    """
    columns, begun = list(columns), []

    def cell(value: Any) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return ""
        text = json_line(value) if isinstance(value, list | dict | bool | int | float) else str(value)
        return text.encode(errors="backslashreplace").decode()

    def row(cells: list[str]) -> str:
        text = io.StringIO()
        csv.writer(text, delimiter=separator, lineterminator="\r\n").writerow(cells)  # a cell with either is quoted
        return text.getvalue().removesuffix("\r\n")

    def line(record: dict[str, Any]) -> str:
        lines = [] if begun else [row(columns)]
        begun.append(True)
        return "\n".join([*lines, row([cell(record.get(name)) for name in columns])])

    return line


def json_line(value: dict[str, Any]) -> str:
    """`value` as one line of JSON that every reader takes: dates and bytes (of Parquet) as text, NaN as null, half a
    surrogate pair escaped."""
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        without_nan = json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)
        line = json.dumps(without_nan, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line))
    return line
