"""The one place that decides whether a run should stop early: signals, and preemption of a cluster's machines."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from minimind_jax.signals import SIGNALS, say, silence_lost_outputs

ENDED_AT_ONCE = 1  # exit code of a run that was asked three times


class Interrupted(SystemExit):
    """A run was asked to stop and has saved its state; the process ends with code 128 + signal (SIGTERM 143, SIGINT
    130, SIGHUP 129) unless this is caught."""


class StopRequest:
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that is closed) into a request that the loop asks for.

    What was heard is said at once, whatever the main thread is busy with, such as compiling. The third signal ends the
    process with code ENDED_AT_ONCE and saves nothing. A signal that is ignored, as SIGHUP is under nohup, stays so.
    With several processes JAX's preemption service listens for SIGTERM instead, which the others are turned into, and
    all processes agree on the step.
    Use as a context manager, in the main thread; elsewhere signals keep their usual effect.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._is_alone = jax.process_count() == 1
        self._previous: dict[int, object] = {}
        self._has_passed_on = False
        self._heard = 0
        self._listener: threading.Thread | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        numbers = [number for number in SIGNALS if self._is_alone or number != signal.SIGTERM]
        numbers = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        # The system writes a signal's number into this pipe when it comes, not when the main thread has time for it.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        handler = self._on_signal if self._is_alone else self._pass_on
        self._previous = {number: signal.signal(number, handler) for number in numbers}
        self._listener = threading.Thread(target=self._listen, args=(frozenset(numbers),), daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._listener is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            os.close(self._pipe[1])
            self._listener.join()
            os.close(self._pipe[0])
            self._listener = None

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after `step`. All processes must ask at the same steps."""
        if not self._is_alone and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        if self.signal is not None:
            silence_lost_outputs()
        return self.signal is not None

    def exit(self) -> Interrupted:
        return Interrupted(128 + self.signal)

    def _on_signal(self, number: int, frame) -> None:
        self.signal = self.signal or signal.Signals(number)
        silence_lost_outputs()

    def _pass_on(self, number: int, frame) -> None:
        silence_lost_outputs()
        if not self._has_passed_on:  # `signal` stays as it is: it must change on all processes at the same step
            self._has_passed_on = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _listen(self, numbers: frozenset[int]) -> None:
        while received := os.read(self._pipe[0], 1):
            if received[0] in numbers:
                self._answer(signal.Signals(received[0]))

    def _answer(self, number: signal.Signals) -> None:
        self._heard += 1
        again = "Press Ctrl-C" if number == signal.SIGINT else f"Send {number.name}"
        say(
            {
                1: f"{number.name}: saving, then stopping. {again} twice more to stop at once without saving.",
                2: f"{number.name}: still saving. {again} once more to stop at once and lose what is not saved.",
            }.get(self._heard, f"{number.name}: stopped at once; what was not saved is lost.")
        )
        if self._heard > 2:
            os._exit(ENDED_AT_ONCE)
