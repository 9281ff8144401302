"""What a value in a record is: absent, text of whole characters, JSON; where it stands, and how errors name it."""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from minimind_jax.errors import UserError, explained

# What says something about a record or a message and is no part of it: left out, and told once a file with a count.
MOST_LEVELS = 64  # of what a model or a client writes: each takes some of the stack of whoever reads it
IGNORABLE = frozenset(
    "id,prompt_id,source,dataset,category,lang,language,score,token_count,timestamp,model,name,uuid,index,idx,url,date,"
    "created_at,conversation_id,dialog_id,tool_call_id,finish_reason,license,split,subset,task,num_turns,num_tokens,"
    "prefix,parallel_tool_calls,__index_level_0__,Unnamed: 0".split(",")
)
_AS_RECORDS = (
    "; {}: python -c \"import json; d = json.load(open('FILE', encoding='utf-8')); [print(json.dumps({})) for r in "
    '{}]" > RECORDS.jsonl'
)
_CELLS = "zip(*(c.values() if isinstance(c, dict) else c for c in d.values()))"
_COLUMNS = _AS_RECORDS.format("if these are columns", "dict(zip(d, r))", _CELLS)
_SPLIT = _AS_RECORDS.format("if these are rows of a table", "dict(zip(d['columns'], r))", "d['data']")

Tell = Callable[[str], None]  # hears what is left out or guessed


def unheard(note: str) -> None:
    """The `Tell` of those who do not want to know."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record, a field or a message stands, for errors."""

    text: str  # file, line and field
    tell: Tell = unheard
    ignore: frozenset[str] = frozenset()  # more fields to leave out
    is_written: bool = False  # as JSON, whose nulls are meant; those of a table stand for what is not there

    def at(self, more: str) -> "Place":
        return dataclasses.replace(self, text=self.text + more)

    def take(
        self, left: dict[str, Any], names: Collection[str], same: Callable[[Any], Any] = lambda value: value
    ) -> tuple[Any, str]:
        """The value that `left` has under one of the names, taken out of it, and that name; (None, the first name) if
        there is none. Raises UserError where two of them differ, seen through `same`."""
        found = {name: left.pop(name) for name in names if name in left}
        if not found:
            return None, next(iter(names))
        name, value = next(iter(found.items()))
        if any(same(other) != same(value) for other in list(found.values())[1:]):
            raise UserError(
                f"{self.text}: {' and '.join(f'`{name}`' for name in found)} mean the same and differ; remove one, or "
                "list it in data.ignore_fields"
            )
        return value, name

    def finish(self, left: dict[str, Any], what: str, hint: str = "", told_of: str = "") -> None:
        """Tells that the fields which nobody has taken are ignored. Raises UserError for one that may not be.

        what: has the fields. hint: what it may be instead.
        """
        for name, value in left.items():
            if name not in IGNORABLE and name not in self.ignore:
                raise UserError(
                    f"{self.text}: field {name[:40]!r} ({kind_of(value)}) of {what} is not understood{hint}; remove "
                    "it, or list it in data.ignore_fields to train without it"
                )
            self.tell(f"{told_of}`{name}` is ignored")

    def check_known(self, value: dict[str, Any], known: Collection[str], what: str) -> None:
        """Raises UserError for a field that is none of these, unless it is empty or to be ignored."""
        for name, item in value.items():
            if name not in known and name not in self.ignore and not is_absent(item):
                raise UserError(
                    f"{self.text}: field {name[:40]!r} of {what} is not understood; remove it, or list it in "
                    "data.ignore_fields"
                )


def is_absent(value: Any) -> bool:
    """None, and what is empty: Arrow gives every struct the keys of all rows, CSV every row all columns."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def is_deep(value: Any) -> bool:
    """Whether an object or list is nested deeper than MOST_LEVELS."""
    level = [value]
    for _ in range(MOST_LEVELS):
        inside = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in inside if isinstance(item, dict | list)]
    return bool(level)


def without_nulls(value: Any) -> Any:
    """A JSON value without the fields that are null, at every depth."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def checked_text(value: Any, place: str) -> str:
    """`value`, a string of whole characters. Raises UserError, which names the place."""
    if not isinstance(value, str):
        raise UserError(f"{place} is {kind_of(value)}; expected a string{_COLUMNS * _is_column(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place} has half a surrogate pair (\\u{ord(value[error.start]):04x}) at character {error.start}; "
            "expected Unicode text"
        ) from error
    return value


