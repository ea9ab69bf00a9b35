"""langchain-openai: invoke, stream, batch, bind_tools, structured output, tool messages."""

from typing import Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from .conftest import Served

# Tools are strict: where a schema admits further properties, random weights write them for ever.


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: int


@tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather of a city."""
    return f"sunny in {city}"


@pytest.fixture
def chat(served: Served) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",
        model=served.model,
        temperature=0,
        max_tokens=120,
        max_retries=0,
    )


def test_invoke_stream_and_batch_say_the_same(chat: ChatOpenAI) -> None:
    short = chat.bind(max_tokens=10)
    whole = short.invoke("Hello").content
    assert "".join(str(one.content) for one in short.stream("Hello")) == whole
    assert [one.content for one in short.batch(["Hello"] * 3)] == [whole] * 3


def test_tools_are_bound_called_and_answered(chat: ChatOpenAI) -> None:
    asked = HumanMessage("What is the weather?")
    said = chat.bind_tools([weather], tool_choice="weather", strict=True).invoke([asked])
    (call,) = said.tool_calls
    assert call["name"] == "weather" and call["args"]["city"] in ("Paris", "Rome")
    told = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    chat.bind_tools([weather], tool_choice="none").invoke([asked, said, told])
    free = chat.bind_tools([weather], tool_choice="any", strict=True).invoke([asked])
    assert free.tool_calls


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(method: str, chat: ChatOpenAI) -> None:
    found = chat.with_structured_output(Weather, method=method, strict=True).invoke("The weather?")
    assert isinstance(found, Weather)
