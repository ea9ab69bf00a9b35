"""The one exception type of `data`: bad input that the user can put right."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path


class DataError(ValueError):
    """Bad input: the message names the value, the limit and what to do.

    Scripts print it as one message without a traceback and exit with status 2.
    """


@contextmanager
def writing(path: Path | str, *, hint: str = "") -> Iterator[None]:
    """Turn an `OSError` raised while writing `path` into a `DataError` that says what to do.

    `hint` is added to the message, for example how to go on after making room.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"no space is left on the disk while writing {path}: free some"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"{path} may not be written ({error.strerror}): choose another place"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            reason = f"{path} cannot be made: a file stands where a directory is needed"
        else:
            reason = f"writing {path} failed: {error.strerror or error}"
        raise DataError(f"{reason}{'; ' + hint if hint else ''}") from error


def check_integer(name: str, value: int, *, least: int, most: int | None = None) -> None:
    """`DataError` unless `value` is an integer in range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise DataError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        upper = f" and at most {most}" if most is not None else ""
        raise DataError(f"{name} must be at least {least}{upper}, got {value}")
