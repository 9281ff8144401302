"""JSON over HTTP, from a server that may be busy, or gone for a while."""

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from minimind_jax.errors import UserError
from minimind_jax.signals import say

KEY_VARIABLE = "MINIMIND_API_KEY"
BUSY, FAILED = 429, 500  # come again, and so from FAILED on
MOST_BYTES = 1 << 26  # of an answer
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds between two tries


class NotThere(UserError):
    """The server has no such path."""


class Server:
    """url: UserError for one that is none. seconds: that an answer may take to begin or to go on. patience: so long, in
    seconds, a server is asked again that is busy, fails or does not listen. key_variable: of the environment; sent as
    `Authorization: Bearer`, and never told. Threads may share it."""

    def __init__(self, url: str, seconds: float, patience: float, key_variable: str = KEY_VARIABLE):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"the server {url!r} has no address of HTTP, such as http://127.0.0.1:8000")
        self.url, self._seconds, self._patience, self._key_variable = url, seconds, patience, key_variable
        self._has_told = False

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server answers. Raises NotThere, or UserError with what it says or why there is no answer."""
        told = json.dumps(body, ensure_ascii=False, default=str).encode("utf-8", "replace")
        asked = urllib.request.Request(self.url + path, told, {"Content-Type": "application/json"})
        if key := os.environ.get(self._key_variable, "").strip():
            asked.add_header("Authorization", f"Bearer {key}")
        deadline, wait = time.monotonic() + self._patience, FIRST_WAIT
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=self._seconds) as answer:
                    return json.loads(answer.read(MOST_BYTES))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_said(error)}"
                if error.code in (404, 405):
                    raise NotThere(f"{self.url}{path}: {reason}") from error
                if error.code != BUSY and error.code < FAILED:
                    raise UserError(f"{self.url}{path}: {reason}") from error
            except TimeoutError as error:
                raise UserError(f"{self.url}{path}: no answer within {self._seconds:g} seconds") from error
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                raise UserError(f"{self.url}{path}: the answer is not JSON: {error}") from error
            if time.monotonic() + wait > deadline:
                raise UserError(f"{self.url} has not answered for {self._patience:g} seconds: {reason}")
            if not self._has_told:
                self._has_told = True
                say(f"{self.url} is asked again for up to {self._patience:g} seconds, as always (said once): {reason}")
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


def _said(error: urllib.error.HTTPError) -> str:
    """What the server has to say about an error, in OpenAI's, vLLM's or SGLang's shape."""
    text = str(error.reason)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
        text = error.read(1 << 16).decode("utf-8", "replace") or text
        found = json.loads(text)
        found = found.get("error", found)
        text = found if isinstance(found, str) else found.get("message") or found.get("detail") or text
    return str(text)[:500]
