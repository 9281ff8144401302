"""An episode: one prompt, and all that came of it."""

import dataclasses
from typing import Any, NamedTuple

from minimind_jax.data.messages import Message
from minimind_jax.data.tools import Call
from minimind_jax.tools.toolbox import Observation


class Task(NamedTuple):
    """What a policy is asked, of one record.

    where: the record, for messages. messages: up to the question. tools: JSON schemas that are offered. fields: the
    record's other fields, such as `answer` or `gt`. thinking: whether the record says that it is asked to think, or
    not to; None where it does not.
    """

    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    fields: dict[str, Any]
    thinking: bool | None = None


class Turn(NamedTuple):
    """What the policy wrote at once. text: without the end of turn, with its thoughts and calls. answer: without
    thoughts and calls. calls: broken ones among them. observations: what it was told of its calls. start, end: its
    tokens in the episode; the end of turn is among them. finish: `stop` or `length`."""

    text: str
    answer: str
    calls: tuple[Call, ...]
    observations: tuple[Observation, ...]
    start: int
    end: int
    finish: str


@dataclasses.dataclass
class Episode:
    """One completion of a prompt; an agent's may have several turns.

    group: number of its prompt in the rollout. thinking: whether the prompt opened a think block.
    tokens: of the prompt and all that followed, as they were sampled, never encoded anew. prompt: so many are the
        prompt's. sampled: of each token whether the policy wrote it. logprobs: of the sampled ones, of the distribution
        they were drawn from; 0 elsewhere.
    finish: `stop`; or why it was cut off: `length` (max_new_tokens), `turns`, `tokens` (data.seq_len), `seconds`, or
        `error` (of its environment).
    rewards: of each function by its name, None where it has nothing to say. reward: their weighted sum.
    state: of its environment.
    """

    group: int
    task: Task
    thinking: bool
    tokens: list[int]
    prompt: int
    sampled: list[bool]
    logprobs: list[float]
    turns: list[Turn] = dataclasses.field(default_factory=list)
    finish: str = ""
    rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    reward: float = 0.0
    state: Any = None

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
