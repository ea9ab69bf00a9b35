"""What foreign tokenizers are not given, and what they throw, as errors of ours: C++ exceptions and
Rust panics too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from common.errors import DataError

# A panic of Rust is a BaseException of this name, which no module exports.
_PANIC = "PanicException"


@contextmanager
def fenced(name: str, texts: Sequence[str]) -> Iterator[None]:
    """Let the library called `name` work on some texts.

    Raises:
        DataError: it throws anything of its own.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        raise DataError(f"{name} cannot encode {_which(texts)}: {_first_line(error)}") from None


def _which(texts: Sequence[str]) -> str:
    longest = max(texts, key=len, default="")
    return (
        f"a text of {len(longest)} characters, {longest[:40]!r}"
        if len(texts) == 1
        else f"one of {len(texts)} texts, the longest of {len(longest)} characters"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]


def check_text(text: str) -> None:
    """`DataError` unless `text` is a str that UTF-8 can hold."""
    if not isinstance(text, str):
        raise DataError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which is not Unicode text: remove or replace it"
        ) from None
