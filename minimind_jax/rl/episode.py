"""An episode: one prompt, and all that came of it."""

import dataclasses
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minimind_jax.data.messages import Message
from minimind_jax.data.tools import Call
from minimind_jax.tools.toolbox import Observation


class Task(NamedTuple):
    """What a policy is asked, of one record."""

    where: str  # the record, for messages
    messages: list[Message]  # up to the question
    tools: list[dict[str, Any]] | None  # JSON schemas that are offered
    fields: dict[str, Any]  # the record's other fields, such as `answer` or `gt`
    thinking: bool | None = None  # whether the record says that it is asked to think, or not to; None where it does not


class Turn(NamedTuple):
    """What the policy wrote at once."""

    text: str  # without the end of turn, with its thoughts and calls
    answer: str  # without thoughts and calls
    calls: tuple[Call, ...]  # broken ones among them
    observations: tuple[Observation, ...]  # what it was told of its calls
    # start, end: its tokens in the episode; the end of turn is among them
    start: int
    end: int
    finish: str  # `stop` or `length`
    opened: bool = False  # a think block, by its prompt


@dataclasses.dataclass
class Episode:
    """One completion of a prompt; an agent's may have several turns."""

    group: int  # number of its prompt in the rollout
    task: Task
    thinking: bool  # whether the prompt opened a think block
    tokens: list[int]  # of the prompt and all that followed, as they were sampled, never encoded anew
    prompt: int  # so many are the prompt's
    sampled: list[bool]  # of each token whether the policy wrote it
    logprobs: list[float]  # of the sampled ones, of the distribution they were drawn from; 0 elsewhere
    turns: list[Turn] = dataclasses.field(default_factory=list)
    # `stop`; or why it was cut off: `length` (max_new_tokens), `turns`, `tokens` (data.seq_len), `seconds`, or `error`
    # (of its environment)
    finish: str = ""
    # of each function by its name, None where it has nothing to say
    rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    reward: float = 0.0  # their weighted sum
    unjudged: bool = False  # a function failed to say its own, and rewards.on_error skips it
    state: Any = None  # of its environment

    @property
    def was_cut(self) -> bool:
        return self.finish != "stop"

    @property
    def completion(self) -> list[int]:
        """Tokens behind the prompt, observations among them."""
        return self.tokens[self.prompt :]

    @property
    def text(self) -> str:
        """What the policy wrote last, with its thoughts and calls."""
        return self.turns[-1].text if self.turns else ""

    @property
    def answer(self) -> str:
        """What it said last, without thoughts and calls."""
        return self.turns[-1].answer if self.turns else ""


# What a reward function may say of one -------------------------------------------------------------------------------

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
