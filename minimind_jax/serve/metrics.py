"""What Prometheus reads at /metrics, under vLLM's names, so that its dashboards show this server as well."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from minimind_jax.inference.engine import Engine

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_NEXT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

# Of an engine, as it is now: the name, what it is, and how much.
_GAUGES = (
    ("num_requests_running", "Requests that are being answered", lambda engine: engine.running),
    ("num_requests_waiting", "Requests that wait for a slot", lambda engine: engine.waiting),
    ("kv_cache_usage_perc", "Share of the cache that holds tokens, 1 is all", lambda engine: engine.cache_usage),
)
_COUNTS = (
    ("prefix_cache_queries", "Tokens of prompts", lambda engine: engine.counts["prompt_tokens"]),
    ("prefix_cache_hits", "Tokens of prompts found in the cache", lambda engine: engine.counts["cached_tokens"]),
)


class Metrics:
    """engines: under the names of their models."""

    def __init__(self, engines: Mapping[str, Engine]):
        self._registry = CollectorRegistry()
        self._registry.register(_Engines(engines))
        kept = {"registry": self._registry}
        model = ["model_name"]
        self.prompt = Counter("vllm:prompt_tokens", "Tokens of prompts", model, **kept)
        self.made = Counter("vllm:generation_tokens", "Tokens of answers", model, **kept)
        self.ended = Counter("vllm:request_success", "Answers by their end", [*model, "finished_reason"], **kept)
        first, following, whole = "time_to_first_token", "inter_token_latency", "e2e_request_latency"
        self.first = Histogram(f"vllm:{first}_seconds", "Until the first token", model, buckets=_FIRST, **kept)
        self.next = Histogram(f"vllm:{following}_seconds", "Between tokens", model, buckets=_NEXT, **kept)
        self.whole = Histogram(f"vllm:{whole}_seconds", "Until an answer is whole", model, buckets=_WHOLE, **kept)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engines(Collector):
    def __init__(self, engines: Mapping[str, Engine]):
        self._engines = engines

    def collect(self) -> Iterator[Any]:
        for kind, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTS)):
            for name, words, figure in table:
                family = kind(f"vllm:{name}", words, labels=["model_name"])
                for model, engine in self._engines.items():
                    family.add_metric([model], figure(engine))
                yield family


class Watch:
    """The clock of one request's answers."""

    def __init__(self, metrics: Metrics, model: str):
        self._metrics, self._model = metrics, model
        self._next, self._made = metrics.next.labels(model), metrics.made.labels(model)
        self._begin = time.monotonic()
        self._last: dict[int, float] = {}
        self._is_over = False

    def count(self, index: int, tokens: int, finish_reason: str | None) -> None:
        """The answer `index` has so many more tokens, and has ended if there is a reason."""
        now = time.monotonic()
        if tokens and index not in self._last:
            self._metrics.first.labels(self._model).observe(now - self._begin)
        elif tokens:
            self._next.observe((now - self._last[index]) / tokens)
        if tokens:
            self._last[index] = now
            self._made.inc(tokens)
        if finish_reason:
            self._metrics.ended.labels(self._model, finish_reason).inc()
            self._metrics.whole.labels(self._model).observe(now - self._begin)

    def end(self, prompts: Iterable[Sequence[int]], unfinished: int) -> None:
        """Nobody waits any more: for so many answers that were not finished."""
        if self._is_over:
            return
        self._is_over = True
        self._metrics.prompt.labels(self._model).inc(sum(map(len, prompts)))
        if unfinished:
            self._metrics.ended.labels(self._model, "abort").inc(unfinished)
