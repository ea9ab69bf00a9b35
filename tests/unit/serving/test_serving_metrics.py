"""``/metrics`` as prometheus-client's parsers read it, under the names that vLLM documents."""

from typing import Any

import pytest
from fakes import MakeClient, make_served
from flask.testing import FlaskClient
from prometheus_client import parser

from llm.serving.keys import Keys

# https://docs.vllm.ai/en/v0.32.0/usage/metrics/ (what an engine of one process shows, without what
# its hardware and adapters' counts tell).
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_n",
    "vllm:request_params_max_tokens",
    "vllm:iteration_tokens_total",
}
GAUGES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
}
COUNTERS = {
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:num_preemptions",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:spec_decode_num_drafts",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
}


class Scrape:
    """The series of one scrape."""

    def __init__(self, client: FlaskClient) -> None:
        text = client.get("/metrics").get_data(as_text=True)
        self.families = {one.name: one for one in parser.text_string_to_metric_families(text)}

    def __call__(self, name: str, **labels: str) -> float:
        family = next(
            one for one in self.families.values() if name in {s.name for s in one.samples}
        )
        found = [s.value for s in family.samples if s.name == name]
        return (
            sum(
                s.value
                for s in family.samples
                if s.name == name and labels.items() <= s.labels.items()
            )
            if found
            else float("nan")
        )


def ask(client: FlaskClient, status: int = 200, **fields: Any) -> None:
    response = client.post("/v1/completions", json={"prompt": "hi", **fields})
    assert response.status_code == status
    response.get_data()
    response.close()


def test_names_kinds_and_labels(make_client: MakeClient) -> None:
    client = make_client()
    families = Scrape(client).families
    for kind, names in (("histogram", HISTOGRAMS), ("gauge", GAUGES), ("counter", COUNTERS)):
        assert {name for name, one in families.items() if one.type == kind} >= names
    own = {name for name in families if name.startswith("vllm:")}
    assert own == HISTOGRAMS | GAUGES | COUNTERS, "from the start, at 0"
    for name in own:
        for sample in families[name].samples:
            assert sample.labels["model_name"] == "fake-llama" and sample.labels["engine"] == "0"
    # As Prometheus asks; prometheus-client's OpenMetrics has no colons in names.
    accept = {"Accept": "application/openmetrics-text; version=1.0.0, text/plain; q=0.5"}
    assert "\nvllm:num_requests_running{" in client.get("/metrics", headers=accept).text


def test_what_is_counted(make_client: MakeClient) -> None:
    client = make_client(make_served(delay=0.01))
    ask(client)  # two words and the end token
    ask(client, max_tokens=1)
    ask(client, n=2, prompt=["hi", "hello"], max_tokens=2)
    ask(client, stream=True)
    ask(client, status=400, temperature=9)
    found = Scrape(client)
    assert found("vllm:prompt_tokens_total") == 3 + 3 + (3 + 2) + 3
    assert found("vllm:generation_tokens_total") == 3 + 1 + 4 * 2 + 3
    assert found("vllm:request_success_total", finished_reason="stop") == 2
    assert found("vllm:request_success_total", finished_reason="length") == 5
    assert found("vllm:request_success_total", finished_reason="abort") == 0
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert found(f"vllm:{name}_count") == 7, "of each answer"
    assert found("vllm:inter_token_latency_seconds_count") == 15 - 7
    assert found("vllm:request_generation_tokens_sum") == 15
    assert found("vllm:request_params_n_sum") == 1 + 1 + 2 + 1
    # Prompts as often as there are answers to them, and each token but an answer's last.
    computed = 3 + 3 + 2 * (3 + 2) + 3 + 15 - 7
    assert found("vllm:iteration_tokens_total_sum") == computed
    single = found("vllm:iteration_tokens_total_bucket", le="1.0")
    assert single == 2 + 2, "steps in which one answer went on, alone"
    assert found("vllm:iteration_tokens_total_bucket", le="+Inf") == found(
        "vllm:iteration_tokens_total_count"
    )
    assert found("vllm:request_params_max_tokens_sum") == 16 + 1 + 4 * 2 + 16
    assert found("http_requests_total", handler="/v1/completions", status="2xx") == 4
    assert found("http_requests_total", handler="/v1/completions", status="4xx") == 1
    fixed = [found(f"vllm:{name}") for name in ("num_preemptions_total", "kv_cache_usage_perc")]
    assert fixed == [3, pytest.approx(0.2)]
    assert found("vllm:prefix_cache_hits_total") == 20
    assert found("vllm:spec_decode_num_accepted_tokens_total") == 4
    config = found.families["vllm:cache_config_info"].samples[0].labels
    assert (config["block_size"], config["num_gpu_blocks"]) == ("16", "10")


def test_times_add_up(make_client: MakeClient) -> None:
    """Queue, prefill and decode are the parts of the whole, and decode is its tokens' times."""
    client = make_client(make_served(delay=0.02, max_sequences=1))
    ask(client, n=3, max_tokens=3)
    found = Scrape(client)

    def total(name: str) -> float:
        return found(f"vllm:{name}_seconds_sum")

    parts = [total(f"request_{part}_time") for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(total("e2e_request_latency"), abs=0.05)
    assert parts[0] + parts[1] == pytest.approx(total("time_to_first_token"), abs=1e-4)
    assert parts[1] + parts[2] == pytest.approx(total("request_inference_time"), abs=1e-4)
    assert parts[2] == pytest.approx(total("inter_token_latency"), abs=1e-4)
    assert parts[2] == pytest.approx(2 * total("request_time_per_output_token"), abs=1e-4)
    # One at a time: the second waits for the first one's three steps, the third for six.
    steps = [part / 0.02 for part in parts]
    assert steps[0] > steps[2] > steps[1] > 2, "9, 3 and 6 of them, on a machine with nothing to do"


def test_ends_of_all_kinds(make_client: MakeClient) -> None:
    client = make_client(make_served(fail_at=1))
    ask(client, status=500)
    assert Scrape(client)("vllm:request_success_total", finished_reason="error") == 1
    client = make_client(make_served(repeat=True, delay=0.01), max_length=150)
    response = client.post(
        "/v1/completions", json={"prompt": "hi", "max_tokens": 150, "stream": True}
    )
    response.close()  # the client leaves
    found = Scrape(client)
    assert found("vllm:request_success_total", finished_reason="abort") == 1
    assert found("vllm:num_requests_waiting") == 0


def test_use_of_each_key(make_client: MakeClient, tmp_path: Any) -> None:
    (tmp_path / "keys.yaml").write_text(
        "- {name: alice, key: sk-alice-1234, requests_per_minute: 1}"
    )
    client = make_client(keys=Keys(tmp_path / "keys.yaml"))
    for _ in range(2):
        headers = {"Authorization": "Bearer sk-alice-1234"}
        client.post("/v1/completions", json={"prompt": "hi"}, headers=headers).close()
    found = Scrape(client)
    assert found("api_key_requests_total", key="alice") == 2
    assert found("api_key_rate_limited_total", key="alice", limit="requests") == 1
    assert found("api_key_tokens_total", key="alice", kind="prompt") == 3
    assert found("api_key_tokens_total", key="alice", kind="generation") == 3
    assert "sk-alice" not in client.get("/metrics").get_data(as_text=True)


def test_before_the_model_is_there(make_client: MakeClient) -> None:
    client = make_client()
    worker = client.worker
    worker._served, served = None, worker._served
    assert client.get("/metrics").status_code == 200
    worker._served = served
