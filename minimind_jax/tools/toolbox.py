"""Calls of tools, bounded in time, memory and output: each runs in a process that waits for it and is ended if need be.

A process can be ended on every platform, whatever it does; a thread or a signal cannot interrupt 9**9**9.
"""

import concurrent.futures
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import psutil

from minimind_jax.errors import UserError
from minimind_jax.tools.schema import Schema
from minimind_jax.tools.worker import error_text

_LOOK_EVERY = 0.05  # seconds between two looks at the memory of a worker that computes
_MAX_ARGUMENTS = 50_000  # bytes of a call: it must fit into a pipe that nobody reads

_BOOT = """import json, sys
sys.path[:], *settings = json.loads(sys.argv[1])
from minimind_jax.tools.worker import serve
serve(*settings)"""


class Observation(NamedTuple):
    """What a model is told of its call: the result, or {"error": ...}."""

    text: str
    is_error: bool = False


class Toolbox(contextlib.AbstractContextManager):
    """Tools, and the warm processes they run in.

    names: `calculator`, `time`, `units`, `random`, `text`, `all` for these, or functions of the user's own as
        `module:function`, `file.py:function` or `file.py`.
    seconds, memory_mib: what a call may take, beside the memory that importing took; more ends it.
    characters: of a result; the rest is cut off, and said.
    workers: calls that run at the same time; a process is started when it is first needed.
    loader: makes tools of the names, in each process, as `tools/worker.py:load` does; `module:function`.
    start_seconds: that a process may take for it.
    schemas: of all tools, as a chat template takes them.

    Raises UserError for a tool that cannot be found or has no schema.
    """

    def __init__(
        self,
        names: Sequence[str] = ("all",),
        *,
        seconds: float = 5.0,
        memory_mib: int = 1024,
        characters: int = 2048,
        workers: int = 4,
        loader: str = "minimind_jax.tools.worker:load",
        start_seconds: float = 60.0,
    ):
        self._seconds, self._memory, self._start_seconds = seconds, memory_mib << 20, start_seconds
        self._settings = [list(names), characters, loader]
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: a worker that is not started
        for _ in range(workers):
            self._idle.put(None)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers)
        first = self._start()
        self.schemas: list[Schema] = first.schemas
        self.names = [schema["function"]["name"] for schema in self.schemas]
        self._idle.get()
        self._idle.put(first)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes, when their calls are done."""
        self._threads.shutdown()
        with contextlib.suppress(queue.Empty):
            while True:
                if worker := self._idle.get_nowait():
                    worker.end()

    def call(self, name: str, arguments: Any, seed: int | None = None) -> Observation:
        """The result of one call as text; whatever is wrong with it or happens in it is text, too.

        seed: of Python's `random` for this call. Threads may call at the same time.
        """
        if name not in self.names:
            return Observation(error_text(f"there is no tool {name!r:.60}; there are {', '.join(self.names)}"), True)
        try:
            request = json.dumps([name, arguments, seed, self._seconds]).encode() + b"\n"
        except (TypeError, ValueError, RecursionError):
            return Observation(error_text("the arguments are no JSON object that can be read"), True)
        if len(request) > _MAX_ARGUMENTS:
            return Observation(error_text(f"the arguments are longer than {_MAX_ARGUMENTS:,} bytes"), True)
        worker = self._idle.get()
        try:
            worker = worker if worker and worker.is_alive() else self._start()
            is_error, text = worker.ask(request, self._seconds, self._memory)
            return Observation(text, is_error)
        except (_EndedError, UserError) as error:
            return Observation(error_text(f"{name} {error}" if isinstance(error, _EndedError) else str(error)), True)
        finally:
            self._idle.put(worker)

    def call_all(self, calls: Iterable[tuple[str, Any]], seeds: Iterable[int] | None = None) -> list[Observation]:
        """The results of (name, arguments), in their order, as many at the same time as there are workers."""
        calls = list(calls)
        return list(self._threads.map(lambda call, seed: self.call(*call, seed), calls, seeds or [None] * len(calls)))

    def _start(self) -> "_Worker":
        return _Worker([["", *sys.path], *self._settings], self._start_seconds)


class _EndedError(Exception):
    """A worker was ended in a call, or ended itself; says why."""


class _Worker:
    """A process that answers calls. schemas: of its tools."""

    def __init__(self, settings: list[Any], seconds: float):
        # A group of its own: Ctrl-C is for the program, which ends the group when it likes.
        apart: dict[str, Any] = {"start_new_session": True}
        if os.name == "nt":
            apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart,
        )  # fmt: skip
        self._at_rest = 0  # bytes that it takes without a call
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            told = self._wait(seconds, sys.maxsize)
        except _EndedError as ended:
            raise UserError(f"{', '.join(settings[1])}: importing {ended}") from None
        if "fault" in told:
            self.end()
            raise UserError(told["fault"])
        self.schemas = told["schemas"]
        self._at_rest = self._memory()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, seconds: float, memory: int) -> list[Any]:
        """The answer to one call. Raises _EndedError; whatever is raised, the process is ended then."""
        with contextlib.suppress(OSError):  # it has just ended; the answer says so
            self._process.stdin.write(request)
            self._process.stdin.flush()
        return self._wait(seconds, memory)

    def _wait(self, seconds: float, memory: int) -> Any:
        deadline = time.monotonic() + seconds
        try:
            while True:
                with contextlib.suppress(queue.Empty):
                    line = self._answers.get(timeout=max(0.0, min(_LOOK_EVERY, deadline - time.monotonic())))
                    if not line:
                        raise _EndedError("ended its own process")
                    if self._memory() - self._at_rest > memory // 2:
                        self.end()  # it has kept so much; the next call gets a new process
                    return json.loads(line)
                if self._memory() - self._at_rest > memory:
                    raise _EndedError(f"took more than {memory >> 20:,} MiB of memory")
                if time.monotonic() >= deadline:
                    raise _EndedError(f"took longer than {seconds:g} seconds")
        except BaseException:
            self.end()
            raise

    def _memory(self) -> int:
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self._process.pid).memory_info().rss
        return 0

    def end(self) -> None:
        """Ends the process and what it has started."""
        with contextlib.suppress(OSError):
            if os.name == "nt":
                self._process.kill()
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
