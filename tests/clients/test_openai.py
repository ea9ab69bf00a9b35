"""openai-python: chat, tools, schemas, streams, many at once, and its classes of errors."""

import asyncio
import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from .conftest import WEATHER, Served

SAY = [{"role": "user", "content": "Say something."}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": WEATHER},
}


class Weather(BaseModel):
    """What WEATHER says."""

    city: Literal["Paris", "Rome"]
    days: int


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI, served: Served) -> None:
    assert [one.id for one in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).id == served.model


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI, served: Served) -> None:
    asked: dict[str, Any] = {"model": served.model, "messages": SAY, "temperature": 0}
    asked["max_tokens"] = 12
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage and chunks[-1].usage and whole.usage.completion_tokens <= 12
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_sampling_fields_and_choices(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(
        model=served.model,
        messages=SAY,
        max_tokens=6,
        n=3,
        seed=5,
        temperature=0.9,
        top_p=0.8,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"5": 1},
        logprobs=True,
        top_logprobs=3,
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1},
    )
    assert [one.index for one in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs and choice.logprobs.content
        assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools_are_called_with_arguments_of_their_schema(
    choice: Any, client: openai.OpenAI, served: Served
) -> None:
    asked: dict[str, Any] = {"model": served.model, "messages": SAY, "tools": [TOOL]}
    asked |= {"tool_choice": choice, "temperature": 0, "max_tokens": 200}
    answer = client.chat.completions.create(**asked).choices[0]
    assert answer.message.tool_calls and answer.finish_reason == "tool_calls"
    call = answer.message.tool_calls[0]
    assert call.function.name == "weather"
    Weather.model_validate_json(call.function.arguments)
    parts: dict[int, str] = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for one in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            parts[one.index] = parts.get(one.index, "") + (one.function.arguments or "")
    assert json.loads(parts[0]) == json.loads(call.function.arguments)
    told = [
        *SAY,
        answer.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    client.chat.completions.create(
        model=served.model, messages=told, tools=[TOOL], tool_choice="none", max_tokens=5
    )


def test_answers_obey_a_schema(client: openai.OpenAI, served: Served) -> None:
    said = client.chat.completions.parse(
        model=served.model, messages=SAY, response_format=Weather, max_tokens=100, temperature=0
    )
    assert isinstance(said.choices[0].message.parsed, Weather)
    free = client.chat.completions.create(
        model=served.model,
        messages=SAY,
        response_format={"type": "json_object"},
        max_tokens=200,
        temperature=0,
    ).choices[0]
    assert free.finish_reason == "length" or isinstance(
        json.loads(free.message.content or ""), dict
    )


def test_completions_score_their_prompt(client: openai.OpenAI, served: Served) -> None:
    answer = client.completions.create(
        model=served.model, prompt="The sky is", max_tokens=1, echo=True, logprobs=2, temperature=0
    ).choices[0]
    assert answer.text.startswith("The sky is") and answer.logprobs
    assert answer.logprobs.token_logprobs and answer.logprobs.token_logprobs[0] is None
    assert len(answer.logprobs.tokens or []) == len(answer.logprobs.token_logprobs)


def test_responses(client: openai.OpenAI, served: Served) -> None:
    whole = client.responses.create(
        model=served.model, input="Say something.", max_output_tokens=10, temperature=0, store=False
    )
    assert whole.output_text is not None and whole.usage and whole.usage.output_tokens <= 10
    with client.responses.stream(
        model=served.model, input="Say something.", max_output_tokens=10, temperature=0, store=False
    ) as stream:
        *_, last = stream
    # The SDK's final response is that of a stream which no limit has cut.
    assert last.type == f"response.{whole.status}"
    assert last.response.output_text == whole.output_text


def test_a_hundred_at_once(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0
        ) as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model=served.model, prompt=f"Number {n % 10}", max_tokens=8, temperature=0
                    )
                    for n in range(100)
                )
            )
        return [one.choices[0].text for one in answers]

    texts = asyncio.run(ask())
    assert texts == texts[:10] * 10


def test_errors_have_their_classes(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="other"):
        client.chat.completions.create(model="other", messages=SAY)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=served.model, messages=SAY, temperature=9)
    with pytest.raises(openai.NotFoundError, match="embedding"):
        client.embeddings.create(model=served.model, input="x")


def test_it_takes_back_what_it_said(client: openai.OpenAI, served: Served) -> None:
    """The loop of a program with tools: answers as objects, and as what they are dumped to."""
    asked: dict[str, Any] = {"model": served.model, "tools": [TOOL], "max_tokens": 200}
    asked |= {"parallel_tool_calls": False}
    said = client.chat.completions.create(**asked, messages=SAY, tool_choice="required")
    message = said.choices[0].message
    for one in (message, message.model_dump()):
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "sun"}
            for call in message.tool_calls or ()
        ]
        assert results
        assert client.chat.completions.create(**asked, messages=[*SAY, one, *results]).choices


def test_responses_are_taken_back(client: openai.OpenAI, served: Served) -> None:
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}
    asked: dict[str, Any] = {"model": served.model, "max_output_tokens": 100, "tools": [tool]}
    for choice in ({"type": "function", "name": "weather"}, "none"):
        said = client.responses.create(**asked, input="Say something.", tool_choice=choice)
        for items in (said.output, [item.model_dump() for item in said.output]):
            results = [
                {"type": "function_call_output", "call_id": item.call_id, "output": "sun"}
                for item in said.output
                if item.type == "function_call"
            ]
            assert bool(results) == (choice != "none")
            turns: Any = [*SAY, *items, *results, *SAY]
            assert client.responses.create(**asked, input=turns).output
            counted = client.responses.input_tokens.count(
                model=served.model, input=turns, tools=[tool]
            )
            assert counted.input_tokens > 0


def test_scores_of_a_response(client: openai.OpenAI, served: Served) -> None:
    asked: dict[str, Any] = {"model": served.model, "input": "Hi", "max_output_tokens": 8}
    asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "temperature": 0}
    item = client.responses.create(**asked).output[0]
    assert item.type == "message" and item.content[0].type == "output_text"
    scores = item.content[0].logprobs or []
    assert scores and all(len(one.top_logprobs) == 2 for one in scores)
    with client.responses.stream(**asked) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
    assert [one.logprob for event in deltas for one in event.logprobs] == [
        one.logprob for one in scores
    ]


def test_some_tools_are_allowed(client: openai.OpenAI, served: Served) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": WEATHER}}
    allowed: Any = {
        "mode": "required",
        "tools": [{"type": "function", "function": {"name": "other"}}],
    }
    answer = client.chat.completions.create(
        model=served.model,
        messages=SAY,
        tools=[TOOL, other],
        tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
        max_tokens=200,
    )
    assert {call.function.name for call in answer.choices[0].message.tool_calls or ()} == {"other"}
