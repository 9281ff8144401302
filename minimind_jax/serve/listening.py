"""From the settings to a server that listens, and to its end."""

import asyncio
import contextlib
import functools
import os
import sys
import time
import weakref
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from minimind_jax.config.serving import ServeConfig
from minimind_jax.errors import UserError
from minimind_jax.inference.score import PictureScorer
from minimind_jax.paths import as_path
from minimind_jax.serve import log
from minimind_jax.serve.app import Server, make_app
from minimind_jax.serve.errors import ApiError
from minimind_jax.serve.models import Models, load_models
from minimind_jax.serve.scoring import TOGETHER
from minimind_jax.serve.worker import Worker
from minimind_jax.texts import read_text
from minimind_jax.tools.toolbox import Toolbox

PAGE = Path(__file__).with_name("page")
KEY_VARIABLE = "MINIMIND_API_KEY"
IDLE_SECONDS = 75  # that a connection without requests is kept


def listen(config: ServeConfig) -> None:
    """Serves until a signal ends it; open answers are finished first. Raises UserError."""
    keys = api_keys(config.api_key_file)
    with Toolbox(config.tools) if config.tools else contextlib.nullcontext() as tools:
        log.set_up()
        models = load_models(config)
        try:
            Listening(config, models, keys, tools).run()
        finally:
            models.close()


def api_keys(file: str) -> list[str]:
    """The keys of a file, one a line, and of the environment. Raises UserError."""
    lines = read_text(as_path(file), "it holds the API keys, one a line").splitlines() if file else []
    found = [line.strip() for line in [*lines, os.environ.get(KEY_VARIABLE, "")]]
    keys = [key for key in found if key and not key.startswith("#")]
    if file and not keys:
        raise UserError(f"{file} holds no API key; write one a line, or leave api_key_file out")
    return keys


def open_page(url: str) -> bool:
    """Opens an address in the browser, if there is one with windows; a terminal's would take the server's terminal."""
    places = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # the last: what editors set that forward to another machine
    if sys.platform not in ("win32", "darwin") and not any(os.environ.get(place) for place in places):
        return False
    return webbrowser.open(url.replace("//0.0.0.0", "//127.0.0.1"))


def _report(name: str, done: int, total: int) -> None:
    if done * 4 % total < 4:  # about each quarter: a few lines, however many programs there are
        log.logger.info("compiling %s: %d of %d programs", name, done, total)


class Listening(uvicorn.Server):
    """The server at its address. Its worker warms up while it listens already: /health says 503 until then."""

    def __init__(self, config: ServeConfig, models: Models, keys: Sequence[str], tools: Toolbox | None = None):
        self._settings, self._models, self._keys = config, models, keys
        self._worker = Worker(models.engines)
        self._silent = weakref.WeakKeyDictionary()  # connection -> (its last request, since when there is no other)
        server = Server(config, models, self._worker)
        app = make_app(server, list(keys), PAGE if config.web else None, tools)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=int(config.drain_seconds) + 3,
            )
        )

    async def startup(self, sockets=None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:
            place = f"{self._settings.host}:{self._settings.port}"
            raise UserError(f"cannot listen at {place}; is another server there? --port 0 takes a free one") from None
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._say_open()
        self._worker.start(self._warm_up)

    def _warm_up(self) -> None:
        for served in self._models:
            if served.engine and not served.adapter:
                served.engine.warm_up(functools.partial(_report, served.name))
            if isinstance(served.scorer, PictureScorer):
                served.scorer.warm_up(TOGETHER)
        if self.should_exit:
            return
        log.logger.info("ready: %s/v1", self.url)
        if self._settings.open and not open_page(self.url):
            log.logger.info("there is no browser here to open %s in", self.url)

    def _say_open(self) -> None:
        names = ", ".join(served.name for served in self._models)
        log.logger.info("serving %s at %s%s", names, self.url, ", with a page" if self._settings.web else "")
        if not self._keys:
            local, open_to_all = "every program on this machine", "WHOEVER REACHES THIS MACHINE'S NETWORK"
            who = local if self._settings.is_local else open_to_all
            words = "no API key is set: %s may use the models (%s=KEY or --api_key_file sets one)"
            log.logger.warning(words, who, KEY_VARIABLE)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second."""
        if counter % 10 == 0:
            self._close_silent()
        return await super().on_tick(counter)

    def _close_silent(self) -> None:
        """Ends connections whose next request is not there in time; uvicorn waits for one that is begun for ever."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            request = getattr(connection, "cycle", None)
            last, since = self._silent.get(connection, (None, now))
            if request is not last or (request is not None and not request.response_complete):
                since = now
            self._silent[connection] = request, since
            if now - since > IDLE_SECONDS:
                connection.transport.close()

    async def shutdown(self, sockets=None) -> None:
        """Open answers are finished for a while; those that are not are told that no more comes."""
        self._worker.is_stopping, open_answers = True, self._worker.open_answers
        log.logger.info("stopping; %d open answers are finished first", open_answers)
        gone = ApiError(503, "the server is stopping")
        late = asyncio.get_running_loop().call_later(self._settings.drain_seconds, self._worker.abandon, gone)
        await super().shutdown(sockets)
        late.cancel()
        self._worker.stop()
        sys.stderr.flush()
