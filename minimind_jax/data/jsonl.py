"""Records from files: JSON (lines, arrays, pretty-printed), CSV, Parquet and plain text, each with where it came from.

What a file holds is told by its name's ending, and of JSON by its first line. Files may be compressed (gzip, zstd).
"""

import contextlib
import dataclasses
import functools
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minimind_jax.config.sections import ReadingConfig
from minimind_jax.data import text_files
from minimind_jax.data.download import FILES
from minimind_jax.data.messages import are_messages
from minimind_jax.data.values import decode_record, printed
from minimind_jax.errors import UserError, explained
from minimind_jax.shell import needing
from minimind_jax.texts import listed

COMPRESSIONS = ("", ".gz", ".zst")
JSON = tuple(kind + packed for kind in (".jsonl", ".json", ".ndjson") for packed in COMPRESSIONS)
ARROW = (".parquet", ".arrow")  # the latter as the library datasets saves them
TABLES = tuple(kind + packed for kind in (".csv", ".tsv") for packed in COMPRESSIONS)
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".7z", ".rar")  # which hold files, and are not looked into
DOCUMENTS = tuple(kind + packed for kind in (".txt", ".md") for packed in COMPRESSIONS)
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")  # that `images` decodes
SUFFIXES = (*JSON, *TABLES, *ARROW, *DOCUMENTS)
EXPECTED = ".jsonl, .json, .csv, .tsv, .txt, .md (which may be compressed: .gz, .zst), .parquet, .arrow"
OFFICE = (".xlsx", ".xls", ".ods", ".docx", ".doc", ".odt", ".pdf")
# What files begin with that are not what their names say: the ending that they need, if that helps, and what they are.
SIGNATURES = {
    b"\x1f\x8b": (".gz", "compressed by gzip, and needs a name that ends in .gz"),
    b"\x28\xb5\x2f\xfd": (".zst", "compressed by zstd, and needs a name that ends in .zst"),
    b"PK\x03\x04": ((), "a zip archive, as files of Excel and Word are; unpack it, or save the sheet as CSV (UTF-8)"),
    b"%PDF-": ((), "a PDF; save its text as .txt"),
    b"{\\rtf": ((), "rich text, as Word saves it; save it as plain text (.txt)"),
    b"version https://git-lfs": ((), "what Git has in place of a large file; fetch that with git lfs pull"),
}
READ_BYTES = 1 << 24  # of a table at once: pictures make rows of any size
# Beside data in a folder, they are none.
NO_DATA = ("readme", "license", "dataset_info", "dataset_infos", "dataset_dict", "state", "changelog")
_HELD_OUT = re.compile(r"(test|val|valid|validation|dev|eval)(?![a-z])", re.IGNORECASE)  # as splits are called
# What makes records of lines that are a text alone, or a question and its answer.
_CODE = "import json; [print(json.dumps({%s})) for r in map(json.loads, open('FILE', encoding='utf-8'))]"
_AS_RECORDS = {
    kind: f'; python -c "{_CODE % fields}" > RECORDS.jsonl writes such'
    for kind, fields in ((str, "'text': r"), ((str, str), "'prompt': r[0], 'response': r[1]"))
}
READING = ReadingConfig()


def reading_of(config: ReadingConfig) -> ReadingConfig:
    """How settings read, without their others."""
    return ReadingConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(ReadingConfig)})


@dataclasses.dataclass(frozen=True)
class Record:
    """One JSON object. line counts from 1 (in Parquet: the row), see `iter_lines`; where is `file:line`, as error
    messages name it.

    told: counts of what is left out or guessed, by (file, note), which whoever reads the records prints.
    """

    where: str
    file: Path
    line: int | str
    value: dict[str, Any]
    told: Counter = dataclasses.field(default_factory=Counter, compare=False, repr=False)

    def tell(self, note: str) -> None:
        """Counts what is left out or guessed of this record."""
        self.told[str(self.file), note] += 1


