"""What a settings class holds: its fields under dotted keys, what is declared beside them, and the text of `--help`."""

import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minimind_jax.values import is_optional

HELP_COLUMN = 24
FIELD_LINE = r"\w+(?:, \w+)*: "  # of a docstring: what begins the text of one field, or of several


class Field(NamedTuple):
    """One setting: its dotted key, type, default (MISSING if it is required), the text of its help, and what `setting`
    declares."""

    key: str
    type: Any
    default: Any
    help: str
    declared: Mapping[str, Any] = types.MappingProxyType({})

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.type) is tuple

    @property
    def is_required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def label(self) -> str:
        """How a user names it: FILE, or --key."""
        return self.declared.get("positional") or f"--{self.key}"


@functools.cache
def fields_of(cls: type) -> list[Field]:
    """All settings of a dataclass, nested ones under dotted keys, in order of definition."""
    return list(_fields(cls, None, ""))


def names_of(cls: type) -> dict[str, str]:
    """What each setting of a class names, of those that name something on a disk, by dotted key."""
    return {field.key: field.declared["names"] for field in fields_of(cls) if "names" in field.declared}


def _fields(cls: type, owner: Any, prefix: str) -> Iterable[Field]:
    """owner: holds the defaults; None for the class's own."""
    hints, texts = typing.get_type_hints(cls), _field_help(cls)
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, hints[field.name]
        value = field.default if owner is None else getattr(owner, field.name)
        nested = nested_class(kind)
        if nested:
            if is_optional(kind):
                yield Field(key, types.NoneType, value, "leave this section out")
            # What an optional section needs is required only where there is such a section.
            inside = _fields(nested, value, key + ".")
            yield from (f._replace(default=None) if f.is_required else f for f in inside)
        else:
            yield Field(key, kind, value, texts.get(field.name, ""), field.metadata)


def nested_class(kind: Any) -> type | None:
    """The dataclass that a field holds (or may hold, when it is optional)."""
    return next((k for k in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(k)), None)


def _field_help(cls: type) -> dict[str, str]:
    """Texts of the lines `name, other: what it is` in the docstrings of a dataclass and its bases."""
    texts = {}
    for owner in reversed(cls.__mro__):
        lines = re.sub(r"\n +", " ", inspect.cleandoc(owner.__doc__ or ""))  # a text goes on in indented lines
        for names, text in re.findall(rf"^({FIELD_LINE})(.+(?:\n(?!{FIELD_LINE}).+)*)", lines, re.M):
            texts |= dict.fromkeys(names.removesuffix(": ").split(", "), " ".join(text.split()))
    return texts


# Words for a user -----------------------------------------------------------------------------------------------------


def type_name(kind: Any) -> str:
    """A type in the user's words: `whole number`, `adamw|muon`, `list of text`."""
    arguments = typing.get_args(kind)
    if is_optional(kind):
        return f"{type_name(arguments[0])} or null"
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(arguments)
    if typing.get_origin(kind) is tuple:
        return f"list of {type_name(arguments[0])}"
    return {int: "whole number", float: "number", str: "text", bool: "true|false", types.NoneType: "null"}[kind]


def _placeholder(kind: Any) -> str:
    """What stands for a value in `--help`: `N`, `TEXT ...`, `adamw|muon`."""
    if typing.get_origin(kind) is tuple:
        return f"{_placeholder(typing.get_args(kind)[0])} ..."
    if is_optional(kind):
        return _placeholder(typing.get_args(kind)[0])
    return {int: "N", float: "X", str: "TEXT"}.get(kind) or type_name(kind)


def help_text(cls: type, prog: str, configs: Sequence[str]) -> str:
    """The text of `--help`: what the command does, and every setting with its placeholder, meaning and default.

    configs: names of the config files that come with the package.
    """
    width = max(60, min(shutil.get_terminal_size().columns, 120) - 2)
    own = inspect.get_annotations(cls)
    # Those that others have, too, come later.
    fields = sorted(fields_of(cls), key=lambda field: (field.key not in own, field.declared.get("late", False)))
    sections: dict[str, list[Field]] = {"arguments": [], "options": []}
    for field in fields:
        title = "arguments" if field.declared.get("positional") else field.key.rpartition(".")[0] or "options"
        if not field.declared.get("rest"):
            sections.setdefault(field.key if field.type is types.NoneType else title, []).append(field)
    takes_more = any(field.declared.get("rest") for field in fields)
    words = [_argument(field) for field in sections["arguments"]]
    words += ["[--key value ...]"] if takes_more else ["[--config FILE] [--key value ...]"]
    lines = [" ".join(["usage:", prog, *words]), "", *_description(cls, width)]
    if not takes_more:
        told = f"--config is a YAML file, or the name of one that comes with the package: {', '.join(configs)}."
        lines += ["", *textwrap.wrap(f"Settings come from --config, then from the command line. {told}", width)]
    for title, members in sections.items():
        if members:
            lines += ["", f"{title}:", *(line for field in members for line in _help_lines(field, width))]
    return "\n".join(lines) + "\n"


def _argument(field: Field) -> str:
    """FILE, FILE ... or [FILE ...]."""
    word = field.label + " ..." * field.is_list
    return word if field.is_required else f"[{word}]"


def _description(cls: type, width: int) -> list[str]:
    """The docstring, up to the texts of the fields; what is indented in it stays as it is."""
    text = re.split(rf"\n(?={FIELD_LINE})", inspect.cleandoc(cls.__doc__ or ""))[0].rstrip()
    paragraphs = text.split("\n\n")
    wrapped = (part.split("\n") if part.startswith(" ") else textwrap.wrap(part, width) for part in paragraphs)
    return [line for lines in wrapped for line in ("", *lines)][1:]


def first_words(cls: type) -> str:
    """The docstring's first sentence, up to a colon or semicolon in it: what a command does, in a line."""
    return re.split(r"[.:;](?: |$)", " ".join(inspect.cleandoc(cls.__doc__).partition("\n\n")[0].split()))[0]


def _help_lines(field: Field, width: int) -> list[str]:
    placeholder = "null" if field.type is types.NoneType else _placeholder(field.type)
    head = f"  {_argument(field) if field.declared.get('positional') else f'--{field.key} {placeholder}'}"
    text = textwrap.wrap(field.help + _default_text(field), width - HELP_COLUMN)
    if len(head) < HELP_COLUMN - 1 and text:
        head += " " * (HELP_COLUMN - len(head)) + text.pop(0)
    return [head, *(" " * HELP_COLUMN + line for line in text)]


def _default_text(field: Field) -> str:
    value = field.default
    if field.is_required:
        return "" if field.declared.get("positional") else " (required)"
    if value in ("", ()) or field.type is types.NoneType:
        return ""
    words = {bool: lambda: str(value).lower(), float: lambda: f"{value:g}", tuple: lambda: " ".join(map(str, value))}
    return f" (default: {'null' if value is None else words.get(type(value), lambda: value)()})"
