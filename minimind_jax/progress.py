"""A sign of life on stderr in long work: a bar or a spinner on a terminal, a line now and then elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 30.0  # seconds between two lines where there is no terminal

T = TypeVar("T")


@contextlib.contextmanager
def progress(what: str, total: int | None = None, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Shows that `what` goes on; yields a function that takes how many more are done.

    total: of how many; None where that is not known. show: false shows nothing.
    A thread draws, so one long call in the body is seen too, as long as it lets other threads run.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if not show:
        yield lambda count: None
    elif console.is_terminal:
        count = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
        counted = (BarColumn(), count, TimeRemainingColumn()) if total else ()
        columns = SpinnerColumn(), TextColumn("{task.description}"), *counted, TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
    else:
        with heartbeat(what, total) as advance:
            yield advance


def tracked(items: Iterable[T], what: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """The items, with a `progress` of one step each."""
    with progress(what, total, show=show) as advance:
        for item in items:
            yield item
            advance(1)


def first_awaited(items: Iterable[T], what: str) -> Iterator[T]:
    """The items, with a sign of life until the first is there: what is compiled is compiled before it."""
    iterator = iter(items)
    with progress(what):
        first = next(iterator, None)
    if first is not None:
        yield first
        yield from iterator


@contextlib.contextmanager
def heartbeat(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A line on stderr every LINE_EVERY seconds; yields as `progress` does."""
    done, started, ended = 0, time.monotonic(), threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        done += count

    def say() -> None:
        while not ended.wait(LINE_EVERY):
            of_all = f" of {total:,}" if total else ""
            so_far = f", {done:,}{of_all}" if done or total else ""
            passed = timedelta(seconds=round(time.monotonic() - started))
            print(f"{what}{so_far}, {passed} so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()
