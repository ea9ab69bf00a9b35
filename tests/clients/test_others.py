"""huggingface_hub, litellm, Anthropic's SDK, locust, and curl lines of MindIE and PaddleNLP."""

import asyncio
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anthropic
import litellm
import pytest
from huggingface_hub import InferenceClient

from .conftest import WEATHER, Served

SAY = [{"role": "user", "content": "Say something."}]
GREEDY = {"temperature": 0}  # the SDK has no argument for it any more


def test_huggingface_chat_and_text(served: Served) -> None:
    client = InferenceClient(base_url=served.url)
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0}
    whole = client.chat_completion(SAY, **asked).choices[0].message.content
    parts = client.chat_completion(SAY, stream=True, **asked)
    assert "".join(one.choices[0].delta.content or "" for one in parts if one.choices) == whole


def test_huggingface_text_generation(served: Served) -> None:
    client = InferenceClient(model=served.url)
    text = client.text_generation("The sky is", max_new_tokens=8)
    assert "".join(client.text_generation("The sky is", max_new_tokens=8, stream=True)) == text
    told = client.text_generation(
        "The sky is", max_new_tokens=8, details=True, decoder_input_details=True, best_of=1
    )
    assert told.generated_text == text and told.details and len(told.details.tokens) <= 8
    assert told.details.prefill
    grammar = {"type": "json", "value": WEATHER}
    obeyed = client.text_generation("Say", max_new_tokens=100, grammar=grammar)
    assert set(json.loads(obeyed)) == {"city", "days"}


def test_litellm(served: Served) -> None:
    asked: dict[str, Any] = {"model": f"openai/{served.model}", "messages": SAY, "max_tokens": 8}
    asked |= {"api_base": f"{served.url}/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
    whole = litellm.completion(**asked).choices[0].message.content
    parts = litellm.completion(**asked, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in parts) == whole
    later = asyncio.run(litellm.acompletion(**asked))
    assert later.choices[0].message.content == whole


@pytest.fixture
def claude(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)


def test_anthropic_messages_and_their_stream(claude: anthropic.Anthropic, served: Served) -> None:
    asked: dict[str, Any] = {"model": served.model, "max_tokens": 8, "extra_body": GREEDY}
    asked |= {"messages": SAY, "system": "Be brief."}
    whole = claude.messages.create(**asked)
    assert whole.role == "assistant" and whole.stop_reason in ("end_turn", "max_tokens")
    text = "".join(block.text for block in whole.content if block.type == "text")
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens
    counted = claude.messages.count_tokens(model=served.model, messages=SAY, system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens


def test_anthropic_tools(claude: anthropic.Anthropic, served: Served) -> None:
    answer = claude.messages.create(
        model=served.model,
        max_tokens=200,
        extra_body=GREEDY,
        messages=SAY,
        tools=[{"name": "weather", "description": "of a city", "input_schema": WEATHER}],
        tool_choice={"type": "tool", "name": "weather"},
    )
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and set(use.input) == {"city", "days"}
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="other", max_tokens=5, messages=SAY)


def test_anthropic_takes_back_what_it_said(claude: anthropic.Anthropic, served: Served) -> None:
    """The loop of a program with tools: blocks as objects, and as what they are dumped to."""
    tools: Any = [{"name": "weather", "description": "of a city", "input_schema": WEATHER}]
    asked: dict[str, Any] = {"model": served.model, "max_tokens": 100, "extra_body": GREEDY}
    said = claude.messages.create(**asked, messages=SAY, tools=tools, tool_choice={"type": "any"})
    for content in (said.content, [block.model_dump() for block in said.content]):
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": "sun"}
            for block in said.content
            if block.type == "tool_use"
        ]
        assert results
        turns: Any = [
            {"role": "assistant", "content": content},
            {"role": "user", "content": results},
        ]
        assert claude.messages.create(**asked, messages=[*SAY, *turns], tools=tools).content


def test_anthropic_runs_tools(claude: anthropic.Anthropic, served: Served) -> None:
    """Its runner, which asks the provider to keep the conversation and hears that nobody does."""
    called = []

    @anthropic.beta_tool(name="weather", description="of a city", input_schema=WEATHER)
    def weather(city: str, days: int) -> str:
        called.append((city, days))
        return "sun"

    runner = claude.beta.messages.tool_runner(
        model=served.model,
        max_tokens=100,
        messages=SAY,
        tools=[weather],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
        extra_body=GREEDY,
    )
    assert len(list(runner)) == 2 and {city for city, _ in called} <= {"Paris", "Rome"} and called


# Bodies as the guides of MindIE's service show them.
MINDIE: dict[str, Any] = {
    "inputs": "My name is Olivier and I",
    "parameters": {
        "decoder_input_details": True,
        "details": True,
        "do_sample": True,
        "max_new_tokens": 20,
        "repetition_penalty": 1.03,
        "return_full_text": False,
        "seed": None,
        "temperature": 0.5,
        "top_k": 10,
        "top_p": 0.95,
        "truncate": None,
        "typical_p": 0.5,
        "watermark": False,
    },
}


def test_curl_lines_of_mindie(curl: Any) -> None:
    status, text = curl("/generate", MINDIE)
    assert status == 200, text
    assert "generated_text" in json.loads(text)
    # Scores of the prompt belong to /generate alone.
    fields = {**MINDIE["parameters"], "decoder_input_details": False}
    status, text = curl("/generate_stream", {**MINDIE, "parameters": fields}, "-N")
    assert status == 200 and text.startswith("data:"), text
    del fields["decoder_input_details"], fields["return_full_text"], fields["truncate"]
    status, text = curl("/infer", {**MINDIE, "stream": False, "parameters": fields})
    assert status == 200, text
    status, text = curl(
        "/v1/chat/completions", {"model": "default", "messages": SAY, "max_tokens": 5}
    )
    assert status == 200, text


def test_curl_lines_of_paddlenlp(curl: Any) -> None:
    body = {
        "context": "hello",
        "top_k": 0,
        "top_p": 0.7,
        "temperature": 0.95,
        "repetition_penalty": 1.3,
        "max_length": 100,
        "src_length": 100,
        "min_length": 1,
    }
    status, text = curl("/api/chat", body)
    assert status == 200, text


def test_a_public_load_generator(served: Served, tmp_path: Path) -> None:
    """Users whom locust makes, for five seconds; it fails where a request or a user does."""
    users = Path(__file__).with_name("locustfile.py")
    command = [sys.executable, "-m", "locust", "-f", str(users), "--headless", "--only-summary"]
    command += ["--users", "8", "--spawn-rate", "8", "--run-time", "5s", "--host", served.url]
    command += ["--csv", str(tmp_path / "load")]
    environment = {**os.environ, "SERVED_MODEL": served.model, "OPENAI_API_KEY": "none"}
    environment["OPENAI_BASE_URL"] = f"{served.url}/v1"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=100, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with (tmp_path / "load_stats.csv").open() as file:
        counts = {row["Name"]: int(row["Request Count"]) for row in csv.DictReader(file)}
    assert counts["/v1/responses"] >= 8 and counts["/v1/chat/completions"] >= 8