def expand_paths(paths: Iterable[str | Path], pictures: bool = False) -> list[Path]:
    """The files that files, folders (searched to the bottom) and globs stand for, each group in sorted order.

    Folders are searched through links too; names that begin with a dot are left out. pictures: those are files of data,
    too, in place of documents, wherever no table or JSON lies beside them. Raises UserError for a path that does not
    exist or cannot be read, a glob or folder that holds none, and an unknown file type.
    """
    files: list[Path] = []
    for given in paths:
        # A name too long, a folder that is closed to us, ~nobody.
        with explained(f"{given}: cannot be read", OSError, RuntimeError):
            files += _expand(given, pictures)
    return files


def _expand(given: str | Path, pictures: bool) -> list[Path]:
    suffixes, expected = (*SUFFIXES, *PICTURES) if pictures else SUFFIXES, EXPECTED + ", or a picture" * pictures
    if not str(given):  # Path("") is the current folder
        raise UserError("the name of a data file is empty; give a file, a folder or a glob")
    path = Path(given).expanduser()
    if path.is_dir():
        found = _data_of(_files_below(path), pictures)
        if not found:
            shown = any(map(is_picture, _files_below(path)))
            hint = "; it holds pictures, which classify reads with --vision.tower" * shown or _converted(path)
            raise UserError(f"{given}: no data in this folder; expected files ending in {expected}{hint}")
    elif path.is_file():
        if not _ends_in(path, suffixes):
            raise UserError(f"{given}: unknown file type; expected a name ending in {expected}{_converted(path)}")
        return [path]
    elif path.exists():
        raise UserError(f"{given}: neither a file nor a folder (data is read more than once, so a pipe will not do)")
    elif glob.has_magic(str(given)):
        base = next(folder for folder in path.parents if folder.is_dir())  # [1] in its name is no pattern
        pattern = os.path.join(glob.escape(str(base)), *path.parts[len(base.parts) :])
        found = _data_of(sorted(map(Path, glob.glob(pattern, recursive=True))), pictures)
        if not found:
            raise UserError(f"{given}: no file matches; expected files ending in {expected}")
    elif "://" in str(given):
        raise UserError(f"{given}: data is read from this machine's disks; download it, and give the file")
    else:
        problem = "a link that leads nowhere" if path.is_symlink() else f"no such file (looked in {Path.cwd()})"
        advice = f"`minimind data download {path.stem}` fetches it" if path.name in FILES else "check the name"
        raise UserError(f"{given}: {problem}; {advice}")
    for file in found:
        if not file.is_file():
            raise UserError(f"{file}: a link that leads nowhere, or no file; remove it, or name the files you mean")
    return found


def _converted(path: Path) -> str:
    """What to do about an archive or a file of an office's program, or a folder of some."""
    files = _files_below(path) if path.is_dir() else [path]
    if any(_ends_in(file, ARCHIVES) for file in files):
        return "; unpack archives, and name their folder"
    is_office = any(_ends_in(file, OFFICE) for file in files)
    return "; save a sheet of Excel as CSV (UTF-8), the text of Word and PDF files as .txt" * is_office


def _files_below(folder: Path) -> list[Path]:
    """All files but hidden ones. Raises OSError for a folder that cannot be read, where Path.rglob says nothing."""

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
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)


def tell_left_out(paths: Iterable[str | Path], pictures: bool = False) -> None:
    """Prints, on the standard error, what lies in folders among the paths and is not read."""
    folders = [folder for folder in (Path(path).expanduser() for path in paths) if folder.is_dir()]
    inside = [(files, set(_data_of(files, pictures))) for files in map(_files_below, folders)]
    if left := [str(file) for files, data in inside for file in files if file not in data]:
        print(f"in the folders, not read as data: {listed(left, 3)}", file=sys.stderr)
    read = [str(file) for _, data in inside for file in sorted(data)]
    aside = [name for name in read if _HELD_OUT.match(Path(name).name)]
    if aside and len(aside) < len(read):
        print(f"in the folders, read as all others: {listed(aside, 3)}; name the files that you mean", file=sys.stderr)


def _data_of(files: list[Path], pictures: bool = False) -> list[Path]:
    """The data among the files of a folder. What describes a data set, as its README, is none where there is data."""
    shown = [file for file in files if _ends_in(file, PICTURES)]
    files = [file for file in files if _ends_in(file, SUFFIXES)]
    data = [file for file in files if file.name.lower().split(".")[0] not in NO_DATA]
    if not any(_ends_in(file, (*JSON, *TABLES, *ARROW)) for file in data):
        return shown if pictures and shown else files
    return data


