"""Metrics for Prometheus. What vLLM has too is named as there, so that its dashboards show it; the rest is `dynatree_`.

Times and tokens are counted by the engines' thread, for all sequences, whether somebody still waits for them or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynatree_core.engine.handle import Event, Handle
from dynatree_core.engine.scheduler import Load
from dynatree_core.tree.verdict import StepReport

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
REASONS = {"eos": "stop", "stop_string": "stop", "criterion": "stop", "cancelled": "abort", "error": "error"}


class Metrics:
    """What is counted of one server's engines.

    Args:
        model_name: the value of the label that all of vLLM's have.
        loads: how busy each engine is.
        is_alive: whether the engines' thread runs.
    """

    def __init__(self, model_name: str, loads: Callable[[], Sequence[Load]], is_alive: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._last_tokens_at: dict[Handle, float] = {}  # of sequences that run
        self._registry.register(_Now(model_name, loads, is_alive))

        def counter(name: str, text: str) -> Counter:
            return labelled(name, text).labels(model_name)

        def labelled(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=self._registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ("model_name",), buckets=buckets, registry=self._registry).labels(model_name)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts of sequences that have ended.")
        self._cached = counter("vllm:prefix_cache_hits", "Tokens of these prompts that were copied, not computed.")
        self._queried = counter("vllm:prefix_cache_queries", "Tokens of prompts that the prefix cache was asked for.")
        self._new_tokens = counter("vllm:generation_tokens", "New tokens.")
        self._ended = labelled("vllm:request_success", "Sequences that have ended.", "finished_reason")
        self._first = histogram("vllm:time_to_first_token_seconds", "From submission to the first token.", SECONDS)
        self._gap = histogram("vllm:inter_token_latency_seconds", "Between two iterations of a sequence.", GAPS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From submission to the end.", SECONDS)
        self._queue = histogram("vllm:request_queue_time_seconds", "From submission to a lane.", SECONDS)
        self._asked = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._given = histogram("vllm:request_generation_tokens", "New tokens of a sequence.", TOKENS)
        self._drafts = counter("vllm:spec_decode_num_drafts", "Iterations that have drafted.")
        self._drafted = counter("vllm:spec_decode_num_draft_tokens", "Drafted nodes of trees that were verified.")
        self._accepted = counter("vllm:spec_decode_num_accepted_tokens", "Committed tokens that had been drafted.")
        self._positions = labelled(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "The same by depth in the tree, from 0.", "position"
        )
        self._iterations = counter("dynatree_iterations", "Target passes of sequences, shared ones once for each.")
        self._per_iteration = histogram(
            "dynatree_tokens_per_iteration", "Tokens that an iteration commits.", TOKENS[:7]
        )
        self._refused = labelled("dynatree_requests_refused", "Requests that were not computed.", "code")

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def refuse(self, code: str) -> None:
        """A request was answered with an error."""
        self._refused.labels(self._model_name, code).inc()

    def hear(self, events: Iterable[Event]) -> None:
        """Count what a step has brought."""
        for event in events:
            if event.kind == "tokens":
                assert event.report is not None, "tokens come with a report"
                self._count_iteration(event.handle, event.report)
            elif event.kind in ("stopped", "failed", "cancelled"):
                self._count_end(event.handle)

    def _count_iteration(self, handle: Handle, report: StepReport) -> None:
        num_new = len(report.token_ids)
        self._new_tokens.inc(num_new)
        self._iterations.inc()
        self._per_iteration.observe(num_new)
        if report.tree.max_depth:
            self._drafts.inc()
            self._drafted.inc(report.tree.num_nodes - 1)
            self._accepted.inc(report.num_accepted)
            for position in range(report.num_accepted):
                self._positions.labels(self._model_name, str(position)).inc()
        if num_new:
            now = handle.token_times[-1]
            before = self._last_tokens_at.get(handle)
            if before is None:
                self._first.observe(handle.token_times[0] - handle.submitted_at)
            else:
                self._gap.observe(now - before)
            self._last_tokens_at[handle] = now

    def _count_end(self, handle: Handle) -> None:
        report = handle.partial.report
        self._last_tokens_at.pop(handle, None)
        reason = "error" if handle.error is not None else REASONS.get(handle.stop_reason or "", "length")
        self._ended.labels(self._model_name, reason).inc()
        self._prompt_tokens.inc(report.num_prompt_tokens)
        self._queried.inc(report.num_prompt_tokens)
        self._cached.inc(report.num_reused_tokens)
        self._asked.observe(report.num_prompt_tokens)
        self._given.observe(report.num_new_tokens)
        if handle.ended_at is not None:
            self._whole.observe(handle.ended_at - handle.submitted_at)
        if handle.started_at is not None:
            self._queue.observe(handle.started_at - handle.submitted_at)


class _Now(Collector):
    """What holds at the moment of asking."""

    def __init__(self, model_name: str, loads: Callable[[], Sequence[Load]], is_alive: Callable[[], bool]) -> None:
        self._model_name = model_name
        self._loads = loads
        self._is_alive = is_alive

    def collect(self) -> Iterator[Metric]:
        loads = self._loads()
        gauges = {
            "vllm:num_requests_running": ("Sequences that have a lane.", sum(load.num_running for load in loads)),
            "vllm:num_requests_waiting": ("Sequences that wait for one.", sum(load.num_waiting for load in loads)),
            "dynatree_engine_up": ("1 while the engines' thread runs.", int(self._is_alive())),
            "dynatree_longest_pause_seconds": (
                "The longest time between two iterations of one sequence so far.",
                max(load.longest_pause_seconds for load in loads),
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        preempted = CounterMetricFamily("vllm:num_preemptions", "Times that memory was short.", labels=["model_name"])
        preempted.add_metric([self._model_name], sum(load.num_preempted for load in loads))
        yield preempted
