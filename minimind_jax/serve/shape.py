"""What all forms of an answer have: the whole of it as one object, or events as it comes."""

from collections.abc import AsyncIterator
from typing import Any, Protocol

from minimind_jax.serve.answers import Answers
from minimind_jax.serve.stream import DONE, fault_event


class Shape(Protocol):
    """end: the event behind the last one."""

    end: str = DONE

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The object of finished answers."""

    def events(self, answers: Answers) -> AsyncIterator[str]:
        """The events of answers that grow. Raises what goes wrong with them."""

    def fault(self, error: Exception) -> str:
        """The event that tells of it."""
        return fault_event(error)
