"""What all forms of an answer have: the whole of it as one object, or events as it grows, and the response that carries
them as long as the client is there, and no longer."""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol

from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from minimind_jax.inference.splitter import Part
from minimind_jax.serve.answers import Answers, Choice
from minimind_jax.serve.errors import error_object
from minimind_jax.serve.log import logger

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
_BREAKS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})  # of lines, for some clients


def event(value: Any, name: str = "") -> str:
    """One event of JSON, on one line whatever it holds."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_BREAKS)
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


class Shape(Protocol):
    """end: the event behind the last one."""

    end: str = DONE

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The object of finished answers."""

    def begin(self, answers: Answers) -> Iterable[str]:
        """The events before any part of an answer is there."""
        return ()

    def grow(self, choice: Choice, parts: list[Part]) -> Iterable[str]:
        """The events of news: a choice and its new parts."""

    def finish(self, answers: Answers) -> Iterable[str]:
        """The events behind the last news."""

    def fault(self, error: Exception) -> str:
        """The event that tells what has gone wrong."""
        return event(error_object(error))

    async def events(self, answers: Answers) -> AsyncIterator[str]:
        """All of them, and the end; what goes wrong on the way is an event as well, for the status is sent."""
        try:
            for each in self.begin(answers):
                yield each
            async for news in answers.news():
                for each in [KEEP_ALIVE] if news is None else self.grow(*news):
                    yield each
            for each in self.finish(answers):
                yield each
        except Exception as error:
            if not isinstance(error, HTTPException):
                logger.exception("an answer has failed while it was streamed")
            yield self.fault(error)
        if self.end:
            yield self.end


class EventStream(StreamingResponse):
    """close: is called when the last event is sent, and as soon as the client goes away."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
