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
from data.tokenizer import Tokenizer
from llm.config.generation import OpenArguments
from llm.config.serving import ServerArguments
from llm.engine.finding import Found
from llm.engine.opening import open_model
from llm.engine.request import Request, SamplingParams
from llm.serving.http_process import HttpProcess
from llm.serving.listening import listen, local_url
from llm.serving.page.page_process import PageProcess
from llm.serving.served import CONTEXT
from llm.serving.settings import OperatorFiles, hearing_hangup
from llm.serving.steps import EngineSteps, Loaded

logger = logging.getLogger(__name__)

# Of a request, where its limits allow more: the cache is not made for all of them at their limit.
_USUAL_TOKENS = 2048
_ONE_SIGNAL_S = 2.0


def open_served(place: OpenArguments, found: Found, arguments: ServerArguments) -> Loaded:
    """Open a model and an engine for several requests together, and run it once.

    Args:
        place: which model.
        found: what lies there.
        arguments: name of the model, and the limits of a request.

    Raises:
        UserError: see ``open_model``.
    """
    if arguments.adapter_dir is not None and found.manifest is not None:
        raise UserError(
            f"adapter_dir={arguments.adapter_dir}: an exported program takes no adapters for "
            "single requests; open the model directory (--model_name_or_path), or drop the flag"
        )
    model = open_model(place, found)
    if arguments.model_id is not None:
        model = dataclasses.replace(model, name=arguments.model_id)
    if model.name in model.adapter_names:
        raise UserError(
            f"adapters: {model.name!r} is the model's own name, by which requests ask for it "
            "without an adapter; give the adapter another name, or the model one (--model_id)"
        )
    for name in set(arguments.any_names) & set(model.adapter_names):
        raise UserError(
            f"adapters: {name!r} is what clients send where nobody has set a model, and means the "
            "model itself; give the adapter another name, or set --strict_model_name"
        )
    for alias in arguments.model_alias:
        if alias in model.adapter_names:
            raise UserError(
                f"model_alias={alias!r} is the name of an adapter (--adapters); requests could "
                "not tell them apart: give one of them another name"
            )
    asked = arguments.src_length + arguments.max_length
    longest = min(asked, arguments.max_model_len or asked, model.context)
    engine = model.open_engine(
        arguments.max_num_seqs,
        longest,
        max_step_tokens=arguments.max_num_batched_tokens,
        usual_tokens=_USUAL_TOKENS,
    )
    # The first run is slow (kernels are chosen, memory is taken); users should not wait for it.
    first = SamplingParams(max_new_tokens=2, temperature=0, ignore_eos=True)
    engine.generate([Request([0], first)])
    return Loaded(model, engine, _limited_by(arguments, longest, engine.max_model_len))


def _limited_by(arguments: ServerArguments, asked: int, longest: int) -> str:
    """Return what sets the longest request, as messages name it."""
    if longest < asked:
        logger.warning(
            "prompt and answer have %d tokens at most, what --cache_blocks holds; the other limits "
            "allow %d",
            longest,
            asked,
        )
        return "--cache_blocks"
    return "--max_model_len" if asked == arguments.max_model_len else CONTEXT


def serve(arguments: ServerArguments, load: Callable[[], Loaded], tokenizer: Tokenizer) -> None:
    """Serve until SIGTERM or SIGINT; HTTP and page are children of this process, the engine's.

    Ports are bound before the model is loaded; while it loads, ``/health`` says so.

    Args:
        arguments: addresses and limits.
        load: opens the model; runs on the engine's thread.
        tokenizer: the model's.

    Raises:
        UserError: a port in use, a bad file of TLS or of keys, a log that cannot be written; or
            whatever ``load`` raises.
        SystemExit: the HTTP process ended unasked, or the engine's thread broke.
    """
    files = OperatorFiles(arguments)
    with _stop_signals() as stop, ExitStack() as last, ExitStack() as cleanup:
        if not arguments.no_ui:
            listen(arguments.host, arguments.port, "port").close()
        listening = {"flask_port": listen(arguments.host, arguments.flask_port, "flask_port")}
        if arguments.management_port is not None:
            place = arguments.management_host, arguments.management_port, "management_port"
            listening["management_port"] = listen(*place)
        port = listening["flask_port"].getsockname()[1]
        http = HttpProcess(arguments, files, listening, tokenizer, stop.set)
        hang_up = last.enter_context(hearing_hangup(files))
        hang_up.append(http.hang_up)
        delay = arguments.max_queue_delay_microseconds / 1e6
        steps = EngineSteps(load, http.link, max_queue_delay=delay, on_broken=stop.set)
        cleanup.callback(steps.close)
        cleanup.callback(lambda: http.stop(0.0 if steps.broken else arguments.drain_seconds))
        steps.start()
        if not arguments.no_ui:
            url = local_url(arguments.host, port, files.tls is not None)
            page = PageProcess(arguments, url)
            hang_up.append(page.hang_up)
            last.callback(page.stop)  # its users' answers end before it does
        while not steps.wait_loaded(timeout=0.1):
            if stop.is_set():
                break
        stop.wait()
        if http.lost or steps.broken:
            raise SystemExit(1)
        logger.info("stopping: what runs has %g seconds to end", arguments.drain_seconds)


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
