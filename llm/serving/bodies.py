"""What the bodies of all routes share: fields, types and ranges that need no model to be checked.

Three kinds of fields: those that work; those of other servers that have no effect here, which are
accepted at the value that means "off" and refused otherwise (:mod:`llm.serving.off`); and unknown
ones, which are refused unless they are null: clients send back whole what an answer said, with
every field that their version knows. Nothing that would change an answer is ignored.
"""

import difflib
import json
import math
import sys
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from common.jsonl import unrepeated
from llm.config.sampling import RANGES
from llm.serving.errors import ApiError
from llm.serving.off import is_off, refusal, without_off

MAX_CHOICES = 64  # prompts times n of one request
MAX_STOPS = 16
MAX_SEED = 2**63 - 1
MAX_PRIORITY = 2**31
MAX_DEPTH = 100  # objects and lists within each other
MAX_COUNT = 2**31

_Body = TypeVar("_Body", bound="RequestBody")


def Neutral(*allowed: Any) -> AfterValidator:  # noqa: N802 - reads as an annotation
    """Annotate a field that is accepted only at null and the values that change nothing."""

    def check(value: Any) -> Any:
        if is_off(value, allowed):
            return value
        raise refusal("", allowed)

    return AfterValidator(check)


def _as_stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


StopList = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_stop_list),
]


def as_whole(value: Any) -> Any:
    """Take 16.0 for 16: there are clients without whole numbers, behind some JSON writers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_drawn(value: Any) -> Any:
    return None if value == -1 and not isinstance(value, bool) else value


Whole = Annotated[int, BeforeValidator(as_whole)]
Count = Annotated[Whole | None, Field(ge=1, le=MAX_COUNT)]
# -1 is drawn, as for vLLM and llama.cpp.
Seed = Annotated[Whole | None, Field(ge=0, le=MAX_SEED), BeforeValidator(_as_drawn)]
TopP = Annotated[float | None, Field(gt=RANGES["top_p"].least, le=RANGES["top_p"].most)]
TypicalP = Annotated[float | None, Field(gt=RANGES["typical_p"].least, le=RANGES["typical_p"].most)]
MinP = Annotated[float | None, Field(ge=RANGES["min_p"].least, le=RANGES["min_p"].most)]
_PENALTY = RANGES["repetition_penalty"]
RepetitionPenalty = Annotated[float | None, Field(ge=_PENALTY.least, le=_PENALTY.most)]
_PRESENCE = RANGES["presence_penalty"]
PresencePenalty = Annotated[float | None, Field(ge=_PRESENCE.least, le=_PRESENCE.most)]
Priority = Annotated[Whole | None, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]


class RequestBody(BaseModel):
    """A JSON object whose fields are all known, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True)
    takes_off: ClassVar[bool] = False  # fields of other servers too, where they change nothing

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_off(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        if cls.takes_off:
            content = without_off(cls.model_fields, content, cls.__name__)
        if None not in content.values():
            return content
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: one for name, one in content.items() if one is not None or name in known}


def fault(field: str, message: str, value: Any = None, code: str = "") -> ValidationError:
    """Return what a body that is checked as a whole says of one of its fields.

    Args:
        field: at fault.
        message: what is wrong with it, and what to do.
        value: of the field, to be shown.
        code: the field's name when not given.
    """
    error = PydanticCustomError(code or field, "{message}", {"message": message})  # type: ignore[arg-type]
    details = [InitErrorDetails(type=error, loc=(field,), input=value)]
    return ValidationError.from_exception_data("body", details)


def parse_body(kind: type[_Body], body: bytes) -> _Body:
    """Turn a request's bytes into a checked body.

    Raises:
        ApiError: 400; ``param`` names the field at fault.
    """
    return checked(kind, parse_object(body))


def parse_object(body: bytes) -> dict[str, Any]:
    """Turn a request's bytes into a JSON object.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        content = read_json(body.decode("utf-8-sig"))  # RFC 8259 lets a reader skip the mark
    except ValueError as error:
        raise ApiError(
            f"the request body is not valid JSON: {error}", code="invalid_json"
        ) from None
    # What walks it later is Python, whose stack is small; most bodies need no look.
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and is_deeper(content, MAX_DEPTH):
        raise ApiError(
            f"the request body's objects and lists lie more than {MAX_DEPTH} deep in each other; "
            "send something flatter",
            code="invalid_json",
        )
    if not isinstance(content, dict):
        raise ApiError(
            f"the request body has to be a JSON object, not {type(content).__name__}",
            code="invalid_json",
        )
    return content


def read_json(text: str) -> Any:
    """Turn a text into what its JSON says: all of it, or nothing.

    Raises:
        ValueError: it is none; or has what would be lost on the way, such as a second value of a
            key, a number that no float holds, half a surrogate pair.
    """
    try:
        content = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=unrepeated,
        )
    except RecursionError:
        raise ValueError(f"it is more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        most = sys.get_int_max_str_digits()
        raise ValueError(f"it has a whole number of more than {most} digits") from None
    if "\\u" in text:  # half a surrogate pair is a valid JSON escape but not a character
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


def is_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists lie more than so many deep in each other."""
    inner = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        inner = [
            one
            for outer in inner
            for one in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(one, dict | list)
        ]
        if not inner:
            return False
    return bool(inner)


def checked(kind: type[_Body], content: dict[str, Any]) -> _Body:
    """Turn a JSON object into a checked body.

    Raises:
        ApiError: 400; ``param`` names the field at fault.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _as_api_error(kind, error) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text:.40} is too large; numbers end at {sys.float_info.max:.2g}")
    return value


def _as_api_error(kind: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    location = [str(part) for part in first["loc"]]
    param = ".".join(location) or None
    if first["type"] == "missing":
        return ApiError(f"{param} is missing; it is required", param=param, code="missing")
    if first["type"] == "extra_forbidden":
        near = _near_field(kind, location)
        hint = f"did you mean {near}?" if near else "docs/serving.md lists what there is"
        return ApiError(f"unknown field {param!r}; {hint}", param=param, code="unknown_parameter")
    if param is None:
        return ApiError(first["msg"], param=first["type"], code="invalid_value")
    code = "unsupported_value" if first["type"] == "unsupported_value" else "invalid_value"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    message = first["msg"][0].lower() + first["msg"][1:]
    return ApiError(f"{param}={shown}: {message}", param=param, code=code)


def _within(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the bodies that a field's type names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _within(part)


def _near_field(kind: type[BaseModel], location: list[str]) -> str | None:
    """Return the field of this route that is spelled nearly so: there, or at another place."""
    here, given = location[0] if len(location) > 1 else "", location[-1]
    fields = kind.model_fields.items()
    inner = {name: next(_within(field.annotation), None) for name, field in fields}
    places = {"": kind} | {name: body for name, body in inner.items() if body is not None}
    for place in sorted(places, key=lambda name: name != here):
        fields = places[place].model_fields.items()
        names = [field.alias or name for name, field in fields]
        known = [name for name in names if (place, name) != (here, given)]
        if near := difflib.get_close_matches(given, known, n=1, cutoff=0.8):
            if place == here:
                return repr(near[0])
            return repr(f"{place}.{near[0]}") if place else f"{near[0]!r} of the body itself"
    return None
