"""The server as a whole: API, engine and chat page, from binding the ports to a clean end."""

import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from common.errors import UserError
from llm.config.generation import OpenArguments
from llm.config.serving import ServerArguments
from llm.engine.opening import Found, open_model
from llm.engine.request import Request, SamplingParams
from llm.serving.api import ApiSettings, create_app
from llm.serving.loop import EngineWorker, Served
from llm.serving.page.page_process import PageProcess
from llm.serving.requests import Limits
from llm.serving.wsgi import HttpServer, listen, local_url

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "LLM_API_KEY"
# Of a request, where its limits allow more: the cache is not made for all of them at their limit.
_USUAL_TOKENS = 2048
_ONE_SIGNAL_S = 2.0


def open_served(place: OpenArguments, found: Found, arguments: ServerArguments) -> Served:
    """Open a model and an engine for several requests together, and run it once.

    Args:
        place: which model.
        found: what lies there.
        arguments: name of the model, and the limits of a request.

    Raises:
        UserError: see ``open_model``.
    """
    model = open_model(place, found)
    if arguments.model_id is not None:
        model = dataclasses.replace(model, name=arguments.model_id)
    if model.name in model.adapter_names:
        raise UserError(
            f"adapters: {model.name!r} is the model's own name, by which requests ask for it "
            "without an adapter; give the adapter another name, or the model one (--model_id)"
        )
    longest = min(arguments.src_length + arguments.max_length, model.context)
    engine = model.open_engine(
        arguments.max_num_seqs,
        longest,
        max_step_tokens=arguments.max_num_batched_tokens,
        usual_tokens=_USUAL_TOKENS,
    )
    # The first run is slow (kernels are chosen, memory is taken); users should not wait for it.
    first = SamplingParams(max_new_tokens=2, temperature=0, ignore_eos=True)
    engine.generate([Request([0], first)])
    return Served(model, engine)


def serve(arguments: ServerArguments, load: Callable[[], Served]) -> None:
    """Serve until SIGTERM or SIGINT.

    Both ports are bound before the model is loaded; while it loads, ``/health`` says so.

    Args:
        arguments: addresses and limits.
        load: opens the model; runs on the engine's thread.

    Raises:
        UserError: a port in use; or whatever ``load`` raises.
    """
    api_key = arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None
    settings = ApiSettings(
        Limits(arguments.src_length, arguments.max_length), arguments.max_body_bytes, api_key
    )
    delay = arguments.max_queue_delay_microseconds / 1e6
    worker = EngineWorker(load, arguments.max_queue, max_queue_delay=delay)
    with _stop_signals() as stop, ExitStack() as cleanup:
        if not arguments.no_ui:
            listen(arguments.host, arguments.port, "port").close()
        http = HttpServer(
            create_app(worker, settings),
            host=arguments.host,
            port=arguments.flask_port,
            max_requests=arguments.max_num_seqs + arguments.max_queue,
            max_body_bytes=arguments.max_body_bytes,
        )
        http.start()
        cleanup.callback(http.stop)
        worker.start()
        cleanup.callback(worker.close)
        url = local_url(arguments.host, http.port)
        if not arguments.no_ui:
            page = PageProcess(arguments, url, {API_KEY_VARIABLE: api_key} if api_key else {})
            cleanup.callback(page.stop)
        while not worker.wait_loaded(timeout=0.1):
            if stop.is_set():
                return
        logger.info("API ready: %s/v1 (model %s)", url, worker.served.model.name)
        stop.wait()
        logger.info("stopping")


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first SIGTERM or SIGINT into an event; a later one kills as usual.

    Paddle's launcher sends each of its signals three times within half a second.
    """
    stop = threading.Event()
    watched = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in watched}
    first = 0.0

    def on_signal(number: int, frame: object) -> None:
        nonlocal first
        if not stop.is_set():
            first = time.monotonic()
            stop.set()
        elif time.monotonic() - first > _ONE_SIGNAL_S:
            restore()
            os.kill(os.getpid(), number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in watched:
        signal.signal(number, on_signal)
    try:
        yield stop
    finally:
        if not stop.is_set():  # else the process ends, and its first signal may come again
            restore()


def log_to_stderr() -> None:
    """Log one line per request and event, the way servers do."""
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
