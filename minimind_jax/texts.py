"""Text and JSON files that others may have written: read, or refused by name with what is wrong with them."""

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minimind_jax.errors import UserError
from minimind_jax.paths import is_remote


def is_there(path: Path) -> bool:
    """Whether anything has this name: also a folder, or a link to nothing."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def read_text(path: Path, mend: str = "put back a readable copy of it") -> str:
    """A UTF-8 text; a byte order mark at its beginning is left out.

    mend: what the user can do. Raises UserError for a file that is not there or cannot be read, and for other bytes.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); {mend}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {_reason(path, error)}; {mend}") from error


def read_object(path: Path, mend: str = "put back a whole copy of it") -> dict[str, Any]:
    """A JSON object. Raises UserError, which names the file, for anything else. mend: what the user can do."""
    text = read_text(path, mend)
    try:
        values = json.loads(text)
    except ValueError as error:
        problem = "it is empty" if not text.strip() else str(error)
        raise UserError(f"{path}: not JSON: {problem}; {mend}") from error
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read: nested too deeply; {mend}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}; {mend}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """As it is read best, with "\\n" at its line ends."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")


def listed(names: Sequence[str], most: int = 8) -> str:
    """Names as one line; of many the first."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def one_line(text: str) -> str:
    """A text as tables and pictures show it: line ends, and what cannot be seen, are spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def cell(text: str) -> str:
    """A text as a cell of a table of Markdown."""
    return one_line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Collection[str] = ()) -> str:
    """A table of Markdown; its cells stand as they are (see `cell`). numbers: the columns that end at the right."""
    head, *lines = (f"| {' | '.join(map(str, row))} |" for row in (columns, *rows))
    marks = "|".join("---:" if column in numbers else "---" for column in columns)
    return "\n".join([head, f"|{marks}|", *lines])


def fenced(text: str, language: str = "") -> str:
    """A fenced block of Markdown, with a fence longer than any in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and is_there(path):
        return "it is a link to a file that is not there"
    return error.strerror or str(error)
