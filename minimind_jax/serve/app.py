"""The routes."""

import asyncio
import inspect
import mimetypes
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse

from minimind_jax import __version__
from minimind_jax.config.serving import ServeConfig
from minimind_jax.data.values import loads
from minimind_jax.inference.request import Busy
from minimind_jax.serve import chat, completions, pictures, protocol, responses, scoring, tokens, weights
from minimind_jax.serve.answers import Answers, while_there
from minimind_jax.serve.chat import Asked
from minimind_jax.serve.drawing import refuse_others, tell_ignored
from minimind_jax.serve.errors import HANDLED, answer_error, too_many, too_slow
from minimind_jax.serve.guard import Guard
from minimind_jax.serve.metrics import Metrics, Watch
from minimind_jax.serve.models import Models, Served
from minimind_jax.serve.protocol import Body
from minimind_jax.serve.reading import Route
from minimind_jax.serve.stream import EventStream, Shape
from minimind_jax.serve.worker import Worker
from minimind_jax.tools.toolbox import Toolbox

DECODERS = 2  # requests whose pictures are read at the same time
T = TypeVar("T")


class Server:
    """What all routes share."""

    def __init__(self, config: ServeConfig, models: Models, worker: Worker):
        self.config, self.models, self.worker = config, models, worker
        self._decoders, self._decoding = ThreadPoolExecutor(DECODERS, "pictures"), 0
        # adapters share the engine of their model
        self.metrics = Metrics({each.name: each.engine for each in models if each.engine and not each.adapter})

    async def respond(
        self, http: Request, body: Body, ask: Callable[[Any, Served, ServeConfig], Asked], shape: type[Shape]
    ) -> Response:
        """The answers to a request, in one piece or as a stream; whoever goes away frees their rows.

        ask: what the request asks of the engine, computed aside for it may take a while.
        """
        self.worker.check()
        refuse_others(body)
        served = self.models.get(body.model, "generate")
        found = await self._in_time(http, self.aside(body, served, ask, self.config))
        if found is None:
            return Response(status_code=499)
        tell_ignored(body)  # not of what is refused
        requests, choices = found
        watch = Watch(self.metrics, served.name)
        ticket = await self.worker.ask(served.engine, requests)
        answers = Answers(self.worker, ticket, choices, self.config.max_seconds, watch, http.state.told)
        made = shape(body, served)
        if body.stream:
            return EventStream(made.events(answers), answers.close)
        try:
            found = await while_there(http, answers.all())
            return Response(status_code=499) if found is None else JSONResponse(made.whole(answers))
        finally:
            answers.close()

    async def compute(self, http: Request, body: Body, work: Callable[..., Any], kind: str, *more: Any) -> Response:
        """What a function makes of the request and of its model, which is of this kind."""
        self.worker.check()
        served = self.models.get(body.model, kind)
        is_own_task = inspect.iscoroutinefunction(work)
        found = work(body, served, *more) if is_own_task else self.aside(body, served, work, *more)
        found = await self._in_time(http, found)
        tell_ignored(body)
        return Response(status_code=499) if found is None else JSONResponse(found)

    async def _in_time(self, http: Request, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work comes to; None when the client goes away before. Raises ApiError after `max_seconds`."""
        try:
            return await while_there(http, asyncio.wait_for(work, self.config.max_seconds))
        except TimeoutError:
            raise too_slow(self.config.max_seconds) from None

    async def aside(self, body: Body, served: Served, work: Callable[..., Any], *more: Any) -> Any:
        """What a function makes of a request, in a thread: with pictures in one of a few, for each may take much memory
        while it is decoded. Raises ApiError 429 where too many wait for that."""
        run = asyncio.get_running_loop().run_in_executor
        if not await pictures.fetch(body, served, self.config):
            return await run(None, work, body, served, *more)
        if self._decoding >= DECODERS + self.config.queue:
            raise too_many(Busy(f"{self.config.queue} requests wait already for pictures to be read; try again later"))
        self._decoding += 1
        try:
            return await run(self._decoders, work, body, served, *more)
        finally:
            self._decoding -= 1


def make_app(server: Server, keys: list[str], page: Path | None = None, tools: Toolbox | None = None) -> FastAPI:
    """page: a folder of static files, shown at /. tools: whose calls it may have carried out."""
    app = FastAPI(title="minimind_jax", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.router.route_class = Route
    for kind in HANDLED:
        app.add_exception_handler(kind, answer_error)
    free = {"/health"}
    _add_models(app, server)
    _add_requests(app, server)
    if server.config.update_weights:
        _add_weights(app, server)
    if tools or page:
        _add_tools(app, tools)
    if page:
        free |= _add_page(app, page)
    config = server.config
    app.add_middleware(Guard, keys=keys, free=free, most_bytes=config.most_bytes, is_local=config.is_local)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _add_models(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        server.worker.check()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_object(each) for each in server.models]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_model_object(server.models.get(name)))


def _model_object(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "minimind_jax",
        "root": served.folder.name,
        "parent": served.parent,
        "max_model_len": served.context,
        "task": served.kind,
        "architecture": {"input_modalities": served.reads, "output_modalities": ["text"] if served.engine else []},
    }


def _add_requests(app: FastAPI, server: Server) -> None:
    """A route for each kind of request: its path, its body, and the rest of what the server is called with."""
    worker, thinking = server.worker, server.config.thinking

    def add(handle: Callable[..., Any], path: str, kind: type[Body], *more: Any) -> None:
        @app.post(path)
        async def answer(body: kind, http: Request) -> Response:
            return await handle(http, body, *more)

    for row in (
        ("/v1/chat/completions", protocol.ChatRequest, chat.ask, chat.ChatShape),
        ("/v1/completions", protocol.CompletionRequest, completions.ask, completions.CompletionShape),
        ("/v1/responses", protocol.ResponsesRequest, responses.ask, responses.ResponsesShape),
    ):
        add(server.respond, *row)
    for row in (
        ("/v1/embeddings", protocol.EmbeddingRequest, scoring.embeddings, "generate", worker),
        ("/classify", protocol.ClassifyRequest, scoring.classify, "classify", worker, server.aside),
        ("/score", protocol.ScoreRequest, scoring.score, "score", worker),
        ("/tokenize", protocol.TokenizeRequest, tokens.tokenize, "text", thinking),
        ("/detokenize", protocol.DetokenizeRequest, tokens.detokenize, "text"),
        ("/apply-template", protocol.TemplateRequest, tokens.apply_template, "text", thinking),
    ):
        add(server.compute, *row)


def _add_weights(app: FastAPI, server: Server) -> None:
    @app.post("/update_weights_from_disk")
    async def update_weights(body: protocol.WeightsRequest) -> Response:
        server.worker.check()
        tell_ignored(body)
        return JSONResponse(await weights.update(body, server.models, server.worker, server.config.max_seconds))


def _add_tools(app: FastAPI, tools: Toolbox | None) -> None:
    """Calls that the page has carried out, which asks for the tools where there are none, too."""

    @app.get("/tools")
    async def schemas() -> Response:
        return JSONResponse({"tools": tools.schemas if tools else []})

    if not tools:
        return

    @app.post("/tools/call")
    async def call(body: protocol.ToolCallRequest) -> Response:
        given = body.arguments
        arguments = loads(given or "{}", "arguments") if isinstance(given, str) else given
        result = await asyncio.to_thread(tools.call, body.name, arguments)
        return JSONResponse({"content": result.text, "is_error": result.is_error})


# The chat page -------------------------------------------------------------------------------------------------------

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _add_page(app: FastAPI, folder: Path) -> set[str]:
    """Every file of the folder under its path, and index.html as /; those paths, which hold nothing of the models."""
    paths = {f"/{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*") if file.is_file()}
    paths["/"] = folder / "index.html"
    for path, file in paths.items():
        kind = "text/javascript" if file.suffix == ".js" else mimetypes.types_map.get(file.suffix, "text/plain")

        async def send(file: Path = file, kind: str = kind) -> Response:
            return FileResponse(file, headers=_HEADERS, media_type=kind)

        app.add_api_route(path, send, methods=["GET"], include_in_schema=False)
    return set(paths)
