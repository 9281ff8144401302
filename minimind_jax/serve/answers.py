"""The answers to one request while they come: parts of messages, tokens, usage, and who is still there to read."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from minimind_jax.inference.request import Token
from minimind_jax.inference.splitter import AnswerSplitter, Part
from minimind_jax.serve.errors import too_slow
from minimind_jax.serve.metrics import Watch
from minimind_jax.serve.worker import News, Ticket, Worker

KEEP_ALIVE_SECONDS = 15.0
T = TypeVar("T")


@dataclasses.dataclass
class Choice:
    """One answer."""

    index: int
    prompt: list[int]  # which of the request's prompts it is for
    splitter: AnswerSplitter | None = None  # None where the text is shown as it is
    parallel_calls: bool = True
    names_calls: bool = True  # `tool_calls` is the finish_reason of an answer with calls
    thinks: bool = False  # the next token is a thought's
    thought_ids: tuple[int | None, int | None] = (None, None)  # that open and close a thought; None where it is spelled
    text: str = ""
    parts: list[Part] = dataclasses.field(default_factory=list)
    tokens: list[Token] = dataclasses.field(default_factory=list)
    new: list[Token] = dataclasses.field(default_factory=list)  # tokens that no chunk has told of yet
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None  # as OpenAI says it
    stop_reason: str | int | None = None

    def take(self, news: News) -> list[Part]:
        """The parts that are final with these news."""
        self._count_thoughts(news.tokens)
        self.tokens += news.tokens
        self.new += news.tokens
        self.text += news.text
        self.cached_tokens = news.cached_tokens
        parts = [Part(content=news.text)] if news.text else []
        if self.splitter:
            parts = self.splitter.push(news.text)
            parts += self.splitter.finish() if news.finish_reason else []
        if not self.parallel_calls:  # nothing follows the one call
            parts = parts[: 0 if self.calls else next((n + 1 for n, part in enumerate(parts) if part.call), None)]
        self.parts += parts
        if news.finish_reason:
            self.stop_reason = news.stop_reason
            self.finish_reason = self._reason(news.finish_reason)
        return parts

    def _count_thoughts(self, tokens: list[Token]) -> None:
        begin, end = self.thought_ids
        if self.splitter and end is None:
            self.thinks = self.splitter.state == "reasoning"
        for token in tokens:
            self.thinks |= token.id == begin
            self.reasoning_tokens += self.thinks
            self.thinks &= token.id != end

    def _reason(self, reason: str) -> str:
        if self.calls and self.names_calls and reason != "length":
            return "tool_calls"
        return "stop" if reason == "cancelled" else reason

    @property
    def is_done_early(self) -> bool:
        """It has its one call, and nothing else may follow."""
        return not self.parallel_calls and bool(self.calls) and self.finish_reason is None

    @property
    def reasoning(self) -> str:
        return "".join(part.reasoning for part in self.parts)

    @property
    def content(self) -> str:
        return "".join(part.content for part in self.parts)

    @property
    def calls(self) -> list[Any]:
        return [part.call for part in self.parts if part.call]

    def fresh(self, but: int = 0) -> list[Token]:
        """The tokens that no chunk has told of; they are told with this, but for the last ones."""
        count = len(self.new) - but
        tokens, self.new = self.new[:count], self.new[count:]
        return tokens


class Answers:
    """The choices of a request, and their news until all are finished or the time is up."""

    def __init__(
        self, worker: Worker, ticket: Ticket, choices: list[Choice], seconds: float, watch: Watch, told: dict[str, Any]
    ):
        """told: what the log says of the request."""
        self.choices, self._told = choices, told
        self._worker, self._ticket, self._watch, self._seconds = worker, ticket, watch, seconds
        self._deadline = time.monotonic() + seconds

    async def news(self) -> AsyncIterator[tuple[Choice, list[Part]] | None]:
        """A choice and its new parts, as they come; None where nothing has come for a while. Raises ApiError."""
        left = {choice.index for choice in self.choices}
        stopped = set()
        while left:
            wait = min(KEEP_ALIVE_SECONDS, self._deadline - time.monotonic())
            if wait <= 0:
                raise too_slow(self._seconds)
            try:
                async with asyncio.timeout(wait):
                    news = await self._ticket.news.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(news, Exception):
                raise news
            choice = self.choices[news.index]
            parts = choice.take(news)
            self._watch.count(choice.index, len(news.tokens), news.finish_reason and choice.finish_reason)
            if choice.finish_reason:
                left.discard(choice.index)
            elif choice.is_done_early and choice.index not in stopped:
                stopped.add(choice.index)
                self._worker.cancel_one(self._ticket, choice.index)
            yield choice, parts

    async def all(self) -> list[Choice]:
        """The choices when all are finished."""
        async for _ in self.news():
            pass
        return self.choices

    def close(self) -> None:
        """Frees the rows of what nobody waits for."""
        self._worker.cancel(self._ticket)
        unfinished = sum(choice.finish_reason is None for choice in self.choices)
        usage = self.usage()
        self._told |= {"tokens": f"{usage['prompt_tokens']}+{usage['completion_tokens']}", "unfinished": unfinished}
        self._watch.end((choice.prompt for choice in self._of_each_prompt()), unfinished)

    def _of_each_prompt(self) -> list[Choice]:
        """The first choice of each prompt: prompts are counted once, however many answers they have."""
        return list({id(choice.prompt): choice for choice in reversed(self.choices)}.values())

    def usage(self) -> dict[str, Any]:
        prompts = self._of_each_prompt()
        read, made = sum(len(c.prompt) for c in prompts), sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": made,
            "total_tokens": read + made,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
            "completion_tokens_details": {"reasoning_tokens": sum(c.reasoning_tokens for c in self.choices)},
        }


async def while_there(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """What the work comes to; None, and the work cancelled, when the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(BaseException):
                await each


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has closed the connection; its request was read before."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
