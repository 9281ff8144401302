"""The one place that decides whether a run should stop early: signals, and preemption of a cluster's machines."""

import contextlib
import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from minimind_jax.private import private_module
from minimind_jax.signals import SIGNALS, handling, say, silence_lost_outputs

ENDED_AT_ONCE = 1  # exit code of a run that was asked three times
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # where JAX's preemption service tells all processes that one was asked
_LOOK_EVERY = 1.0  # seconds between two looks there


class Interrupted(SystemExit):
    """A run was asked to stop and has saved its state; the process ends with code 128 + signal (SIGTERM 143, SIGINT
    130, SIGHUP 129) unless this is caught."""


class StopRequest(contextlib.ExitStack):
    """Turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a terminal that is closed) into a request that the loop asks for.

    What was heard is said at once, whatever the main thread is busy with, such as compiling. The third signal ends the
    process with code ENDED_AT_ONCE and saves nothing. A signal that is ignored, as SIGHUP is under nohup, stays so.
    With several processes JAX's preemption service listens for SIGTERM instead, which the others are turned into, and
    all processes agree on the step.
    Use as a context manager, in the main thread; elsewhere signals keep their usual effect.
    """

    def __init__(self):
        super().__init__()
        self.signal: signal.Signals | None = None
        self._is_alone = jax.process_count() == 1
        self._has_passed_on = False
        self._heard = 0
        numbers = [number for number in SIGNALS if self._is_alone or number != signal.SIGTERM]
        numbers = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self.enter_context(handling(numbers, self._on_signal if self._is_alone else self._pass_on, self._answer))

    def should_stop(self, number: int) -> bool:
        """Whether to save and stop now. number: of the question; all processes must ask the same ones, without a gap,
        for they agree on the next."""
        if self.signal is None and not self._is_alone and multihost_utils.reached_preemption_sync_point(number):
            self.agree()
        if self.signal is not None:
            silence_lost_outputs()
        return self.signal is not None

    def agree(self) -> None:
        """All processes call it: they have given up what they were at, since one was asked."""
        self.signal = self.signal or signal.SIGTERM

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

    def _answer(self, number: signal.Signals) -> None:
        again = "Press Ctrl-C" if number == signal.SIGINT else f"Send {number.name}"
        words = (
            f"saving, then stopping. {again} twice more to stop at once without saving.",
            f"still saving. {again} once more to stop at once and lose what is not saved.",
            "stopped at once; what was not saved is lost.",
        )
        say(f"{number.name}: {words[self._heard]}")
        self._heard += 1
        if self._heard == len(words):
            os._exit(ENDED_AT_ONCE)


class Notice:
    """Of several processes, whether one was asked to stop. They hear of it at different times, and agree by themselves
    on what they give up then. Raises UserError where JAX has no way to ask it."""

    def __init__(self):
        self._client, self._looked, self._heard = None, 0.0, False
        if jax.process_count() > 1:
            inner = private_module("jax._src.distributed", "global_state.client.key_value_try_get")
            self._client = inner.global_state.client

    def __call__(self) -> bool:
        if self._client and not self._heard and time.monotonic() > self._looked + _LOOK_EVERY:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is none
                self._heard = bool(self._client.key_value_try_get(_NOTICE))
            self._looked = time.monotonic()
        return self._heard
