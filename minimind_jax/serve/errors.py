"""What goes wrong, as OpenAI's clients understand it: {"error": {message, type, param, code}} and a status."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from minimind_jax.errors import UserError
from minimind_jax.inference.request import Busy

RETRY_SECONDS = 1

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(HTTPException):
    """A request that is refused, or an answer that cannot be finished. param: the field at fault. code: OpenAI's."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(status, message, {name.replace("_", "-"): value for name, value in headers.items()} or None)
        self.param, self.code = param, code


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)


def too_many(error: Busy) -> ApiError:
    return ApiError(429, str(error), code="rate_limit_exceeded", retry_after=str(RETRY_SECONDS))


def too_slow(seconds: float) -> ApiError:
    return ApiError(504, f"the request took longer than {seconds:g} seconds", code="timeout")


def error_object(error: Exception) -> dict[str, Any]:
    """The body that says it. What is nobody's fault but ours is not told in detail."""
    if isinstance(error, UserError):
        error = refused(str(error))
    if not isinstance(error, HTTPException):
        error = ApiError(500, "the server made a mistake; its log says more")
    status = error.status_code
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return {"error": {"message": str(error.detail), "type": kind, "param": param, "code": code}}


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """The response to a request that has failed."""
    if isinstance(error, RequestValidationError):
        error = _of_validation(error)
    elif isinstance(error, Busy):
        error = too_many(error)
    elif isinstance(error, HTTPException) and not isinstance(error, ApiError):
        path = request.url.path[:100]
        speaks = "this server speaks OpenAI's protocol, and the base URL of its clients ends in /v1 (docs/serve.md)"
        told = {404: f"there is no {path}; {speaks}", 405: f"{path} does not take {request.method}"}
        error = ApiError(error.status_code, told.get(error.status_code, str(error.detail)), **(error.headers or {}))
    status = 400 if isinstance(error, UserError) else getattr(error, "status_code", 500)
    return JSONResponse(error_object(error), status, getattr(error, "headers", None))


def _of_validation(error: RequestValidationError) -> ApiError:
    found, inside, place = error.errors(), error.body, []
    of_one = (each for each in found if each["loc"][:2] == found[0]["loc"][:2])
    # Where a text or a list may stand: what is wrong in the one that was given, not that it is not the other.
    first = max(of_one, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    for part in first["loc"][1:]:  # behind the body's own name
        is_there = part in inside if isinstance(inside, dict) else isinstance(inside, list) and isinstance(part, int)
        if is_there or first["type"] == "missing" or not place:
            place.append(part)
            inside = inside[part] if is_there else None
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or None
    words = first["msg"].removeprefix("Value error, ")  # pydantic's, of what a model of ours says
    return refused(f"{param}: {words}" if param else words, param)


HANDLED = (HTTPException, RequestValidationError, UserError, Exception)