def is_picture(file: Path) -> bool:
    """Whether a file is itself a record, of a picture."""
    return _ends_in(file, PICTURES)


def _ends_in(file: Path, endings: str | tuple[str, ...]) -> bool:
    return file.name.lower().endswith(endings)


def iter_records(
    paths: Iterable[str | Path],
    on_bad: Callable[[UserError], None] | None = None,
    reading: ReadingConfig = READING,
    told: Counter | None = None,
    pictures: bool = False,
) -> Iterator[Record]:
    """The records of all files in order. Blank lines are passed over; a byte order mark is tolerated.

    on_bad: called with the error of a broken line, which is then skipped; without it the error is raised.
    told: gets what is told of the records (see `Record`). pictures: see `expand_paths`.
    Raises UserError with file and line for a line that is no JSON object, and for a file without records.
    """
    told = Counter() if told is None else told
    for file in expand_paths(paths, pictures):
        for line, raw in iter_lines(file, reading):
            try:
                yield parse_line(raw, file, line, told)
            except UserError as error:
                if on_bad is None:
                    raise
                on_bad(error)


def iter_lines(file: Path, reading: ReadingConfig = READING) -> Iterator[tuple[int | str, bytes | dict[str, Any]]]:
    """(line from 1 or what says more, record) of one file: JSON text without blank lines; a dict of CSV, Parquet,
    documents and pictures. Raises UserError for a file that cannot be read, or is empty."""
    if is_picture(file):
        yield 1, {"image": str(file.absolute())}
        return
    _check_signature(file)
    if not _ends_in(file, ARROW):
        _tell_wrong_encoding(file, reading.encoding)
    line = 0
    try:
        with _open(file) as stream:
            if _ends_in(file, ARROW):
                found = enumerate(_arrow_rows(file), start=1)
            elif _ends_in(file, TABLES):
                found = text_files.csv_rows(stream, file, reading.encoding)
            elif _ends_in(file, DOCUMENTS):
                found = [(1, {reading.text_field or "text": text_files.document(stream, file, reading.encoding)})]
            else:
                found = text_files.json_values(stream, file, reading.encoding)
            for line, raw in found:
                yield line, raw
    except UnicodeError as error:
        raise text_files.undecodable(error, file, reading.encoding) from error
    except (EOFError, OSError, zlib.error) as error:
        next_line = line + 1 if isinstance(line, int) else line
        raise UserError(f"{file}:{next_line}: cannot be read: {error}") from error
    if not line:
        raise UserError(f"{file}: the file is empty; expected records")


@functools.cache  # once, however often the file is read
def _tell_wrong_encoding(file: Path, encoding: str) -> None:
    with contextlib.suppress(EOFError, OSError, zlib.error), _open(file) as stream:
        if text_files.is_foreign_utf8(stream, encoding):
            print(
                f"warning: {file} is UTF-8 text, and is read as {encoding}, which makes other characters of it; leave "
                "data.encoding out (of tools: --encoding) if it looks wrong",
                file=sys.stderr,
            )


