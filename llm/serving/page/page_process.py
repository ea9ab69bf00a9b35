"""The chat page in a process of its own: importing gradio costs the API nothing, and neither can
take the other down."""

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from common.errors import UserError
from llm.config.serving import ServerArguments

logger = logging.getLogger(__name__)

# A page that ends sooner would end again.
_YOUNG_S = 10.0
_REPO = Path(__file__).resolve().parents[3]


class PageProcess:
    """Starts ``python -m llm.serving.page.ui``; its stdin is a leash: it ends with us.

    A line on it says that certificates have changed.

    Args:
        arguments: host, port and title of the page.
        api_url: address of the API as this machine reaches it.

    Raises:
        UserError: gradio is not installed.
    """

    def __init__(self, arguments: ServerArguments, api_url: str) -> None:
        if importlib.util.find_spec("gradio") is None:
            raise UserError("the chat page needs gradio: pip install gradio, or use --no_ui")
        path = os.pathsep.join(filter(None, (str(_REPO), os.environ.get("PYTHONPATH"))))
        flags: dict[str, object] = {
            "api_url": api_url,
            "host": arguments.host,
            "port": arguments.port,
            "title": arguments.title,
            "root_path": arguments.root_path,
        }
        if arguments.ssl_certfile is not None:
            flags["api_certificate"] = flags["ssl_certfile"] = arguments.ssl_certfile
            if arguments.ssl_keyfile is not None:
                flags["ssl_keyfile"] = arguments.ssl_keyfile
        self._command = [sys.executable, "-m", "llm.serving.page.ui", "--until_stdin_closes"]
        self._command += [f"--{name}={value}" for name, value in flags.items()]
        self._environment = {**os.environ, "PYTHONPATH": path}
        self._lock = threading.Lock()  # of the next two
        self._stopping = False
        self._process = self._start()
        threading.Thread(target=self._watch, name="page-watch", daemon=True).start()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._environment)

    def hang_up(self) -> None:
        """Have the certificates read again, where there are any."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, or is ended
            stdin.write(b"\n")
            stdin.flush()

    def stop(self) -> None:
        """End the page; kill it when it does not go within three seconds."""
        with self._lock:
            self._stopping = True
            process = self._process
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(3.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _watch(self) -> None:
        """Start the page again when it ends unasked, unless it cannot stay."""
        while True:
            began = time.monotonic()
            status = self._process.wait()
            with self._lock:
                if self._stopping:
                    return
                if time.monotonic() - began < _YOUNG_S:
                    logger.error(
                        "the chat page ended with status %d, soon after its start, and is not "
                        "started again; the API goes on",
                        status,
                    )
                    return
                logger.error("the chat page ended with status %d and is started again", status)
                self._process = self._start()
