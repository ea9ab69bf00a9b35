"""Counters of the server in Prometheus' text format, under the names that vLLM uses.

Dashboards made for vLLM work unchanged. Format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import contextlib
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from llm.serving.loop import EngineWorker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Total:
    """A number that only grows, split by one label's values (or by none)."""

    def __init__(self, name: str, help: str, label: str | None = None) -> None:
        self.name = name
        self._help = help
        self._label = label
        self._values: Counter[str] = Counter() if label else Counter({"": 0})
        self._lock = threading.Lock()

    def inc(self, amount: int = 1, value: str = "") -> None:
        """Add ``amount`` under the label value."""
        with self._lock:
            self._values[value] += amount

    def render(self) -> list[str]:
        """Return the metric's lines."""
        lines = [f"# HELP {self.name} {self._help}", f"# TYPE {self.name} counter"]
        with self._lock:
            for value, amount in sorted(self._values.items()):
                label = f'{{{self._label}="{value}"}}' if self._label else ""
                lines.append(f"{self.name}{label} {amount}")
        return lines


class Histogram:
    """Durations in seconds, counted in buckets."""

    def __init__(self, name: str, help: str) -> None:
        self.name = name
        self._help = help
        self._counts = [0] * (len(_SECONDS) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._counts[bisect_left(_SECONDS, seconds)] += 1
            self._sum += seconds

    def render(self) -> list[str]:
        """Return the metric's lines; buckets are cumulative."""
        lines = [f"# HELP {self.name} {self._help}", f"# TYPE {self.name} histogram"]
        with self._lock:
            below = 0
            for edge, count in zip((*_SECONDS, "+Inf"), self._counts, strict=True):
                below += count
                lines.append(f'{self.name}_bucket{{le="{edge}"}} {below}')
            lines += [f"{self.name}_sum {self._sum:.6f}", f"{self.name}_count {below}"]
        return lines


def _of_engine(worker: EngineWorker) -> Iterator[tuple[str, str, int, str]]:
    """Yield name, kind, value and meaning of what worker and engine count."""
    running, waiting = "vllm:num_requests_running", "vllm:num_requests_waiting"
    yield running, "gauge", worker.num_running, "Requests that generate."
    yield waiting, "gauge", worker.num_waiting, "Requests in line."
    if worker.status != "ok":
        return
    engine = worker.served.engine
    for name, value, text in (
        ("num_preemptions", engine.num_preempted, "Requests that gave up their cache blocks."),
        ("spec_decode_num_draft_tokens", engine.num_drafted, "Tokens that were guessed."),
        ("spec_decode_num_accepted_tokens", engine.num_accepted, "Guesses that were right."),
    ):
        yield f"vllm:{name}_total", "counter", value, text


class Metrics:
    """What one server counts."""

    def __init__(self) -> None:
        self.prompt_tokens = Total("vllm:prompt_tokens_total", "Tokens of prompts.")
        self.generation_tokens = Total("vllm:generation_tokens_total", "Tokens generated.")
        self.success = Total(
            "vllm:request_success_total", "Answers by why they ended.", "finished_reason"
        )
        self.responses = Total("http_responses_total", "Responses by status.", "status")
        self.first_token_seconds = Histogram(
            "vllm:time_to_first_token_seconds", "From the request to the first token."
        )
        self.latency_seconds = Histogram(
            "vllm:e2e_request_latency_seconds", "From the request to the last token."
        )

    def finished(self, reason: str, num_tokens: int) -> None:
        """Count one complete answer."""
        self.success.inc(value=reason)
        self.generation_tokens.inc(num_tokens)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Count a request whose client left or whose engine failed as aborted."""
        try:
            yield
        except BaseException:
            self.success.inc(value="abort")
            raise

    def render(self, worker: EngineWorker) -> str:
        """Return all metrics; what the engine counts is read at this moment."""
        lines = []
        for name, kind, value, text in _of_engine(worker):
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
        for metric in vars(self).values():
            lines += metric.render()
        return "\n".join(lines) + "\n"
