"""Settings of a command: a YAML file, then `--dotted.key value` from the command line, into a frozen dataclass.

Every mistake is a `UserError` that says where the setting was given, what was expected, and which key was probably
meant. What there is to know about a key stands with its field, see `config.fields`.
"""

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minimind_jax.config.fields import Field, fields_of, help_text, nested_class, type_name
from minimind_jax.errors import UserError
from minimind_jax.paths import as_path
from minimind_jax.rules import INT64
from minimind_jax.texts import read_text
from minimind_jax.values import convert


class Setting(NamedTuple):
    """A value as the user wrote it, and where: `FILE:LINE` or `command line`.

    value: a text, a list of texts, or None: the field's type decides what `007` or `1e3` is, not YAML.
    """

    value: str | list | None
    where: str


# Where values come from -----------------------------------------------------------------------------------------------


def config_folder() -> Path:
    """Where the configs are: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    return sorted(file.stem for file in config_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """The file called `name`: a path, or the bare name of a config that comes with the package."""
    if Path(name).is_file():
        return Path(name)
    bare = Path(name).name.removesuffix(".yaml")
    if name in (bare, f"{bare}.yaml") and bare in config_names():
        return config_folder() / f"{bare}.yaml"
    guess = "".join(f"; did you mean {hint}?" for hint in difflib.get_close_matches(bare, config_names(), n=1))
    raise UserError(f"no config file {name}{guess} (configs that come with the package: {', '.join(config_names())})")


def read_yaml(path: str | Path) -> dict[str, Setting]:
    """Settings of a YAML file under their dotted keys; `a: {b: 1}` and `a.b: 1` mean the same."""
    node = compose_yaml(path)
    return flatten_yaml(node, str(path)) if node is not None else {}


def compose_yaml(path: str | Path) -> yaml.Node | None:
    """The parsed nodes of a YAML file, which know their lines."""
    try:
        return yaml.compose(read_text(as_path(path), "a config is a YAML file"), yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: nested too deeply") from None


def flatten_yaml(node: yaml.Node, file: str, prefix: str = "") -> dict[str, Setting]:
    """Leaves of a YAML mapping as settings that know their file and line."""
    where = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        got = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value)
        raise UserError(f"{where}: expected `key: value` lines, got {got}")
    settings = {}
    for key_node, value_node in node.value:
        key = f"{prefix}{scalar_key(key_node, file)}"
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            new = flatten_yaml(value_node, file, key + ".")
        else:
            new = {key: Setting(as_written(value_node, file), f"{file}:{key_node.start_mark.line + 1}")}
        for name in new.keys() & settings.keys():
            raise UserError(f"{new[name].where}: {name} is set twice, first at {settings[name].where}")
        settings |= new
    return settings


def scalar_key(node: yaml.Node, file: str) -> str:
    """The text of a mapping's key. Raises UserError for a key that is a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        raise UserError(f"{file}:{node.start_mark.line + 1}: a key has to be a word")
    return node.value


def as_written(node: yaml.Node, file: str) -> str | list | None:
    """The text of a YAML scalar, texts of a list, None for null. Raises UserError for anything else."""
    if isinstance(node, yaml.SequenceNode):
        return [as_written(item, file) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        where = f"{file}:{node.start_mark.line + 1}"
        told = "expected a word, a number or a list of them (a file with `stages:` is for minimind pipeline)"
        raise UserError(f"{where}: not a value: {told}")
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def read_arguments(argv: Sequence[str], fields: Sequence[Field] = ()) -> tuple[list[str], dict[str, Setting]]:
    """Config files and settings of `FILE --config FILE --key value --key=value --list a b`; values stay text.

    fields: those of the command. A list takes all values behind its flag, any other field one, and a flag that no field
    has all of them. Words without a flag are the positional settings. With a field that takes the rest, the arguments
    of no field are left to it, --config included.
    """
    flags = {name: field for field in fields for name in (field.key, field.declared.get("flag")) if name}
    rest = next((field.key for field in fields if field.declared.get("rest")), None)
    has_words = rest is not None or any(field.declared.get("positional") for field in fields)
    configs, given, words, left = [], {}, [], list(argv)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        field = flags.get(name)
        if word == "--" and has_words and rest is None:  # behind it nothing is a flag
            words += left
            break
        if not word.startswith("--") or not name or (rest is not None and field is None):
            words.append(word)
            continue
        values = [value] if equals else _take_values(field, left, has_words)
        if not values:
            raise UserError(f"--{name} needs a value, as in --{name} VALUE")
        if field and field.is_list and field.key in given:
            if field.declared.get("repeats"):
                values = [*_as_list(given[field.key].value, field), *values]
            else:  # as of any other flag that is given twice, so that what a script ends with overrides
                lost = f"warning: --{name} is given twice; only {' '.join(values)} is used"
                print(f"{lost}. Give all values behind one flag: --{name} A B", file=sys.stderr)
        if name == "config" and field is None:
            configs += values
        else:
            given[field.key if field else name] = Setting(values if len(values) > 1 else values[0], "command line")
    if rest is not None:
        return configs, {**given, rest: Setting(words, "command line")}
    places = [field for field in fields if field.declared.get("positional") and field.key not in given]
    return configs, given | _place(words, places)


def _take_values(field: Field | None, left: list[str], has_words: bool) -> list[Any]:
    """The values of a flag, taken off the words that are left. has_words: the next may be no value of it."""
    count = next((n for n, word in enumerate(left) if word.startswith("--")), len(left))
    if field is not None and not field.is_list:
        count = min(count, 1)
    if field is not None and "alone" in field.declared:
        if not count or (has_words and not _fits(field.type, left[0])):
            return [field.declared["alone"]]
    values, left[:count] = left[:count], []
    return values


def _fits(kind: Any, text: str) -> bool:
    try:
        convert(kind, text)
    except (ValueError, TypeError, ArithmeticError):
        return False
    return True


def _place(words: list[str], places: Sequence[Field]) -> dict[str, Setting]:
    """Words without a flag as positional settings: each takes one, and a list all that those behind it leave, but one
    if it must have any: of too few words it is the last that are missing."""
    given = {}
    for behind, field in zip(range(len(places) - 1, -1, -1), places, strict=True):
        count = max(field.is_required, len(words) - behind) if field.is_list else 1
        taken, words = words[:count], words[count:]
        if taken:
            given[field.key] = Setting(taken if field.is_list else taken[0], "command line")
    if words:
        told = "settings are given as --key value, a value with spaces in quotes"
        raise UserError(f"unexpected argument {words[0]!r}; {told}")
    return given


# From given values to a dataclass -------------------------------------------------------------------------------------


def load_settings(cls: type, argv: Sequence[str], prog: str = "minimind") -> Any:
    """A command's settings: defaults, then the `--config` files in order, then the command line.

    `--help` prints every field with its type, default and meaning, and exits. Raises UserError.
    """
    if {"-h", "--help"} & set(argv):
        print(help_text(cls, prog, config_names()), end="")
        raise SystemExit(0)
    fields = fields_of(cls)
    configs, overrides = read_arguments(argv, fields)
    given: dict[str, Setting] = {}
    for name in configs:
        given = merge(given, read_yaml(find_config(name)), fields)
    return make_settings(cls, merge(given, overrides, fields))


def merge(base: Mapping[str, Setting], over: Mapping[str, Setting], fields: Sequence[Field]) -> dict[str, Setting]:
    """Settings of `base` with those of `over` on top.

    A section set as a whole (to null) replaces its keys, and the reverse; one of `fields` replaces those that are
    declared as `either` this or that.
    """
    either = {field.key: field.declared["either"] for field in fields if "either" in field.declared}
    decided = {either[key] for key in over if key in either}

    def replaced(key: str) -> bool:
        same_section = any(key.startswith(new + ".") or new.startswith(key + ".") for new in over)
        return same_section or either.get(key) in decided

    return {key: setting for key, setting in base.items() if not replaced(key)} | over


def make_settings(cls: type, given: Mapping[str, Setting], **defaults: Any) -> Any:
    """The dataclass with `given` (dotted keys, unchecked values) over its defaults. Raises UserError.

    defaults: values of top-level fields that are used where `given` has none.
    """
    fields = {field.key: field for field in fields_of(cls)}
    values = dict(defaults)
    for key, setting in given.items():
        if key in fields:
            values[key] = _typed(fields[key], setting)
        else:
            _check_former(cls, key, setting, fields)
    if missing := [field for field in fields.values() if field.is_required and field.key not in values]:
        raise UserError("; ".join(f"{field.label} is missing: {field.help.rstrip('.')}" for field in missing))
    return _build(cls, None, values, "", given)


def _build(cls: type, default: Any, values: Mapping[str, Any], prefix: str, given: Mapping[str, Setting]) -> Any:
    """A copy of `default` (an instance, or None for the class's own defaults) with the given values in it."""
    changes = {}
    for field in dataclasses.fields(cls):
        key, kind = prefix + field.name, typing.get_type_hints(cls)[field.name]
        nested = nested_class(kind)
        if key in values:
            changes[field.name] = values[key]
        elif nested and any(name.startswith(key + ".") for name in values):
            start = field.default if default is None else getattr(default, field.name)
            changes[field.name] = _build(nested, start, values, key + ".", given)
    try:
        return cls(**changes) if default is None else dataclasses.replace(default, **changes)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(_with_section(str(error), cls, prefix, given)) from None


def _with_section(message: str, cls: type, prefix: str, given: Mapping[str, Setting]) -> str:
    """A dataclass's complaint, with the full key it is about and the place that key was set."""
    message = re.sub(r".*__init__\(\) missing \d+ required positional arguments?", "missing", message)
    if any(message.startswith(f.name) for f in dataclasses.fields(cls)):
        message = prefix + message
    elif prefix and not message.startswith(prefix):
        message = f"{prefix[:-1]}: {message}"
    places = [s.where for key, s in given.items() if key in message]
    return f"{places[0]}: {message}" if places else message


def _typed(field: Field, setting: Setting) -> Any:
    where, given = f"{setting.where}: {field.key}", setting.value
    try:
        if field.is_list and given is not None:
            return tuple(convert(typing.get_args(field.type)[0], item) for item in _as_list(given, field))
        return convert(field.type, given)
    except ArithmeticError:
        raise UserError(f"{where} is {given}; it must be {INT64.words}") from None
    except (ValueError, TypeError):
        raise UserError(f"{where} is {given!r}; expected {type_name(field.type)}") from None


def _as_list(value: Any, field: Field) -> list:
    """`a,b`, `[a, b]` as YAML, and a single value all stand for a list; text for the model is never taken apart, nor is
    what names a file or folder that is there."""
    if isinstance(value, list | tuple):
        return list(value)
    if not isinstance(value, str) or field.declared.get("is_text") or os.path.exists(value):
        return [value]
    if not value.startswith("["):
        return value.split(",")
    try:
        return as_written(yaml.compose(value, yaml.SafeLoader), "command line")
    except yaml.YAMLError:
        raise UserError(f"command line: {field.key}: {value!r} is not a list; write it as [a, b] or a,b") from None


def _check_former(cls: type, key: str, setting: Setting, fields: Mapping[str, Field]) -> None:
    """Raises UserError for a key that no field has, unless the class once had it and this is its default then."""
    former = getattr(cls, "FORMER", {})
    if key not in former:
        raise UserError(_unknown_key(key, setting, fields))
    default, reason = former[key]
    if (yaml.safe_load(setting.value) if isinstance(setting.value, str) else setting.value) != default:
        given = f"{setting.where}: {key} {setting.value}"
        raise UserError(f"{given}: has no effect in this stage, for {reason}; leave it out")


def _unknown_key(key: str, setting: Setting, fields: Mapping[str, Field]) -> str:
    where = f"{setting.where}: unknown setting {key}"
    inside = [name for name in fields if name.startswith(key + ".")]
    if inside:
        return f"{where}; it is a section, set one of its keys: {', '.join(inside)}"
    return f"{where}; did you mean {nearest(key, fields)}?"


def nearest(key: str, keys: Iterable[str]) -> str:
    """The dotted key most like `key`, comparing whole keys, last parts and initials (lr for learning_rate)."""
    last = key.split(".")[-1]

    def likeness(candidate: str) -> float:
        own = candidate.split(".")[-1]
        if len(last) > 1 and last == "".join(word[0] for word in own.split("_")):
            return 1.5
        pairs = ((key.lower(), candidate.lower()), (last.lower(), own.lower()))
        less, more = sorted(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return more + 0.1 * less

    return max(keys, key=likeness)
