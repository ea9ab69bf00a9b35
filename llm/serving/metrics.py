"""What a server counts, for Prometheus, under the names and labels of vLLM's metrics.

Dashboards and scalers that were made for vLLM work unchanged. Names, labels and meanings:
https://docs.vllm.ai/en/stable/usage/metrics/ (release 0.32); the text is prometheus-client's.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from llm.engine.stats import EngineStats

FINISH_REASONS = ("stop", "length", "abort", "error")
_LABELS = ("model_name", "engine")
_ENGINE = "0"  # the number of vLLM's data-parallel replica; a server here has one

_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_SECONDS = (*_TOKEN_SECONDS, 160.0, 640.0)
_WHOLE_SECONDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_STEP_TOKENS = (1, *(2**power for power in range(3, 15)))
_TOKENS = tuple(factor * 10**power for power in range(6) for factor in (1, 2, 5))
_CHOICES = (1, 2, 5, 10, 20, 50, 100)

# A second series beside each would say when it was made, which nobody asks for.
disable_created_metrics()


class Counting(Protocol):
    """The part of :class:`llm.serving.loop.EngineWorker` that metrics are read from."""

    @property
    def stats(self) -> EngineStats | None: ...

    @property
    def step_tokens(self) -> Mapping[int, int]: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...


class ModelMetrics:
    """The series of one model.

    Args:
        name: of the model, the label ``model_name``.
        registry: where they are told.
    """

    def __init__(self, name: str, registry: CollectorRegistry) -> None:
        labels = {"model_name": name, "engine": _ENGINE}

        def counter(name: str, text: str) -> Counter:
            return Counter(f"vllm:{name}", text, _LABELS, registry=registry).labels(**labels)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=registry)
            return made.labels(**labels)

        seconds = partial(histogram, buckets=_WHOLE_SECONDS)
        tokens = partial(histogram, buckets=_TOKENS)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were begun.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        success = Counter(
            "vllm:request_success",
            "Answers by why they ended.",
            (*_LABELS, "finished_reason"),
            registry=registry,
        )
        self.success = {
            reason: success.labels(**labels, finished_reason=reason) for reason in FINISH_REASONS
        }
        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From the request to an answer's first token.",
            buckets=_FIRST_SECONDS,
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds",
            "From one token of an answer to the next.",
            buckets=_TOKEN_SECONDS,
        )
        self.per_token = histogram(
            "request_time_per_output_token_seconds",
            "Mean of an answer's times between tokens.",
            buckets=_TOKEN_SECONDS,
        )
        self.whole = seconds("e2e_request_latency_seconds", "From the request to the last token.")
        self.queue = seconds("request_queue_time_seconds", "In line, before the first step.")
        self.prefill = seconds("request_prefill_time_seconds", "First step to first token.")
        self.decode = seconds("request_decode_time_seconds", "First token to last token.")
        self.inference = seconds("request_inference_time_seconds", "First step to last token.")
        self.request_prompt = tokens("request_prompt_tokens", "Prompt tokens of an answer.")
        self.request_generation = tokens("request_generation_tokens", "Tokens of an answer.")
        self.request_max = tokens("request_params_max_tokens", "Most tokens asked for.")
        self.request_n = histogram(
            "request_params_n", "Answers asked for to a prompt.", buckets=_CHOICES
        )


class Metrics:
    """All series of one server.

    Args:
        worker: its engine's numbers are read when they are asked for.
        engine_pid: the engine's process, where it is another one: its memory is told, too.
    """

    def __init__(self, worker: Counting | None = None, engine_pid: int | None = None) -> None:
        self._worker = worker
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        if engine_pid is not None:
            ProcessCollector("engine", lambda: engine_pid, registry=self._registry)
        self._lock = threading.Lock()  # of the making of series
        self._models: dict[str, ModelMetrics] = {}
        self._engine_of = ""
        self.http_requests = Counter(
            "http_requests",
            "Responses by route and class of status.",
            ("handler", "method", "status"),
            registry=self._registry,
        )
        self.http_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's head to the last byte of its response.",
            ("handler", "method"),
            buckets=_WHOLE_SECONDS,
            registry=self._registry,
        )
        self.key_requests = Counter(
            "api_key_requests", "Requests of each key.", ("key",), registry=self._registry
        )
        self.key_tokens = Counter(
            "api_key_tokens",
            "Tokens of each key, of prompts and of answers.",
            ("key", "kind"),
            registry=self._registry,
        )
        self.key_refused = Counter(
            "api_key_rate_limited",
            "Requests of each key that got status 429, by the limit.",
            ("key", "limit"),
            registry=self._registry,
        )

    def of(self, model: str) -> ModelMetrics:
        """Return the series of a model; the first call makes them, at 0."""
        with self._lock:
            if model not in self._models:
                self._models[model] = ModelMetrics(model, self._registry)
                self._engine_of = model
            return self._models[model]

    def render(self) -> tuple[bytes, str]:
        """Return all series and their content type.

        Always the older text: where a scraper asks for OpenMetrics, as Prometheus does,
        prometheus-client writes the colon of vLLM's names as an underscore.
        """
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def describe(self) -> Iterator[Metric]:
        """Name none of the engine's series beforehand: prometheus-client asks for it."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield what the engine counts; nothing before a model is there."""
        worker = self._worker
        stats = None if worker is None else worker.stats
        if worker is None or stats is None or not self._engine_of:
            return
        labels = (self._engine_of, _ENGINE)
        used = 1 - stats.num_free_blocks / stats.num_blocks
        for name, text, number in (
            ("num_requests_running", "Answers that are generated.", worker.num_running),
            ("num_requests_waiting", "Answers in line.", worker.num_waiting),
            ("kv_cache_usage_perc", "Share of the cache's blocks in use, 1 is all.", used),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            gauge.add_metric(labels, number)
            yield gauge
        for name, text, count in (
            ("num_preemptions", "Answers that gave up their blocks.", stats.num_preempted),
            ("prefix_cache_queries", "Prompt tokens looked for.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hits),
            ("spec_decode_num_drafts", "Times that tokens were guessed.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens guessed.", stats.num_drafted),
            ("spec_decode_num_accepted_tokens", "Guesses that were right.", stats.num_accepted),
        ):
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
            counter.add_metric(labels, count)
            yield counter
        steps = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens that a step computed.", labels=_LABELS
        )
        steps.add_metric(labels, *_histogram(worker.step_tokens, _STEP_TOKENS))
        yield steps
        info = GaugeMetricFamily(
            "vllm:cache_config_info",
            "What the cache is made of, in labels.",
            labels=(*_LABELS, "block_size", "num_gpu_blocks"),
        )
        info.add_metric((*labels, str(stats.block_size), str(stats.num_blocks)), 1)
        yield info


def _histogram(
    numbers: Mapping[int, int], bounds: Iterable[int]
) -> tuple[list[tuple[str, float]], float]:
    """Return how many observations are at most each bound, and what all come to.

    Args:
        numbers: how often each value was observed.
        bounds: of the buckets, but for the last one, which holds all.
    """
    buckets = [
        (str(float(bound)), sum(n for value, n in numbers.items() if value <= bound))
        for bound in bounds
    ]
    total = sum(value * n for value, n in numbers.items())
    return [*buckets, ("+Inf", sum(numbers.values()))], total