def json_list(value: Any, place: str) -> list[Any]:
    """`value`, a list or the JSON of one. Raises UserError."""
    if isinstance(value, str):
        value = loads(value, place)
    if not isinstance(value, list):
        raise UserError(f"{place} is {kind_of(value)}; expected a list or the JSON of one")
    return value


def loads(text: str, place: str) -> Any:
    """What JSON text says. Raises UserError, which names the place."""
    with explained(f"{place} is not JSON", ValueError, RecursionError):
        return decode_json(text)


def decode_json(text: str) -> Any:
    """`json.loads` without the values Python adds to JSON: NaN and Infinity, which would be rendered as such. Raises
    ValueError."""
    return _STRICT.decode(text)


def decode_record(text: str) -> Any:
    """The same, for a whole record, where a field that is given twice is refused, too. Raises ValueError."""
    return _RECORDS.decode(text)


def check_json(value: Any, place: str) -> None:
    """Raises UserError for what the template could not write: half a surrogate pair, a date or NaN out of Parquet."""
    with explained(f"{place} cannot be written as JSON", TypeError, ValueError, RecursionError):
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def respelled(value: dict[str, Any], names: Collection[str]) -> dict[str, str]:
    """{field: name} of the fields that are one of the names but for case and spaces around, as Excel's headers are."""
    plain = {field: field.strip().casefold() for field in value}
    alike = Counter(plain.values())
    return {field: name for field, name in plain.items() if name in names and name != field and alike[name] == 1}


def meant(value: dict[str, Any], names: Collection[str]) -> str:
    """ ": FIELD", for the end of a hint, where a field is one of the names but for its case; else ""."""
    return "".join(f": {field}" for field in list(respelled(value, names))[:1])


def field_names(value: dict[str, Any]) -> str:
    """The first fields of an object, as one short line without control characters; where they seem to hold the records,
    as in {"data": [...]}, with the way out."""
    names = [repr(name)[1:-1][:40] for name in list(value)[:8]]
    found = ", ".join(names + ["..."] * (len(value) > 8)) or "none"
    if isinstance(value.get("columns"), list) and "data" in value:
        return found + _SPLIT
    if value and all(_is_column(column) or _is_list(column) for column in value.values()):
        return found + _COLUMNS
    count, path = max(_records_in(value), key=lambda records: records[0], default=(0, ""))
    return found + _AS_RECORDS.format(f"if {path} ({count:,} objects) are the records", "r", f"d{path}") * bool(count)


def _records_in(value: dict[str, Any], path: str = "") -> Iterator[tuple[int, str]]:
    """How many objects stand in lists, or under names, in an object, and where, as Python's code: of plain names, for a
    shell will read it."""
    if len(value) > 1 and all(isinstance(item, dict) for item in value.values()):
        yield len(value), f"{path}.values()"
    for name, item in value.items():
        if not re.fullmatch(r"[\w .-]{1,40}", name) or len(path) > 100:
            continue
        if isinstance(item, dict):
            yield from _records_in(item, f"{path}[{name!r}]")
        elif isinstance(item, list) and item and all(isinstance(each, dict) for each in item):
            if "role" not in item[0] and not {"from", "value"} <= item[0].keys():  # messages are none
                yield len(item), f"{path}[{name!r}]"


def _is_column(value: Any) -> bool:
    """Whether it is what pandas makes of a column, {"0": ..., "1": ...}."""
    return isinstance(value, dict) and next(iter(value), None) == "0"


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not any(isinstance(item, dict | list) for item in value)


def printed(text: str) -> str:
    """What is said of text that is no JSON where Python has printed it; "" of others."""
    return "; Python printed this, where json.dumps would have written JSON" * bool(re.match(r"\s*\[?\s*\{\s*'", text))


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "an empty string" if value == "" else "a string",
        dict: "an object",
        list: "an empty list" if value == [] else "a list",
    }
    return names.get(type(value)) or f"of type {type(value).__name__}"  # bytes and dates, out of Parquet


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
