"""One line of JSON for each request: who asked for what, how it ended, how long it took.

Keys are never in it. What was asked and answered is, where an operator wants texts.
"""

import json
import logging
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import writing

logger = logging.getLogger(__name__)

STDOUT = "-"


class AccessLog:
    """Appends lines to a file; any number of threads.

    Args:
        path: the file, or ``-`` for standard output.
        texts: requests and answers are logged, too.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: str, *, texts: bool = False) -> None:
        self.texts = texts
        self._path = path
        self._lock = threading.Lock()
        self._failed = False
        self._file = self._opened()

    def _opened(self) -> int:
        if self._path == STDOUT:
            return sys.stdout.fileno()
        with writing(self._path):
            # Its owner's alone: it may hold what people wrote.
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def reopen(self) -> None:
        """Go on under the same name, where the file was moved away (logrotate)."""
        if self._path == STDOUT:
            return
        try:
            file = self._opened()
        except UserError as error:
            logger.error("the access log stays where it is: %s", error)
            return
        with self._lock:
            before, self._file = self._file, file
        os.close(before)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line; what has no value is left out. A full disk is told of and stops nobody."""
        told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **entry}
        line = json.dumps({name: value for name, value in told.items() if value is not None})
        try:
            with self._lock:
                _write_all(self._file, line.encode() + b"\n")
            self._failed = False
        except OSError as error:
            if not self._failed:
                logger.error("the access log %s cannot be written: %s", Path(self._path), error)
            self._failed = True


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
