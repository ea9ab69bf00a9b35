"""Random JSON schemas, all of whose answers end: bounded in length and depth."""

import random
from typing import Any

Schema = dict[str, Any]
_NAMES = ("name", "age", "the key", "ключ", "d")
_PATTERNS = ("^[a-c]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no|[A-Z][a-z]{1,4})$", "^x?[^a-z ]{2}$")
# A time is none of them: RFC 3339 sets no end to the digits of its seconds, and some models set
# none either.
_FORMATS = ("date", "ipv4", "uuid")


def _integer(rng: random.Random, depth: int) -> Schema:
    low = rng.randrange(-50, 50)
    if rng.random() < 0.3:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 7}
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 500)}


def _string(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(1, 9)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(_NAMES, rng.randrange(1, 4))
    return {
        "type": "object",
        "properties": {name: draw(rng, depth - 1) for name in names},
        "required": names[: rng.randrange(len(names) + 1)],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    sizes = {"minItems": rng.randrange(2), "maxItems": rng.randrange(2, 4)}
    if rng.random() < 0.2:
        first = [draw(rng, depth - 1), draw(rng, depth - 1)]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": 2}
    return {"type": "array", "items": draw(rng, depth - 1), **sizes}


def _recursive(rng: random.Random, depth: int) -> Schema:
    """A list in a list in a list, so deep and no further."""
    deepest = rng.randrange(2, 5)
    levels: Schema = {"n0": {"const": []}}
    for level in range(1, deepest + 1):
        below = {"$ref": f"#/$defs/n{level - 1}"}
        levels[f"n{level}"] = {"type": "array", "items": below, "maxItems": 2}
    return {"$defs": levels, "$ref": f"#/$defs/n{deepest}"}


_LEAVES = (
    _integer,
    _string,
    lambda rng, depth: {"type": "string", "pattern": rng.choice(_PATTERNS)},
    lambda rng, depth: {"type": "string", "format": rng.choice(_FORMATS)},
    lambda rng, depth: {"enum": [rng.randrange(100) / 8 for _ in range(3)]},
    lambda rng, depth: {"enum": rng.sample(["a", 'q"uote', "zwölf", 3, None, True], 3)},
    lambda rng, depth: {"const": {"k": [1, "two"]}},
    lambda rng, depth: {"type": rng.choice(["boolean", "null"])},
)
_BRANCHES = (
    _object,
    _array,
    lambda rng, depth: {"anyOf": [draw(rng, depth - 1), draw(rng, depth - 1)]},
)


def draw(rng: random.Random, depth: int = 2) -> Schema:
    """Return a schema of so many levels at most."""
    return rng.choice([*_LEAVES, *(_BRANCHES * 2 if depth else ())])(rng, depth)


def whole(rng: random.Random) -> Schema:
    """Return a schema for an answer; one in ten refers to parts of itself."""
    return _recursive(rng, 0) if rng.random() < 0.1 else draw(rng)
