"""An episode: one prompt, and all that came of it."""

import dataclasses
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
