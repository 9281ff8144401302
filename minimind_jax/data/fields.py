"""A record while it is read."""

from typing import Any

from minimind_jax.data.jsonl import Reading, Record
from minimind_jax.data.messages import Message, read_messages
from minimind_jax.data.values import Place, checked_text, is_absent, kind_of
from minimind_jax.errors import UserError


class Fields:
    """A record while it is read: what it holds, and what nobody has understood yet."""

    def __init__(self, record: Record, reading: Reading):
        self.record, self.ignore = record, frozenset(reading.ignore_fields)
        self.left = {name: value for name, value in record.value.items() if not is_absent(value)}
        self.leave_out(*self.ignore)

    def has(self, *names: str) -> bool:
        return any(name in self.left for name in names)

    def place(self, name: str) -> Place:
        return Place(f"{self.record.where}: {name}", str(self.record.file), self.record.told, self.ignore)

    def take(self, *names: str) -> tuple[Any, str]:
        """The value that stands under one of the names, and that name; (None, the first name) if there is none.

        Raises UserError where two of them hold different values.
        """
        found = [name for name in names if name in self.left]
        if not found:
            return None, names[0]
        values = [self.left.pop(name) for name in found]
        if any(value != values[0] for value in values[1:]):
            raise UserError(
                f"{self.record.where}: the fields {' and '.join(f'`{name}`' for name in found)} mean the same and "
                f"differ; remove one, or list it in data.ignore_fields"
            )
        return values[0], found[0]

    def text(self, *names: str) -> str:
        """The same, of a text; empty if there is none."""
        value, name = self.take(*names)
        return "" if value is None else checked_text(value, f"{self.record.where}: {name}")

    def messages(self, *names: str) -> tuple[list[Message], list[dict[str, Any]] | None]:
        """Messages of a field (a list, or one message), and the tools on them."""
        value, name = self.take(*names)
        return read_messages([value] if isinstance(value, dict) else value, self.place(name))

    def leave_out(self, *names: str) -> None:
        """These say again what is read already."""
        for name in names:
            if self.left.pop(name, None) is not None:
                self.place(name).tell(f"`{name}` is ignored")

    def tell(self, note: str) -> None:
        self.place("").tell(note)

    def finish(self, name: str, hint: str) -> None:
        """Raises UserError for a field that was not understood. hint: what the record may be instead."""
        for field, value in list(self.left.items()):
            if not self.place(field).leave_out(field, self.left, ""):
                raise UserError(
                    f"{self.record.where}: field {field[:40]!r} ({kind_of(value)}) of a record in the format {name} is "
                    f"not understood{hint}; remove it, or list it in data.ignore_fields to "
                    "train without it"
                )
