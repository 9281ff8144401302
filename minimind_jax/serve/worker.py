"""The thread that alone touches the device: it lets engines step, and hands their news to the event loop."""

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from minimind_jax.errors import UserError
from minimind_jax.inference.engine import Engine
from minimind_jax.inference.request import Answer, Busy, Request, Token
from minimind_jax.model.transformer import Params
from minimind_jax.serve.errors import RETRY_SECONDS, ApiError, too_many, too_slow
from minimind_jax.serve.log import logger

IDLE_SECONDS = 0.02  # between two looks whether the answers are finished
_REPLACED = "the model's weights are being replaced; try again soon"


class News(NamedTuple):
    """What one answer of a ticket has become. finish_reason: None while it grows."""

    index: int
    tokens: list[Token]
    text: str
    finish_reason: str | None
    stop_reason: str | int | None
    cached_tokens: int


class Ticket:
    """Answers that were asked for together, and their news, which the event loop takes."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.news: asyncio.Queue[News | Exception] = asyncio.Queue()
        self.answers: list[Answer] = []
        self.engine: Engine | None = None
        self.is_over = False  # nobody waits for news any more

    def tell(self, news: Iterable[News | Exception]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._put, list(news))

    def _put(self, news: list[News | Exception]) -> None:
        if not self.is_over:
            for each in news:
                self.news.put_nowait(each)


class Worker:
    """engines: that step in turns. is_ready: the programs are there. is_stopping: no more requests are taken. fault:
    what has ended it."""

    def __init__(self, engines: Sequence[Engine]):
        self.engines = list(engines)
        self.is_ready, self.is_stopping, self.fault = False, False, ""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[int, tuple[Ticket, int, Answer]] = {}  # by the id of the answer
        self._loading: set[Engine] = set()  # that are about to get other parameters
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self, warm_up: Callable[[], None]) -> None:
        """warm_up: runs first; then the server is ready."""

        def first() -> None:
            warm_up()
            self.is_ready = not self.fault

        self._jobs.put(first)
        self._thread.start()

    def stop(self) -> None:
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    @property
    def open_answers(self) -> int:
        return len(self._open)

    def check(self) -> None:
        """Raises ApiError unless requests are taken."""
        self._check_fault()
        if self.is_stopping:
            raise ApiError(503, "the server is stopping")
        if not self.is_ready:
            raise ApiError(503, "the model is loading; try again soon", retry_after=str(RETRY_SECONDS))

    def _check_fault(self) -> None:
        if self.fault:
            raise ApiError(503, f"the server has failed and must be started again: {self.fault}")

    async def run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What a function that computes returns, between two steps of the engines."""
        self._check_fault()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                self._check_fault()
                future.set_result(work(*arguments))
            except Exception as error:  # the caller's; the next job is another's
                future.set_exception(error)

        self._jobs.put(job)
        return await asyncio.wrap_future(future)

    async def ask(self, engine: Engine, requests: Sequence[Request]) -> Ticket:
        """Begins all of the answers, or none. Raises UserError for a bad request, ApiError 429 where too many wait."""
        if engine in self._loading:
            raise ApiError(503, _REPLACED, retry_after=str(RETRY_SECONDS))
        ticket = Ticket(asyncio.get_running_loop())
        try:
            await self.run(self._submit, ticket, engine, requests)
        except Busy as error:
            raise too_many(error) from error
        except BaseException:
            self.cancel(ticket)
            raise
        return ticket

    async def load(self, engine: Engine, params: Params, seconds: float) -> None:
        """Gives an engine other parameters as soon as its open answers are finished; requests that come meanwhile are
        refused. Raises ApiError, also where the answers are not finished in so many seconds."""
        if engine in self._loading:
            raise ApiError(503, _REPLACED, retry_after=str(RETRY_SECONDS))
        self._loading.add(engine)
        deadline = time.monotonic() + seconds
        try:
            while not await self.run(_load_if_idle, engine, params):
                if time.monotonic() > deadline:
                    raise too_slow(seconds)
                await asyncio.sleep(IDLE_SECONDS)
        finally:
            self._loading.discard(engine)

    def cancel(self, ticket: Ticket) -> None:
        """Ends what still grows; nobody waits for it."""
        ticket.is_over = True
        self._jobs.put(lambda: self._cancel(ticket))

    def cancel_one(self, ticket: Ticket, index: int) -> None:
        """Ends one answer, whose last news come as `cancelled`."""
        self._jobs.put(lambda: self._cancel(ticket, index))

    def abandon(self, error: Exception) -> None:
        """Tells all who wait that no more comes, and ends their answers."""

        def job() -> None:
            answers = [(ticket.engine, answer) for ticket, _, answer in self._open.values()]
            self._open_to(error)
            for engine, answer in answers:
                engine.cancel(answer)

        self._jobs.put(job)

    # In the thread ----------------------------------------------------------------------------------------------------

    def _submit(self, ticket: Ticket, engine: Engine, requests: Sequence[Request]) -> None:
        ticket.engine = engine
        try:
            for request in requests:
                ticket.answers.append(engine.submit(request))
        except UserError:
            self._cancel(ticket)
            raise
        for index, answer in enumerate(ticket.answers):
            self._open[id(answer)] = ticket, index, answer
        if ticket.is_over:
            self._cancel(ticket)

    def _cancel(self, ticket: Ticket, index: int | None = None) -> None:
        for answer in ticket.answers if index is None else ticket.answers[index : index + 1]:
            if answer.finish_reason is None:
                ticket.engine.cancel(answer)
            self._tell([answer])

    def _work(self) -> None:
        try:
            while True:
                busy = [engine for engine in self.engines if engine.busy]
                while not (busy and self._jobs.empty()):
                    job = self._jobs.get()
                    if job is None:
                        return
                    job()
                    busy = [engine for engine in self.engines if engine.busy]
                for engine in busy:
                    self._tell(engine.step())
        except BaseException as error:
            self.is_ready, self.fault = False, f"{type(error).__name__}: {str(error)[:200]}"
            logger.exception("the engine has failed; open requests are told, and /health says 503")
            self._open_to(ApiError(500, f"the engine has failed: {self.fault}"))
            self._refuse_rest()

    def _tell(self, answers: Iterable[Answer]) -> None:
        news: dict[Ticket, list[News]] = {}
        for answer in answers:
            ticket, index, _ = self._open.get(id(answer), (None, 0, None))
            if ticket is None:
                continue
            tokens, text = answer.news()
            if answer.finish_reason:
                del self._open[id(answer)]
            if answer.error:
                ticket.tell([answer.error])
                continue
            told = News(index, tokens, text, answer.finish_reason, answer.stop_reason, answer.cached_tokens)
            news.setdefault(ticket, []).append(told)
        for ticket, each in news.items():
            ticket.tell(each)

    def _open_to(self, error: Exception) -> None:
        for ticket in {ticket for ticket, _, _ in self._open.values()}:
            ticket.tell([error])
        self._open.clear()

    def _refuse_rest(self) -> None:
        """Jobs that come after a fault are answered, each by its own error: nobody waits for ever."""
        while True:
            job = self._jobs.get()
            if job is None:
                return
            with contextlib.suppress(Exception):
                job()


def _load_if_idle(engine: Engine, params: Params) -> bool:
    if not engine.busy:
        engine.load(params)
        return True
    return False
