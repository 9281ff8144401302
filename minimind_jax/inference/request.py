"""What is asked of the engine, and the answer that grows while it works."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from minimind_jax.config.generation import SamplingConfig
from minimind_jax.data.images import Picture
from minimind_jax.errors import UserError
from minimind_jax.inference.text import AnswerText


class Busy(UserError):
    """As many requests wait as may."""


class Constraint(Protocol):
    """What one answer may still become. cut: it could not become all that it would have, for want of room."""

    cut: bool

    def mask(self) -> np.ndarray:
        """The tokens that may come next, uint32 (ceil(V / 32),): token i is bit i % 32 of word i // 32. Those that end
        a text are among them where the text may end."""

    def accept(self, token: int) -> None:
        """The next token is this one."""

    @property
    def ended(self) -> bool:
        """Nothing but an end may follow."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer that is asked for; n answers to one prompt are n requests, with seed, seed + 1 ...

    prompt: token ids. stop_ids: tokens that end the answer besides the engine's end-of-text ids, whatever ignore_eos
    says. logit_bias: (token, what is added to its logit). top_logprobs: so many of the likeliest tokens are told at
    each position. adapter: a name among the engine's adapters; "" for the base model. priority: of those that wait, one
    with a higher one is begun first. images: that the prompt shows; each stands in it as `Vision.image_tokens` markers,
    in order.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    stop_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = 0
    constraint: Constraint | None = None
    adapter: str = ""
    priority: int = 0
    images: tuple[Picture, ...] = ()


class Token(NamedTuple):
    """A token of an answer.

    logprob: log softmax of the model's own logits. sampled_logprob: of the distribution that it was drawn from, with
    penalties, temperature and cuts; 0 for greedy. top: the likeliest tokens by the model's own logits, with logprobs.
    """

    id: int
    logprob: float
    sampled_logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Answer:
    """The answer to a request. It grows while the engine steps.

    tokens: made so far, with the end-of-text token or those of the stop string. finish_reason: None while it grows;
    `stop` (end-of-text, stop id or stop string), `length`, `cancelled` or `error`. error: that of its constraint.
    stop_reason: the stop string or stop id that ended it. cached_tokens: of the prompt, that were not read anew. ends:
    tokens that end it.
    """

    def __init__(self, request: Request, end_ids: Sequence[int], text: AnswerText | None):
        self.request = request
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.stop_reason: str | int | None = None
        self.cached_tokens = 0
        self.ends = (*request.stop_ids, *(() if request.sampling.ignore_eos else end_ids))
        self._text = text
        self._told = 0, 0  # tokens and characters that `news` has given

    @property
    def text(self) -> str:
        """What is final: without special tokens, and cut before a stop string. "" without a tokenizer."""
        return self._text.text if self._text else ""

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return 0 if self.finish_reason else self.request.sampling.max_new_tokens - len(self.tokens)

    def news(self) -> tuple[list[Token], str]:
        """Tokens, and text that became final, since the last call."""
        tokens, characters = self._told
        self._told = len(self.tokens), len(self.text)
        return self.tokens[tokens:], self.text[characters:]

    def add(self, token: Token) -> None:
        """The next token, which may end the answer."""
        self.tokens.append(token)
        if constraint := self.request.constraint:
            constraint.accept(token.id)
        if token.id in self.ends:
            self.finish("stop", token.id if token.id in self.request.stop_ids else None)
        elif self._text and (self._text.push(token.id), self._text.stopped_by is not None)[1]:
            self.finish("stop", self._text.stopped_by)
        elif constraint and constraint.ended:
            self.finish("stop")
        elif len(self.tokens) == self.request.sampling.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        if reason == "stop" and self.request.constraint and self.request.constraint.cut:
            reason, stop_reason = "length", None
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._text:
            self._text.finish()
