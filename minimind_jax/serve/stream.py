"""Events of a stream, and the response that carries them: as long as the client is there, and no longer."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from minimind_jax.serve.errors import error_object
from minimind_jax.serve.log import logger

DONE = "data: [DONE]\n\n"
KEEP_ALIVE = ": keep-alive\n\n"
_BREAKS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})  # of lines, for some clients


def event(value: Any, name: str = "") -> str:
    """One event of JSON, on one line whatever it holds."""
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_BREAKS)
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


async def to_the_end(
    events: AsyncIterator[str], fault: Callable[[Exception], str], end: str = DONE
) -> AsyncIterator[str]:
    """The events and the end; what goes wrong on the way is an event as well, for the status is sent."""
    try:
        async for each in events:
            yield each
    except Exception as error:
        if not isinstance(error, HTTPException):
            logger.exception("an answer has failed while it was streamed")
        yield fault(error)
    if end:
        yield end


def fault_event(error: Exception) -> str:
    return event(error_object(error))


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
