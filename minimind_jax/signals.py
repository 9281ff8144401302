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
from collections.abc import Callable, Collection, Iterator
from types import FrameType

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

    An exception that never arrives, for it was raised in a callback of the garbage collector (JAX has one), is raised
    again; one that a library has made another error of, as its compiled parts do, is itself again. An import, which may
    do either, is waited for.
    A signal that is ignored, as under nohup, stays so. Does nothing outside of the main thread.
    """
    answers, hook = _Answers(patience), sys.unraisablehook
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    with handling(numbers, answers.deliver, answers.hear):
        try:
            sys.unraisablehook = answers.raise_again
            yield
        except Exception as error:
            if answers.raised is not None and _is_made_of(error, answers.raised):
                raise answers.raised from error
            raise
        finally:
            sys.unraisablehook = hook
            answers.end()


@contextlib.contextmanager
def handling(
    numbers: Collection[int], handler: Callable[[int, FrameType | None], None], hear: Callable[[signal.Signals], None]
) -> Iterator[None]:
    """Within, `handler` answers these signals, and a thread calls `hear` when one comes, even while the main thread can
    run no handler. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiving, sending = os.pipe()  # the system writes a signal's number into it when it comes
    os.set_blocking(sending, False)
    earlier_pipe = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)

    def listen() -> None:
        while received := os.read(receiving, 1):
            if received[0] in numbers:
                hear(signal.Signals(received[0]))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)
        signal.set_wakeup_fd(earlier_pipe)
        os.close(sending)
        listener.join()
        os.close(receiving)


class _Answers:
    """What signals raise, and what is said of one that the main thread cannot answer."""

    def __init__(self, patience: float):
        self.raised: BaseException | None = None
        self._patience, self._hook = patience, sys.unraisablehook
        self._delivered = float("-inf")  # when the handler ran last
        self._resend: threading.Timer | None = None
        self._own = 0  # signals on their way that were sent again, and not from outside
        self._asked = float("-inf")  # when a signal came that is not delivered yet
        self._has_ended = False

    def end(self) -> None:
        self._has_ended = True
        if self._resend is not None:
            self._resend.cancel()

    def deliver(self, number: int, frame) -> None:
        if _is_import(frame):
            self._send_again(number)
            return
        before, self._delivered = self._delivered, time.monotonic()
        silence_lost_outputs()
        if _holds:
            _held.append(number)
        elif number == signal.SIGINT or self._delivered - before > _TOGETHER:
            self.raised = _exception_of(number)
            raise self.raised

    def raise_again(self, lost: "sys.UnraisableHookArgs") -> None:
        if self.raised is None or lost.exc_value is not self.raised:
            self._hook(lost)
            return
        self._delivered = float("-inf")
        self._send_again(getattr(self.raised, "signal", signal.SIGINT))

    def _send_again(self, number: int) -> None:
        self._own += 1
        self._resend = threading.Timer(_SOON / 4, os.kill, [os.getpid(), number])
        self._resend.start()

    def hear(self, number: signal.Signals) -> None:
        if self._own:
            self._own -= 1
            return
        if self._delivered < self._asked - _SOON:
            for tell in reversed(_left):
                say(tell())
            os._exit(128 + number)
        if not self._is_delivered(since := time.monotonic()):
            self._asked = since
            again = "Press Ctrl-C again" if number == signal.SIGINT else "Send it again"
            say(f"{number.name}: stopping when this part is done. {again} to stop at once.")

    def _is_delivered(self, since: float) -> bool:
        while self._delivered < since - _SOON and not self._has_ended:
            if time.monotonic() > since + self._patience:
                return False
            time.sleep(self._patience / 20)
        return True


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _is_made_of(error: BaseException | None, raised: BaseException) -> bool:
    while error is not None and error is not raised:
        if type(raised).__name__ in str(error):
            return True
        error = error.__cause__ or error.__context__
    return error is raised


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; where a signal ends it, which is told, 128 + signal."""
    try:
        with answering():
            return work()
    except KeyboardInterrupt:
        say("stopped")
        return 128 + signal.SIGINT
    except Stopped as stop:
        say(f"{stop.signal.name}: stopped")
        return stop.code


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
            raise _exception_of(number)


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
