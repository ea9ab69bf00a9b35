"""What a server of the trained model answers in a form, for `make real`, and prompt look-up."""

import contextlib
import json
import sys
from typing import Any

import bench_engine
import jsonschema
import requests
from real_asked import CALLS, FORMS, TOOLS, is_right
from real_run import Figure, PartError, Run
from record import ROOT
from serving_servers import OURS, Server, Sizes, model_of

sys.path.insert(0, str(ROOT))

from common.errors import UserError
from llm import runtime

_TOKENS = 160
_TEMPERATURES = (0.0, 1.0)
_ROUNDS = 3
_SECONDS = 120


class _Chat:
    """Asks a server."""

    def __init__(self, url: str) -> None:
        self._url, self._model = url, model_of(url)

    def __call__(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        """Return the one choice of an answer."""
        body = {"model": self._model, "messages": messages, "max_tokens": _TOKENS, "seed": 1}
        place = f"{self._url}/v1/chat/completions"
        answer = requests.post(place, json=body | fields, timeout=_SECONDS)
        if answer.status_code != 200:
            raise PartError(f"{place} answered {answer.status_code}: {answer.text:.300}")
        (choice,) = answer.json()["choices"]
        return dict(choice)


def _user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def read_form(choice: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return what an answer holds that obeys its schema and ended by itself; else None."""
    try:
        found = json.loads(choice["message"]["content"])
        jsonschema.validate(found, schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return None
    return dict(found) if choice["finish_reason"] == "stop" else None


def read_calls(choice: dict[str, Any]) -> list[tuple[str, dict[str, Any]]] | None:
    """Return an answer's calls, none where it is text; None where one breaks its schema."""
    known = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
    found = []
    for call in choice["message"].get("tool_calls") or ():
        name = call["function"]["name"]
        try:
            given = json.loads(call["function"]["arguments"])
            jsonschema.validate(given, known[name])
        except (json.JSONDecodeError, jsonschema.ValidationError, KeyError):
            return None
        found.append((name, given))
    ends = "tool_calls" if found else "stop"
    return found if choice["finish_reason"] in (ends, "length" * (not found)) else None


def _forms(run: Run, chat: _Chat) -> list[Figure]:
    valid = right = 0
    for temperature in _TEMPERATURES:
        run.say(f"JSON at temperature {temperature:g}")
        for form in FORMS:
            asked = {"json_schema": {"name": "answer", "schema": form.schema}}
            wanted = {"type": "json_schema", **asked}
            choice = chat(_user(form.text), response_format=wanted, temperature=temperature)
            found = read_form(choice, form.schema)
            valid += found is not None
            right += found is not None and temperature == 0 and is_right(found, form.right)
    count = len(FORMS) * len(_TEMPERATURES)
    return [
        Figure("JSON that obeys its schema", f"{valid} of {count}", "all", valid == count),
        Figure("JSON with the right values, greedy", f"{right} of {len(FORMS)}"),
    ]


def _calls(run: Run, chat: _Chat) -> list[Figure]:
    found: dict[str, list[list[tuple[str, dict[str, Any]]] | None]] = {}
    for choice_of_tool in ("required", "auto"):
        found[choice_of_tool] = []
        for call in CALLS:
            run.say(f"calls, tool_choice={choice_of_tool}: {call.text}")
            # One call: a small model goes on to call until the limit cuts the last one.
            how = {"tools": TOOLS, "tool_choice": choice_of_tool, "temperature": 0.0}
            how["parallel_tool_calls"] = False
            found[choice_of_tool].append(read_calls(chat(_user(call.text), **how)))
    # Where a call is required, an answer without one is as wrong as one that breaks its schema.
    valid = sum(map(bool, found["required"])) + sum(one is not None for one in found["auto"])
    count, total = len(CALLS), 2 * len(CALLS)
    first = [
        (call, calls[0]) for call, calls in zip(CALLS, found["required"], strict=True) if calls
    ]
    named = [(call, given) for call, (name, given) in first if name == call.name]
    right = sum(is_right(given, call.arguments) for call, given in named)
    return [
        Figure("calls that obey their tool's schema", f"{valid} of {total}", "all", valid == total),
        Figure("required: the tool that was meant", f"{len(named)} of {count}"),
        Figure("required: with the right arguments", f"{right} of {count}"),
        Figure("auto: a call was made", f"{sum(map(bool, found['auto']))} of {count}"),
    ]


def forms(run: Run) -> list[Figure]:
    """Answers in JSON and calls of tools, over HTTP: by grammar all of them are valid."""
    run.say("the server starts")
    sizes = Sizes(runtime.cpu_count(), sequences=4, length=1024)
    try:
        with Server(OURS, run.model, sizes, run.log()) as server:
            chat = _Chat(server.url)
            return [*_forms(run, chat), *_calls(run, chat)]
    except (SystemExit, requests.RequestException) as error:
        raise PartError(str(error)) from None


def lookup(run: Run) -> list[Figure]:
    """Guesses looked up in the prompt: how many are right, and what they gain."""
    run.say("with guesses and without")
    runtime.prepare(None, "cpu")
    runtime.load_paddle("cpu")
    with run.log().open("w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        try:
            found = bench_engine.lookup(str(run.model), _ROUNDS)
        except (AssertionError, UserError) as error:
            raise PartError(str(error)) from None
    same = Figure("tokens with guesses and without", "equal", "equal")
    return [same, *(Figure(name.removeprefix("lookup, "), one) for name, one in found.items())]
