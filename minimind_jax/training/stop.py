"""The one place that decides whether a run should stop early: signals, and preemption of a cluster's machines."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A run was asked to stop and has saved its state; the process ends with code 128 + signal (SIGTERM 143, SIGINT
    130) unless this is caught."""


class StopRequest:
    """Turns the first SIGTERM or SIGINT (Ctrl-C) into a request that the loop asks for; a second one ends the process.

    With several processes JAX's preemption service listens for SIGTERM instead, which Ctrl-C is turned into, and all
    processes agree on the step.
    Use as a context manager, in the main thread; elsewhere signals keep their usual effect.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._is_alone = jax.process_count() == 1
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            handlers = dict.fromkeys(SIGNALS, self._on_signal) if self._is_alone else {signal.SIGINT: self._pass_on}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def should_stop(self, step: int) -> bool:
        """Whether to save and stop after `step`. All processes must ask at the same steps."""
        if not self._is_alone and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def exit(self) -> Interrupted:
        return Interrupted(128 + self.signal)

    def _on_signal(self, number: int, frame) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _pass_on(self, number: int, frame) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
