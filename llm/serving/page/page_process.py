"""The chat page in a process of its own: importing gradio costs the API nothing, and neither can
take the other down."""

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from common.errors import UserError
from llm.config.serving import ServerArguments

logger = logging.getLogger(__name__)

_REPO = Path(__file__).resolve().parents[3]


class PageProcess:
    """Starts ``python -m llm.serving.page.ui``; its stdin is a leash: it ends with us.

    Args:
        arguments: host, port and title of the page.
        api_url: address of the API as this machine reaches it.
        secrets: environment variables for the page alone.

    Raises:
        UserError: gradio is not installed.
    """

    def __init__(
        self, arguments: ServerArguments, api_url: str, secrets: Mapping[str, str]
    ) -> None:
        if importlib.util.find_spec("gradio") is None:
            raise UserError("the chat page needs gradio: pip install gradio, or use --no_ui")
        path = os.pathsep.join(filter(None, (str(_REPO), os.environ.get("PYTHONPATH"))))
        flags = {
            "api_url": api_url,
            "host": arguments.host,
            "port": arguments.port,
            "title": arguments.title,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llm.serving.page.ui", "--until_stdin_closes"]
            + [f"--{name}={value}" for name, value in flags.items()],
            stdin=subprocess.PIPE,
            env={**os.environ, **secrets, "PYTHONPATH": path},
        )
        self._stopping = threading.Event()
        threading.Thread(target=self._watch, name="page-watch", daemon=True).start()

    def stop(self) -> None:
        """End the page; kill it when it does not go within three seconds."""
        self._stopping.set()
        self._process.stdin.close()
        try:
            self._process.wait(3.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _watch(self) -> None:
        status = self._process.wait()
        if not self._stopping.is_set():
            logger.error("the chat page ended with status %d; the API goes on", status)
