"""What `make real` asks: plain questions, answers in a form, and calls of tools.

Beside each stands what a right answer holds. A model of 135 million parameters errs often: whether
it is right is reported, and demanded nowhere.
"""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """A plain question.

    Args:
        text: as a user types it.
        right: what the answer has where it is right, a regular expression in any case.
    """

    text: str
    right: str

    def is_right(self, answer: str) -> bool:
        """Return whether an answer holds what it should."""
        return re.search(self.right, answer, re.IGNORECASE) is not None


QUESTIONS = (
    Question("What is the capital of France?", r"\bParis\b"),
    Question("What is the capital of Japan?", r"\bTokyo\b"),
    Question("What is the largest planet of the solar system?", r"\bJupiter\b"),
    Question("How many legs does a spider have?", r"\b(?:8|eight)\b"),
    Question("How many days are in a week?", r"\b(?:7|seven)\b"),
    Question("What is 7 plus 5?", r"\b(?:12|twelve)\b"),
    Question("What is 6 times 7?", r"\b(?:42|forty-two)\b"),
    Question("Who wrote Romeo and Juliet?", r"\bShakespeare\b"),
    Question("Which gas do plants take from the air?", r"carbon dioxide|\bCO2\b"),
    Question("At how many degrees Celsius does water boil?", r"\b100\b"),
    Question("What is the opposite of hot?", r"\bcold\b"),
    Question("Translate 'good morning' into Spanish.", r"buenos d[ií]as"),
    Question("Name three primary colours.", r"(?=.*\bred\b)(?=.*\bblue\b)"),
    Question("Which ocean lies between Europe and America?", r"\bAtlantic\b"),
    Question("What do bees make?", r"\bhoney\b"),
    Question("What is the chemical symbol of gold?", r"\bAu\b"),
    Question("In which year did the Second World War end?", r"\b1945\b"),
    Question("What colour is the sky on a clear day?", r"\bblue\b"),
    Question("What is the plural of the word mouse?", r"\bmice\b"),
    Question("Write one sentence about the sea.", r"\b(?:sea|ocean|waves?)\b"),
)


@dataclass(frozen=True)
class Form:
    """A question whose answer has a form.

    Args:
        text: the question.
        schema: of the answer.
        right: keys of the answer and their values.
    """

    text: str
    schema: dict[str, Any]
    right: dict[str, Any]


def _object(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


# Bounded: a small model may go on with a text for ever.
_WORD = {"type": "string", "maxLength": 20}
_INTEGER = {"type": "integer", "minimum": 0, "maximum": 100_000}
_WORDS = {"type": "array", "items": _WORD, "minItems": 2, "maxItems": 4}

FORMS = (
    Form(
        "What is the capital of France? Answer in JSON with the key capital.",
        _object(capital=_WORD),
        {"capital": "paris"},
    ),
    Form(
        "Anna is 31 years old and lives in Rome. Give her name, age and city in JSON.",
        _object(name=_WORD, age=_INTEGER, city=_WORD),
        {"name": "anna", "age": 31, "city": "rome"},
    ),
    Form(
        "Is this review good or bad? 'I loved every minute of it.' Answer in JSON.",
        _object(review={"enum": ["good", "bad"]}),
        {"review": "good"},
    ),
    Form(
        "An order of 3 apples costs 6 dollars. Give item, count and price in JSON.",
        _object(item=_WORD, count=_INTEGER, price=_INTEGER),
        {"item": "apples", "count": 3, "price": 6},
    ),
    Form(
        "List two colours of the French flag in JSON.",
        _object(colours=_WORDS),
        {},
    ),
    Form(
        "Is the sun a star? Answer in JSON.",
        _object(answer={"type": "boolean"}, reason={"type": "string", "maxLength": 60}),
        {"answer": True},
    ),
)


def _tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": _object(**properties)}
    return {"type": "function", "function": function}


TOOLS = (
    _tool("get_weather", "Tell the weather of a city.", city=_WORD),
    _tool("add_numbers", "Add two whole numbers.", a=_INTEGER, b=_INTEGER),
    _tool("set_timer", "Set a timer for some minutes.", minutes=_INTEGER),
)


@dataclass(frozen=True)
class Call:
    """A question that one of :data:`TOOLS` answers.

    Args:
        text: the question.
        name: of the tool that is meant.
        arguments: that it is meant to be called with.
    """

    text: str
    name: str
    arguments: dict[str, Any]


CALLS = (
    Call("What is the weather in Paris?", "get_weather", {"city": "paris"}),
    Call("Does it rain in London?", "get_weather", {"city": "london"}),
    Call("Add 17 and 25.", "add_numbers", {"a": 17, "b": 25}),
    Call("What is the sum of 3 and 4?", "add_numbers", {"a": 3, "b": 4}),
    Call("Set a timer for 10 minutes.", "set_timer", {"minutes": 10}),
    Call("Remind me in 45 minutes.", "set_timer", {"minutes": 45}),
)


def is_right(given: dict[str, Any], right: dict[str, Any]) -> bool:
    """Return whether an object has these values; texts in any case."""

    def plain(value: Any) -> Any:
        return value.strip().lower() if isinstance(value, str) else value

    return all(plain(given.get(key)) == value for key, value in right.items())
