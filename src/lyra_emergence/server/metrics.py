"""The figures of a server in Prometheus' form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from lyra_emergence.server.engine import Engine

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics(Collector):
    """Reads an engine's figures whenever they are asked for.

    Args:
        engine: The engine.
        statuses: The number of responses by status.
    """

    def __init__(self, engine: Engine, statuses: Counter[int]) -> None:
        self._engine = engine
        self._statuses = statuses
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self) -> bytes:
        """Return all of them as text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield each metric with its values."""
        figures = self._engine.figures()
        yield GaugeMetricFamily("lyra_answers_running", "answers that run", figures.running)
        yield GaugeMetricFamily("lyra_requests_waiting", "requests that wait for their turn", figures.waiting)
        yield GaugeMetricFamily("lyra_tokens_reserved", "tokens that running answers may come to", figures.reserved)
        yield GaugeMetricFamily("lyra_tokens_room", "tokens that they may come to at most", figures.room)
        yield CounterMetricFamily("lyra_prompt_tokens", "tokens of prompts that were answered", figures.prompt_tokens)
        yield CounterMetricFamily("lyra_generated_tokens", "tokens that were generated", figures.new_tokens)
        yield CounterMetricFamily(
            "lyra_recoveries", "times that memory ran out and an answer went on", figures.recoveries
        )
        ended = CounterMetricFamily("lyra_answers", "answers that ended, by how", labels=["outcome"])
        for outcome, count in sorted(figures.ended.items()):
            ended.add_metric([outcome], count)
        yield ended
        responses = CounterMetricFamily("lyra_http_responses", "responses by status", labels=["status"])
        for status, count in sorted(self._statuses.items()):
            responses.add_metric([str(status)], count)
        yield responses
