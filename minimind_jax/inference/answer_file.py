"""Files of answers, written line by line; one that a killed command goes on with."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from minimind_jax.errors import UserError
from minimind_jax.signals import telling

AGAIN = "--resume never begins anew"
TABLES = {".csv": ",", ".tsv": "\t"}  # the separator of files whose names end so
NOT_WRITTEN = (".parquet", ".gz", ".zst")  # names that promise a form which is not written


class PartialFile:
    """Lines on their way to `output`, in OUTPUT.partial until all are there, by one process at a time.

    line: how an answer is written, without the end of the line.
    """

    _advice = "make room and give the same command again"
    _again = "the same command begins anew and writes over it"

    def __init__(self, output: Path, line: Callable[[dict[str, Any]], str] | None = None):
        """Raises UserError if nothing can be written there."""
        self._output, self._line = output, line or json_line
        self._partial = output.with_name(output.name + ".partial")
        self._lock = FileLock(output.with_name(output.name + ".partial.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self._partial} is being written by another process; wait for it, or stop it") from None
        except OSError as error:
            raise UserError(f"output {output}: cannot write: {error.strerror}; choose another place") from error
        try:
            self._file = self._open()
        except OSError as error:
            self._unlock()
            raise UserError(f"output {output}: cannot write: {error.strerror}; choose another place") from error
        except UserError:
            self._unlock()
            raise

    def __enter__(self):
        self._telling = telling(self._what_is_left, of=(BaseException,))
        self._telling.__enter__()
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told by `write`
            self._file.close()
        self._leave()
        self._unlock()
        self._telling.__exit__(*error)

    def _what_is_left(self) -> str:
        return f"what was answered is in {self._partial}; {self._again}" if self._partial.exists() else ""

    def write(self, answer: dict[str, Any]) -> None:
        try:
            self._file.write(self._line(answer).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._partial}: cannot write: {error.strerror}; {self._advice}") from error

    def finish(self) -> None:
        """Gives the file its name."""
        self._file.close()
        os.replace(self._partial, self._output)

    def _open(self) -> BinaryIO:
        return self._partial.open("wb")

    def _leave(self) -> None:
        """Takes away what is of no use."""
        if self._partial.is_file() and not self._partial.stat().st_size:
            self._partial.unlink()

    def _unlock(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


class AnswerFile(PartialFile):
    """A partial file that can be gone on with; what made it is in OUTPUT.partial.settings.

    earlier: the lines that an earlier call has written, when they were made with the same settings; a line that was
        not finished is cut off.
    """

    _advice = f"{PartialFile._advice}, which goes on from here"
    _again = "the same command goes on from there"

    def __init__(self, output: Path, settings: dict[str, Any], resume: bool):
        """Raises UserError if nothing can be written there, or if the earlier lines were made with other settings."""
        self.earlier: list[dict[str, Any]] = []
        self._settings = output.with_name(output.name + ".partial.settings")
        self._made_with, self._resume = settings, resume
        super().__init__(output)

    def _leave(self) -> None:
        super()._leave()
        if not self._partial.exists():
            self._settings.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        if self._resume and self._partial.exists() and self._partial.stat().st_size:
            self._check(self._made_with)
            self._read()
        self._settings.write_text(json.dumps(self._made_with, ensure_ascii=False, indent=1), "utf-8")
        return self._partial.open("ab" if self.earlier else "wb")

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            earlier = json.loads(self._settings.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            earlier = None
        if not isinstance(earlier, dict):
            raise UserError(f"{self._partial} is there without {self._settings.name}, which says what made it; {AGAIN}")
        for name, value in settings.items():
            if earlier.get(name) == value:
                continue
            if isinstance(value, dict):
                other = set(value.items()) ^ set(earlier.get(name, {}).items())
                raise UserError(f"{self._partial} was made with another model ({min(other)[0]} differs); {AGAIN}")
            raise UserError(
                f"{self._partial} was made with {name} {earlier.get(name)!r}, now it is {value!r}; give the earlier "
                f"settings to go on; {AGAIN}"
            )

    def _read(self) -> None:
        with self._partial.open("rb+") as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    answer = json.loads(line.decode())
                except ValueError:
                    answer = None
                if not isinstance(answer, dict) or "finish_reason" not in answer:
                    raise UserError(f"{self._partial}:{number} is damaged; remove it and all behind it, or {AGAIN}")
                self.earlier.append(answer)
                whole += len(line)
            file.truncate(whole)


def check_output(output: Path, inputs: Iterable[Path], tables: bool = False) -> None:
    """Raises UserError, before any work, for an output that could not be written at its end, or whose name promises
    another form than JSON lines (or, with `tables`, than those and TABLES)."""
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
        line = json.dumps(_without_nan(value), ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line))
    return line


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def what_makes(config, folders: list[Path]) -> dict[str, Any]:
    """Settings that an answer depends on, and which model it is: hashes of the files in its folders."""
    settings = dataclasses.asdict(config)
    for name in ("model", "output", "input", "prompt", "batch_size", "resume"):
        settings.pop(name)
    files = {}
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.suffix in (".json", ".safetensors", ".jinja"):
                with file.open("rb") as stream:
                    files[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return json.loads(json.dumps({**settings, "model files": files}))
