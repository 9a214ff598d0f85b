"""Prometheus metrics: one registry per application, so that two apps in one process never collide.

Two sources: what the server sees of each request (`Watch`), and `Engine.stats()`, read at scrape
time. A *request* here is one generation, text or picture: `n=3` counts three.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from deltafold.runtime.engine import Chunk, Stats
from deltafold.runtime.mixtures import is_mixture

#: The label of every variant beyond the cap.
OTHER: Final = "_other"
#: The label of all mixtures.
MIXTURES: Final = "_mixture"

_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_TOKEN_SECONDS: Final = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)


def package_version() -> str:
    """The installed version, `0+unknown` where only the source tree is there."""
    try:
        return version("deltafold")
    except PackageNotFoundError:
        return "0+unknown"


class LabelCap:
    """Lets the first `limit` variants have a label of their own; a zoo may hold thousands."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._seen: set[str] = set()
        self._lock = threading.Lock()  # scrapes run on another thread than requests

    def __call__(self, variant: str) -> str:
        """The variant's label; all mixtures share one, since their names are without number."""
        if is_mixture(variant):
            return MIXTURES
        with self._lock:
            if variant in self._seen:
                return variant
            if len(self._seen) >= self._limit:
                return OTHER
            self._seen.add(variant)
            return variant

    def fold(self, values: Mapping[str, int]) -> dict[str, int]:
        """Sum the values of variants that share a label."""
        folded: dict[str, int] = {}
        for variant, value in values.items():
            label = self(variant)
            folded[label] = folded.get(label, 0) + value
        return folded


class Metrics:
    """The counters and histograms of one application.

    Args:
        stats: reads the engine; None while there is none.
        max_variant_labels: how many variants get a label of their own.
    """

    def __init__(self, stats: Callable[[], Stats | None], *, max_variant_labels: int = 100) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self.label = LabelCap(max_variant_labels)
        self.requests = self._counter(
            "requests", "Finished generations.", ("variant", "finish_reason")
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.", ("variant",))
        self.generation_tokens = self._counter(
            "generation_tokens", "Generated tokens.", ("variant",)
        )
        self.replies = self._counter("http_replies", "HTTP replies.", ("route", "status"))
        self.request_seconds = self._histogram(
            "request_seconds", "From arrival to the last token.", _SECONDS
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.inter_token_seconds = self._histogram(
            "inter_token_seconds", "Between two tokens of one generation.", _TOKEN_SECONDS
        )
        self.registry.register(_EngineCollector(stats, self.label))

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"deltafold_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"deltafold_{name}", text, ("variant",), buckets=buckets, registry=self.registry
        )

    def count_reply(self, route: str, status: int) -> None:
        """Count one HTTP reply; status 0 stands for a client that left."""
        self.replies.labels(route, str(status)).inc()

    def count_pooled(self, variant: str, tokens: Sequence[int], seconds: float) -> None:
        """Count requests that gave labels or vectors, by their tokens."""
        label = self.label(variant)
        self.requests.labels(label, "stop").inc(len(tokens))
        self.prompt_tokens.labels(label).inc(sum(tokens))
        for _ in tokens:
            self.request_seconds.labels(label).observe(seconds)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class Watch:
    """Times one generation from its chunks. Used on the event loop only."""

    def __init__(self, metrics: Metrics, variant: str, arrived: float) -> None:
        self._metrics = metrics
        self._variant = metrics.label(variant)
        self._arrived = arrived
        self._last: float | None = None

    def accepted(self, prompt_tokens: int) -> None:
        """The engine took the request."""
        self._metrics.prompt_tokens.labels(self._variant).inc(prompt_tokens)

    def saw(self, chunk: Chunk) -> None:
        """The engine delivered a chunk."""
        now = time.perf_counter()
        if chunk.token_ids:
            self._tokens(len(chunk.token_ids), now)
        if chunk.finish_reason is not None:
            self._metrics.requests.labels(self._variant, chunk.finish_reason).inc()
            self._metrics.request_seconds.labels(self._variant).observe(now - self._arrived)

    def _tokens(self, count: int, now: float) -> None:
        self._metrics.generation_tokens.labels(self._variant).inc(count)
        if self._last is None:
            self._metrics.first_token_seconds.labels(self._variant).observe(now - self._arrived)
        else:
            gap = self._metrics.inter_token_seconds.labels(self._variant)
            for _ in range(count):  # a chunk may bring several tokens
                gap.observe((now - self._last) / count)
        self._last = now


class _EngineCollector(Collector):
    """Turns `Engine.stats()` into samples when Prometheus asks."""

    def __init__(self, stats: Callable[[], Stats | None], label: LabelCap) -> None:
        self._stats = stats
        self._label = label

    def collect(self) -> Iterator[Metric]:
        """One family per metric."""
        build = GaugeMetricFamily("deltafold_build_info", "Always 1.", labels=("version",))
        build.add_metric((package_version(),), 1)
        yield build
        stats = self._stats()
        if stats is not None:
            yield from _counters(stats)
            yield from _gauges(stats)
            yield self._by_variant(
                "requests_running", "Generations in the batch now.", stats.running_by_variant
            )
            yield self._by_variant(
                "delta_resident_bytes", "Memory that a variant's delta takes.", stats.resident
            )

    def _by_variant(self, name: str, text: str, values: Mapping[str, int]) -> Metric:
        family = GaugeMetricFamily(f"deltafold_{name}", text, labels=("variant",))
        for label, value in sorted(self._label.fold(values).items()):
            family.add_metric((label,), value)
        return family


def _counters(stats: Stats) -> Iterator[Metric]:
    yield CounterMetricFamily("deltafold_steps", "Forward passes.", value=stats.steps)
    yield CounterMetricFamily(
        "deltafold_base_only_steps",
        "Forward passes without a single delta row.",
        value=stats.base_only_steps,
    )


def _gauges(stats: Stats) -> Iterator[Metric]:
    used = stats.kv_tokens / stats.kv_capacity if stats.kv_capacity else 0.0
    for name, text, value in (
        ("requests_waiting", "Accepted generations that are not in the batch yet.", stats.waiting),
        ("batch_variants", "Distinct variants in the last step.", stats.batch_variants),
        ("kv_cache_usage_ratio", "Part of the key-value memory in use, 0 to 1.", used),
    ):
        yield GaugeMetricFamily(f"deltafold_{name}", text, value=value)
    memory = GaugeMetricFamily("deltafold_memory_bytes", "Memory by use.", labels=("kind",))
    memory.add_metric(("deltas",), sum(stats.resident.values()))
    yield memory
