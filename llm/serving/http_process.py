"""HTTP in a process of its own: routes, JSON and detokenising never take the engine's lock.

It is forked before paddle is loaded, so that it begins at once and answers while the model loads. A
link (:mod:`llm.serving.link`) joins it with the engine's process: where that ends, it ends.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping

from data.tokenizer import Tokenizer
from llm.config.serving import ServerArguments
from llm.serving.link import Link, SocketLink, pair
from llm.serving.listening import local_url
from llm.serving.settings import OperatorFiles

logger = logging.getLogger(__name__)

# After the drain: for clients to hear that the server stops, and for connections to close.
_END_S = 8.0
_LOST = 1


class HttpProcess:
    """The child that serves HTTP.

    Args:
        arguments: addresses and limits.
        files: what the operator's files say.
        listening: sockets by the flag of their port.
        tokenizer: the model's.
        on_lost: is called when the process ends unasked.
    """

    def __init__(
        self,
        arguments: ServerArguments,
        files: OperatorFiles,
        listening: Mapping[str, socket.socket],
        tokenizer: Tokenizer,
        on_lost: Callable[[], None],
    ) -> None:
        self.link, other = pair()
        self.lost = False
        self._on_lost = on_lost
        self._stopping = threading.Event()
        # Forked, it has what this process has read, and takes no time to begin.
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve,
            args=(arguments, files, listening, tokenizer, self.link, other),
            name="http",
        )
        self._process.start()
        other.close()
        for one in listening.values():
            one.close()  # in this process
        threading.Thread(target=self._watch, name="http-watch", daemon=True).start()

    def stop(self, drain_seconds: float) -> None:
        """Take nothing new, let what runs end for so long, and end the process."""
        self._stopping.set()
        self.link.send("stop", drain_seconds)
        try:
            self._process.join(drain_seconds + _END_S)
        finally:  # also where a later signal ends the waiting
            if self._process.is_alive():
                logger.error("the HTTP process is killed; what it served is cut off")
                self._process.kill()
                self._process.join()

    def hang_up(self) -> None:
        """Have the operator's files read again."""
        pid = self._process.pid
        if pid is not None and not (self.lost or self._stopping.is_set()):
            os.kill(pid, signal.SIGHUP)

    def _watch(self) -> None:
        # Not join(), which may not be waited for in two threads.
        multiprocessing.connection.wait([self._process.sentinel])
        if not self._stopping.is_set():
            logger.error("the HTTP process ended unasked; the server ends")
            self.lost = True
            self._on_lost()


def _serve(
    arguments: ServerArguments,
    files: OperatorFiles,
    listening: Mapping[str, socket.socket],
    tokenizer: Tokenizer,
    others: SocketLink,
    link: Link,
) -> None:
    """Serve until the engine's process says that it is enough, or ends."""
    # The engine's process hears signals, and says what follows from them.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if files.may_change:
        signal.signal(signal.SIGHUP, lambda *_: files.reload())
    others.close()  # or the end of that process would not be seen here
    # Here, beside the other process's import of paddle.
    from llm.serving.loop import EngineWorker
    from llm.serving.sites import sites
    from llm.serving.wsgi import HttpServer

    worker = EngineWorker(link, arguments.max_queue, tokenizer, on_lost=_lost)
    server = HttpServer(
        sites(arguments, files, worker, listening),
        max_requests=arguments.max_num_seqs + arguments.max_queue,
        max_body_bytes=arguments.max_body_bytes,
    )
    server.start()
    worker.start()
    worker.wait_loaded()
    # A signal may have come meanwhile; it may come at any moment.
    if worker.loaded is not None and worker.status == "ok":
        port, secure = listening["flask_port"].getsockname()[1], files.tls is not None
        url = local_url(arguments.host, port, secure)
        logger.info("API ready: %s/v1 (model %s)", url, worker.loaded.model.name)
    worker.wait_asked()
    if left := worker.drain():
        logger.warning("%d requests have not ended in time and are cut off", left)
    worker.close()
    server.stop()


def _lost() -> None:
    logger.error("the engine's process ended; the HTTP process ends with it")
    os._exit(_LOST)
