"""Signals that ask a command to end: Ctrl-C, SIGTERM (schedulers, `kill`) and SIGHUP (a terminal that is closed).

Each becomes an exception, so that what was begun is put in order and told. Training answers them by saving, see
`training.stop`.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_SOON = 0.2  # seconds by which a handler may be ahead of the thread that hears of the same signal
_TOGETHER = 2.0  # seconds in which a second signal is the first again: a shell and the system both send SIGHUP

_left: list[Callable[[], str]] = []  # what is told of work that is cut off, see `telling`
_held: list[int] = []  # signals that came in `uninterrupted`
_holds = 0


class Stopped(SystemExit):
    """SIGTERM or SIGHUP has ended a command; code 128 + signal, unless it is caught."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def answering(patience: float = 1.0) -> Iterator[None]:
    """Within, SIGINT raises KeyboardInterrupt, and SIGTERM and SIGHUP raise Stopped. One that a long call, such as
    compiling, keeps waiting for `patience` seconds is answered, and the next one ends the process at once.

    A signal that is ignored, as under nohup, stays so. Does nothing outside of the main thread.
    """
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    delivered = float("-inf")  # when the handler ran last

    def deliver(number: int, frame) -> None:
        nonlocal delivered
        before, delivered = delivered, time.monotonic()
        silence_lost_outputs()
        if _holds:
            _held.append(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif delivered - before > _TOGETHER:
            raise Stopped(number)

    def is_delivered(since: float) -> bool:
        while delivered < since - _SOON:
            if time.monotonic() > since + patience:
                return False
            time.sleep(patience / 20)
        return True

    def listen() -> None:
        asked = float("-inf")  # when a signal came that is not delivered yet
        while received := os.read(receiving, 1):
            if received[0] not in numbers:
                continue
            if delivered < asked - _SOON:
                for tell in reversed(_left):
                    say(tell())
                os._exit(128 + received[0])
            if not is_delivered(since := time.monotonic()):
                asked, name = since, signal.Signals(received[0]).name
                again = "Press Ctrl-C again" if name == "SIGINT" else "Send it again"
                say(f"{name}: stopping when this part is done. {again} to stop at once.")

    listener = threading.Thread(target=listen, daemon=True)
    handlers = {number: signal.signal(number, deliver) for number in numbers}
    pipe = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        delivered = time.monotonic() + patience  # nothing is left to be answered
        os.close(sending)
        listener.join()
        os.close(receiving)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """For what must not be left half done, such as a few renames: a signal that comes within is answered behind it."""
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        if not _holds and _held:
            number = _held[0]
            _held.clear()
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)


@contextlib.contextmanager
def telling(
    tell: Callable[[], str], of: tuple[type[BaseException], ...] = (KeyboardInterrupt, Stopped)
) -> Iterator[None]:
    """Where the body is cut off, by one `of` these or at once, says what is there then and how to go on; nothing for
    an empty text."""
    _left.append(tell)
    try:
        yield
    except of:
        say(tell())
        raise
    finally:
        _left.remove(tell)


def say(text: str) -> None:
    """A line on the standard error, if somebody is there to read it; none for an empty text."""
    with contextlib.suppress(OSError, ValueError):
        if text:
            print(f"minimind: {text}", file=sys.stderr, flush=True)


def silence_lost_outputs() -> None:
    """Sends the outputs whose reader has left, a closed terminal or a pipe's other end, to nowhere: a run that saves
    must not fail because it says so."""
    if not hasattr(select, "poll"):
        return
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
