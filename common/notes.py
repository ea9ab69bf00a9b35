"""What a process says once, however often it comes upon it."""

import functools
import logging


@functools.cache
def say_once(log: logging.Logger, sentence: str) -> None:
    """Log a warning, the first time."""
    log.warning("%s", sentence)