def parse_line(raw: bytes | dict[str, Any], file: Path, line: int | str, told: Counter) -> Record:
    """A line as `iter_lines` gives it -> Record. Raises UserError if it is not UTF-8, not JSON or not an object."""
    where = f"{file}:{line}"
    if isinstance(raw, dict):
        text_files.check_row(raw, where)
        text = " ".join(str(cell) for cell in raw.values() if isinstance(cell, str | list))
        notes = [*text_files.spoiled(text), *(text_files.other_forms(text, where) if _ends_in(file, DOCUMENTS) else ())]
        told.update((str(file), note) for note in notes)
        return Record(where, file, line, raw, told)
    try:
        value = decode_record(text := raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        hint = text_files.encoding_hint(raw)
        raise UserError(f"{where}: not UTF-8 text (byte {error.start} of the line); {hint}") from error
    except json.JSONDecodeError as error:
        hint = "; the NUL bytes look like UTF-16, save the file as UTF-8, or set data.encoding utf-16"
        raise UserError(
            f"{where}: not JSON: {error.msg} at column {error.colno}; expected one object a line"
            f"{hint if bytes(1) in raw else printed(text)}"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:  # NaN, a number too large, a field given twice
        raise UserError(f"{where}: not readable JSON: {error}") from error
    value = {"messages": value} if are_messages(value) else value
    if not isinstance(value, dict):
        kind = tuple(map(type, value)) if isinstance(value, list) else type(value)
        hint = _AS_RECORDS.get(kind, "") if _ends_in(file, ".jsonl") else ""  # the command reads lines
        raise UserError(f'{where}: a JSON {type(value).__name__}; expected an object, as in {{"text": ...}}{hint}')
    text = json.dumps(value, ensure_ascii=False) if "\\u" in text else text
    told.update((str(file), note) for note in text_files.spoiled(text))
    return Record(where, file, line, value, told)


def tell(told: Counter) -> None:
    """Prints what was left out or guessed, on the standard error."""
    for line in told_lines(told):
        print(line, file=sys.stderr)


def told_lines(told: Counter, most: int = 12) -> list[str]:
    """What was left out or guessed while records were read: a line a file."""
    lines = []
    for file, notes in itertools.groupby(sorted(told.items()), key=lambda item: item[0][0]):
        counts = [f"{note} ({count:,} times)" if count > 1 else f"{note} (once)" for (_, note), count in notes]
        lines.append(f"{file}: {'; '.join(counts)}")
    return lines[:most] + ([f"and {len(lines) - most} more files"] if len(lines) > most else [])


def _open(file: Path) -> io.BufferedIOBase:
    if _ends_in(file, ".gz"):
        return gzip.open(file, "rb")
    if _ends_in(file, ".zst"):
        # not zstandard's own reader, which takes half a frame for the end of the file
        return io.BufferedReader(_pyarrow(file).input_stream(str(file), compression="zstd"))
    return open(file, "rb")


def _arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    pyarrow = _pyarrow(file)
    what = f"{file}: not a readable {file.suffix[1:].capitalize()} file"
    with explained(what, pyarrow.ArrowException, OSError, UnicodeDecodeError):
        if _ends_in(file, ".arrow"):
            for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))):
                yield from batch.to_pylist()
            return
        table = pyarrow.parquet.ParquetFile(file, memory_map=True)
        row_bytes = file.stat().st_size / max(1, table.metadata.num_rows)
        names = _label_names(table.schema_arrow.metadata or {})
        for batch in table.iter_batches(batch_size=max(1, min(1024, int(READ_BYTES / max(1, row_bytes))))):
            for row in batch.to_pylist():
                yield {**row, **{column: _called(row[column], names[column]) for column in row.keys() & names}}


def _check_signature(file: Path) -> None:
    """Raises UserError for a file that begins as none does that its name promises."""
    with contextlib.suppress(OSError), open(file, "rb") as stream:  # which is told where it is read
        start = stream.read(max(map(len, SIGNATURES)))
        for signature, (endings, what) in SIGNATURES.items():
            if start.startswith(signature) and not _ends_in(file, endings):
                raise UserError(f"{file}: this is {what}")


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Of columns whose numbers have names, as Hugging Face's datasets write them beside a table (ClassLabel)."""

    def names(feature: Any) -> tuple[str, ...]:
        if isinstance(feature, list):  # how earlier versions say that there are several
            return names(feature[0])
        if not isinstance(feature, dict):
            return ()
        return tuple(feature["names"]) if feature.get("_type") == "ClassLabel" else names(feature.get("feature"))

    try:
        features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features") or {}
        return {column: found for column, feature in features.items() if (found := names(feature))}
    except (ValueError, TypeError, AttributeError, LookupError):  # of somebody else
        return {}


def _called(value: Any, names: tuple[str, ...]) -> Any:
    """What the numbers of a column are called; -1 stands there for no label."""
    if isinstance(value, list):
        return [_called(each, names) for each in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _pyarrow(file: Path):
    with needing(f"{file}: reading {file.suffix} needs pyarrow", "formats"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow
