"""What is declared beside the fields of settings and configurations: above all what holds of their values."""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple


def setting(default: Any = dataclasses.MISSING, **declared: Any) -> Any:
    """A field of a settings class, with what is to be known of it besides its type; without a default it is required.

    positional: what stands for it in `--help` where it is given without its name. alone: what its flag means
    without a value, as in `--json`. flag: another name on the command line. either: of the settings that say the
    same `either` one replaces the others that an earlier file set. is_text: a comma or a bracket in it is only a
    character. repeats: of a list, to which every flag of it adds; of others the last one counts. rest: it takes all
    arguments that are not of this class, as they are. late: in `--help` it comes behind the others. names: what is on a
    disk under it, `model` (a run or a model's folder), `tokenizer` or `place`. must: what holds of its value, one of
    the rules below.
    """
    return dataclasses.field(default=default, metadata=declared)


class Rule(NamedTuple):
    """What holds of a value, and how that is said."""

    holds: Callable[[Any], bool]
    words: str


def at_least(minimum: float) -> Rule:
    return Rule(lambda value: value >= minimum, f"at least {minimum}")


def _is_encoding(name: str) -> bool:
    try:
        return bool("a".encode(name))  # others turn bytes into bytes, as base64
    except (LookupError, ValueError):
        return False


ABOVE_0 = Rule(lambda value: value > 0, "above 0")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")
SHARE = Rule(lambda value: 0 <= value <= 1, "between 0 and 1")
INT64 = Rule(lambda value: -(2**63) <= value < 2**63, "between -2**63 and 2**63 - 1")
ENCODING = Rule(_is_encoding, "a name such as utf-8, gb18030, big5, shift_jis, utf-16, latin-1")
TEMPERATURE = Rule(lambda value: value >= 0, "0 (greedy) or above")
TOP_P = Rule(lambda value: 0 < value <= 1, "above 0 and at most 1 (off)")


class Settings:
    """A dataclass that keeps the rules of its fields, Literal types among them. Raises ValueError."""

    OWNER: ClassVar[str] = ""  # what stands before the names of its fields in messages

    def __init_subclass__(cls):
        """A field with another default than in a base class keeps what is declared of it there."""
        super().__init_subclass__()
        known = getattr(cls, "__dataclass_fields__", {})
        for name in inspect.get_annotations(cls).keys() & vars(cls).keys() & known.keys():
            if not isinstance(vars(cls)[name], dataclasses.Field):
                setattr(cls, name, setting(vars(cls)[name], **known[name].metadata))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata.get("must")
            if typing.get_origin(field.type) is typing.Literal:
                choices = typing.get_args(field.type)
                rule = Rule(choices.__contains__, f"{', '.join(choices[:-1])} or {choices[-1]}")
            if rule is not None and value is not None and not rule.holds(value):
                raise ValueError(f"{self.OWNER}{field.name} is {value!r}; it must be {rule.words}")
