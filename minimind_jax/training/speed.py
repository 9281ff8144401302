"""How fast a run goes: tokens a second, MFU, the time that is left."""

import contextlib
import time
from collections.abc import Iterator

from minimind_jax.model.transformer import LanguageModel
from minimind_jax.training.flops import flops_per_token, peak_flops


class Speed:
    """Wall-clock numbers of a run: pauses (evaluation, samples, saves) and the first step, which compiles, left out.

    seconds_before: duration of the run up to the checkpoint it goes on from. has_words: as of `flops_per_token`.
    """

    def __init__(self, model: LanguageModel, seq_len: int, seconds_before: float, has_words: bool = True):
        self._started = time.perf_counter() - seconds_before
        peak = peak_flops(model.compute)
        flops = flops_per_token(model.config, seq_len, model.adapter is not None, has_words=has_words)
        self._mfu_per_token = flops / peak if peak else None
        self._since: float | None = None  # start of the window that `read` ends
        self._tokens = self._window_steps = 0
        self._steps, self._active = 0, 0.0

    def seconds(self) -> float:
        """Since the run was first started, pauses included, time between a kill and the resume not."""
        return time.perf_counter() - self._started

    @property
    def has_begun(self) -> bool:
        """Whether a step was added."""
        return self._since is not None

    def add(self, tokens: int) -> None:
        """A step with this many tokens (padding not counted) is done."""
        if self._since is None:
            self._since = time.perf_counter()
            return
        self._tokens += tokens
        self._window_steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """seconds, tokens_per_second and mfu over the steps since the last reading; starts a new window."""
        numbers = {"seconds": round(self.seconds(), 3)}
        if self._window_steps:
            now = time.perf_counter()
            rate = self._tokens / (now - self._since)
            numbers["tokens_per_second"] = round(rate, 1)
            if self._mfu_per_token:
                numbers["mfu"] = round(rate * self._mfu_per_token, 4)
            self._steps, self._active = self._steps + self._window_steps, self._active + now - self._since
            self._since, self._tokens, self._window_steps = now, 0, 0
        return numbers

    def forecast(self, steps_left: int) -> dict[str, float]:
        """What a progress bar shows between two readings."""
        if not self._window_steps + self._steps:
            return {}
        now = time.perf_counter()
        active, steps = self._active + (now - self._since), self._steps + self._window_steps
        numbers = {"seconds_left": active / steps * steps_left}
        if self._window_steps:
            rate = self._tokens / (now - self._since)
            numbers["tokens_per_second"] = rate
            if self._mfu_per_token:
                numbers["mfu"] = rate * self._mfu_per_token
        return numbers
