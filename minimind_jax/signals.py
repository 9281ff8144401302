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
    numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread() or not numbers:
        yield
        return
    answers = _Answers(numbers, patience)
    handlers = {number: signal.signal(number, answers.deliver) for number in numbers}
    hook, sys.unraisablehook = sys.unraisablehook, answers.raise_again
    try:
        yield
    except Exception as error:
        if answers.raised is not None and _is_made_of(error, answers.raised):
            raise answers.raised from error
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        answers.close()


class _Answers:
    """The handler of signals, and a thread that hears of them at once, even while the main thread cannot run it."""

    def __init__(self, numbers: list[int], patience: float):
        self.raised: BaseException | None = None
        self._numbers, self._patience, self._hook = numbers, patience, sys.unraisablehook
        self._delivered = float("-inf")  # when the handler ran last
        self._resend: threading.Timer | None = None
        self._own = 0  # signals on their way that were sent again, and not from outside
        # The system writes a signal's number into this pipe when it comes.
        self._receiving, self._sending = os.pipe()
        os.set_blocking(self._sending, False)
        self._earlier_pipe = signal.set_wakeup_fd(self._sending, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        if self._resend is not None:
            self._resend.cancel()
        signal.set_wakeup_fd(self._earlier_pipe)
        self._delivered = time.monotonic() + self._patience  # nothing is left to be answered
        os.close(self._sending)
        self._listener.join()
        os.close(self._receiving)

    def deliver(self, number: int, frame) -> None:
        if _is_import(frame):
            self._send_again(number)
            return
        before, self._delivered = self._delivered, time.monotonic()
        silence_lost_outputs()
        if _holds:
            _held.append(number)
        elif number == signal.SIGINT or self._delivered - before > _TOGETHER:
            self.raised = KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)
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

    def _listen(self) -> None:
        asked = float("-inf")  # when a signal came that is not delivered yet
        while received := os.read(self._receiving, 1):
            if received[0] not in self._numbers:
                continue
            if self._own:
                self._own -= 1
                continue
            if self._delivered < asked - _SOON:
                for tell in reversed(_left):
                    say(tell())
                os._exit(128 + received[0])
            if not self._is_delivered(since := time.monotonic()):
                asked, name = since, signal.Signals(received[0]).name
                again = "Press Ctrl-C again" if name == "SIGINT" else "Send it again"
                say(f"{name}: stopping when this part is done. {again} to stop at once.")

    def _is_delivered(self, since: float) -> bool:
        while self._delivered < since - _SOON:
            if time.monotonic() > since + self._patience:
                return False
            time.sleep(self._patience / 20)
        return True


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
