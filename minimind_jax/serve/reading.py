"""The JSON of a request: only what JSON knows, of whole characters, and not endlessly deep."""

import re
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from minimind_jax.data.values import MOST_LEVELS, check_json, decode_json, is_deep
from minimind_jax.errors import UserError
from minimind_jax.serve.errors import ApiError, refused

_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")  # what may be half of a surrogate pair


class Route(APIRoute):
    """A route whose body is read strictly."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_Strict(request.scope, request.receive))

        return strictly


class _Strict(Request):
    async def body(self) -> bytes:
        found = await super().body()
        if self.method == "POST" and "json" not in self.headers.get("content-type", "").lower():
            raise ApiError(415, "send JSON, and the header Content-Type: application/json")
        if (coding := self.headers.get("content-encoding", "identity")) != "identity":
            raise ApiError(415, f"the body is encoded as {coding[:20]}; send it as it is")
        if not found and self.method == "POST":
            raise refused("the request has no body; expected a JSON object")
        return found

    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(body: bytes) -> dict[str, Any]:
    """Raises ApiError."""
    try:
        value = decode_json(body.decode("utf-8-sig"))
        if _HALVES.search(body):
            check_json(value, "the request")
    except (ValueError, RecursionError, UserError) as error:
        raise refused(f"the request is not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise refused("the request is not a JSON object")
    if is_deep(value):
        raise refused(f"the request is nested deeper than {MOST_LEVELS} levels")
    return value
