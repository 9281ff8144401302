"""A record while it is read."""

from collections.abc import Iterable
from typing import Any

from minimind_jax.data.jsonl import Record
from minimind_jax.data.messages import Message, read_messages
from minimind_jax.data.values import Place, checked_text, is_absent, loads


class Fields:
    """A record while it is read: what it holds, and what nobody has understood yet."""

    def __init__(self, record: Record, ignore: Iterable[str]):
        self.record, self.tell = record, record.tell
        self.here = Place(record.where, record.tell, frozenset(ignore))
        self.left = {name: value for name, value in record.value.items() if not is_absent(value)}
        self.leave_out(*self.here.ignore)

    def has(self, *names: str) -> bool:
        return any(name in self.left for name in names)

    def place(self, name: str) -> Place:
        return self.here.at(f": {name}")

    def take(self, *names: str) -> tuple[Any, str]:
        """The value that stands under one of the names, and that name; see `Place.take`."""
        return self.here.take(self.left, names)

    def parsed(self, name: str) -> tuple[Any, str]:
        """The same, of a field that may hold JSON text."""
        value, _ = self.take(name)
        return loads(value, self.place(name).text) if isinstance(value, str) else value, name

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
                self.tell(f"`{name}` is ignored")

    def finish(self, name: str, hint: str) -> None:
        """Raises UserError for a field that was not understood. hint: what the record may be instead."""
        self.here.finish(self.left, f"a record in the format {name}", hint)
