"""What a reward function may say of an episode."""

import reprlib
from collections.abc import Callable, Sequence
from typing import Any

from minimind_jax.rl.episode import Episode

# A number, None where the function has nothing to say, or in words why there is none.
Value = float | None | str
Function = Callable[[Sequence[Episode]], Sequence[Any]]

_LARGEST = 1e9  # its square is still a number of float32


def checked(value: Any) -> Value:
    """A number that can be trained on, None, or words: those of the function, or of what is wrong with its value."""
    if value is None or isinstance(value, str):
        return value
    if type(value) in (int, float) and abs(value) <= _LARGEST:
        return float(value)
    return f"gave {reprlib.repr(value)}; expected a number up to {_LARGEST:.0e} or None"


def foreign(value: Any) -> Any:
    """What others gave, with a number of NumPy's or torch's as Python's; a text is no reward."""
    value = value.item() if hasattr(value, "item") else value
    return f"gave the text {reprlib.repr(value)}; expected a number or None" if isinstance(value, str) else value
