"""Before every request: who may ask, how much, and one line about it in the log."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Collection, Iterable
from urllib.parse import quote

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minimind_jax.serve.errors import ApiError, error_object
from minimind_jax.serve.log import logger

READ_SECONDS = 60.0  # for the whole of a request's body to arrive
_OWN_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")


class Guard:
    """ASGI middleware.

    keys: API keys; none lets everybody in. free: paths that need none. most_bytes: of a body. is_local: without keys,
    only requests to this machine by its own names are answered: a page that has its domain point here has another.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], free: Collection[str], most_bytes: int, is_local: bool):
        self._app, self._free, self._most, self._is_local = app, free, most_bytes, is_local
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        begin, status = time.monotonic(), 499  # the client had gone before there was an answer
        request_id = f"req_{secrets.token_hex(8)}"
        told = scope.setdefault("state", {})["told"] = {}  # what the handler adds to the line
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope  # of which uvicorn sends no body

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(inner, self._bounded(receive), send_on)
            except ApiError as error:
                response = JSONResponse(error_object(error), error.status_code, error.headers)
                await response(scope, receive, send_on)
        finally:
            seconds, path = time.monotonic() - begin, quote(scope["path"][:200])
            words = "".join(f" {name}={value}" for name, value in told.items())
            logger.info("%s %s %d %.3fs %s%s", scope["method"], path, status, seconds, request_id, words)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._digests and scope["path"] not in self._free and scope["method"] != "OPTIONS":
            self._check_key(headers)
        host, is_open = headers.get("host", ""), self._digests or scope["path"] == "/health"
        if self._is_local and not is_open and not _OWN_HOST.fullmatch(host.lower()):
            words = "without an API key this server answers to the names localhost and 127.0.0.1 alone, and was asked"
            raise ApiError(403, f"{words} for as {host[:60]!r}; start it with a key", code="unknown_host")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            raise self._too_large()

    def _check_key(self, headers: Headers) -> None:
        given = re.sub("^bearer +", "", headers.get("authorization", ""), flags=re.I) or headers.get("x-api-key", "")
        digest = _digest(given)
        if not sum(hmac.compare_digest(digest, own) for own in self._digests):  # all of them are compared
            words = "the API key is not one of this server's" if given else "this server wants an API key"
            message = f"{words}: send `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", www_authenticate="Bearer")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._most:,} bytes (--max_body_mib)")

    def _bounded(self, receive: Receive) -> Receive:
        """The body, as long as it is neither too large nor too slow."""
        read, deadline, is_whole = 0, time.monotonic() + READ_SECONDS, False

        async def bounded() -> Message:
            nonlocal read, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise ApiError(408, f"the request did not arrive within {READ_SECONDS:g} seconds") from None
            read += len(message.get("body", b""))
            if read > self._most:
                raise self._too_large()
            is_whole = not message.get("more_body", False)
            return message

        return bounded


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
