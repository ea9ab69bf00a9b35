"""Answer a file of requests in OpenAI's batch form: python -m llm.serving.batch.

  a model here       --input_file asked.jsonl --output_file answered.jsonl --model_name_or_path DIR
  a server anywhere  --input_file asked.jsonl --output_file answered.jsonl --api_url URL

Answers are kept as they come. After an early end the same command goes on; requests that failed
are in a file of their own, and are sent again by the same command.
"""

from common.ending import run_script  # isort: split

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from common.errors import UserError
from common.files import check_target, followed, written_through
from common.flags import load, meant
from common.results import Journal
from llm.config.batch import BatchArguments, check_one_answers
from llm.config.generation import OpenArguments
from llm.config.scripts import SCRIPTS
from llm.serving.batch_client import GoneError, asking_server
from llm.serving.batch_files import (
    BatchRequest,
    Reply,
    answer_row,
    earlier_answers,
    read_requests,
)

if TYPE_CHECKING:
    from flask import Flask

Ask = Callable[[str, bytes], Awaitable[Reply]]
Asking = Callable[[], AbstractAsyncContextManager[Ask]]

_PROG = "llm.serving.batch"
# Flags of a model that its answers do not depend on.
_SPEED = {
    *("threads", "packed_cache", "cache_blocks", "prompt_lookup_num_tokens"),
    *("draft_model_name_or_path", "num_speculative_tokens"),
}


def _check_places(args: BatchArguments) -> None:
    """Refuse places that the answers could not go to."""
    check_target(args.output_file, "output_file")
    check_target(args.error_place, "error_file")
    named = {"input_file": args.input_file, "output_file": args.output_file}
    seen: dict[Path, str] = {}
    for name, place in {**named, "error_file": args.error_place}.items():
        other = seen.setdefault(followed(Path(place)), name)
        if other != name:
            raise UserError(f"{other} and {name} are both {place}; give another {name}")
    if args.error_file is None and written_through(followed(Path(args.output_file))):
        raise UserError(
            f"output_file {args.output_file} is no regular file, beside which another could lie; "
            "say where requests that fail go: --error_file"
        )


def _any_route(_: str) -> None:
    """A server is asked what it has."""


def _route_check(app: "Flask") -> Callable[[str], str | None]:
    """Return what tells why an application does not take a POST to a route."""
    from werkzeug.exceptions import HTTPException

    routes = app.url_map.bind("batch")
    posts = sorted(one.rule for one in app.url_map.iter_rules() if "POST" in (one.methods or ()))

    def check(url: str) -> str | None:
        try:
            routes.match(url, method="POST")
        except HTTPException:
            return f"there is no such route; batches are answered by {', '.join(posts)}"
        return None

    return check


class Batch:
    """Requests, what answers them, and the two files that they go to.

    ``failed``: how many requests did; ``first_fault``: which one first, and why.
    """

    def __init__(self, args: BatchArguments, requests: Sequence[BatchRequest]) -> None:
        self._args, self._requests = args, requests
        self.first_fault = ""
        self.failed = 0

    def run(self, asking: Callable[[], Asking], width: int) -> None:
        """Answer what is not answered yet.

        Args:
            asking: opens what answers, a model or a connection, if there is anything to ask.
            width: requests on their way at a time.
        """
        args, total = self._args, len(self._requests)
        with (
            Journal(args.output_file, earlier_answers(self._requests)) as answers,
            Journal(args.error_place, lambda place, row: None) as errors,
        ):
            left = [number for number in range(total) if number not in answers]
            if len(left) < total:
                _note(f"{total - len(left)} of {total} requests are answered already\n")
            try:
                if left:
                    asyncio.run(self._answer_all(asking(), left, width, answers, errors))
                self.failed = errors.count
                _finish(answers, errors, args)
            except BaseException:
                if answers.count and not answers.through:
                    kept = f"{answers.count} of {total} answers are in {answers.place}"
                    _note(f"\nstopped: {kept}; the same command goes on from there\n")
                raise

    async def _answer_all(
        self, asking: Asking, left: Sequence[int], width: int, answers: Journal, errors: Journal
    ) -> None:
        queue = iter(left)
        total = len(self._requests)
        with tqdm(
            total=total, initial=total - len(left), desc="answers", disable=None, leave=False
        ) as bar:

            async def go_through(ask: Ask) -> None:
                for number in queue:
                    request = self._requests[number]
                    reply = await ask(request.url, json.dumps(request.body).encode())
                    journal = answers if reply.status == 200 else errors
                    if journal is errors and not self.first_fault:
                        self.first_fault = f"{request.custom_id!r:.60}: {reply.fault:.300}"
                    journal.add(number, answer_row(request, reply))
                    bar.update()

            async with asking() as ask:
                tasks = [asyncio.create_task(go_through(ask)) for _ in range(min(width, len(left)))]
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()


def _finish(answers: Journal, errors: Journal, args: BatchArguments) -> None:
    answers.finish()
    if errors.count or errors.through:
        errors.finish()
    else:
        args.error_place.unlink(missing_ok=True)  # an earlier run's


def _note(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


@contextmanager
def _answering_app(place: OpenArguments, args: BatchArguments) -> Iterator[tuple["Flask", Any]]:
    """Yield the server's application without a server, and what loads its model.

    What a line is answered with is what the route answers: one schema, one plan, one loop.
    """
    from llm.config.serving import ServerArguments
    from llm.engine.finding import find_model
    from llm.serving.api import create_app
    from llm.serving.local import LocalWorker
    from llm.serving.requests import Limits
    from llm.serving.service import open_served
    from llm.serving.web import ApiSettings

    found = find_model(place)
    shared = {name: getattr(args, name) for name in _OF_SERVERS}
    opened = partial(open_served, place, found, ServerArguments(no_ui=True, **shared))
    if place.rank > 0:
        opened()  # executes rank 0's steps until that is done
    worker = LocalWorker(opened, args.max_num_seqs, found.tokenizer)
    limits = Limits(args.src_length, args.max_length)
    app = create_app(worker, ApiSettings(limits, max_body_bytes=_MOST_BYTES))
    try:
        yield app, worker
    finally:
        worker.close()


_OF_SERVERS = ("src_length", "max_length", "model_id", "max_num_seqs", "max_num_batched_tokens")
_MOST_BYTES = 1 << 30  # the file's lines are in memory already


def asking_app(app: "Flask", width: int) -> Asking:
    """Return what asks an application in this process.

    Args:
        app: of WSGI.
        width: threads that ask it.
    """
    from werkzeug.test import Client

    def ask(url: str, body: bytes) -> Reply:
        answer = Client(app, use_cookies=False).post(
            url, data=body, content_type="application/json"
        )
        text = answer.get_data(as_text=True)
        return Reply(answer.status_code, answer.headers.get("X-Request-Id"), _parsed(text))

    @asynccontextmanager
    async def opened() -> AsyncIterator[Ask]:
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(width, "batch")
        try:
            yield lambda url, body: loop.run_in_executor(pool, ask, url, body)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return opened


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _run_here(args: BatchArguments, place: OpenArguments) -> Batch:
    """Answer with a model in this process."""
    settings = {name: asdict(place)[name] for name in sorted(meant(place) - _SPEED)}
    settings |= {"src_length": args.src_length, "max_length": args.max_length}
    width = 2 * args.max_num_seqs  # so that the engine never waits for a thread
    with _answering_app(place, args) as (app, worker):
        batch = Batch(args, read_requests(args.input_file, _route_check(app), settings))

        def loaded() -> Asking:
            worker.start()
            while not worker.wait_loaded(timeout=0.1):
                pass
            return asking_app(app, width)

        batch.run(loaded, width)
    return batch


def _run_there(args: BatchArguments) -> Batch:
    """Let a server answer."""
    assert args.api_url is not None
    batch = Batch(args, read_requests(args.input_file, _any_route))
    key = os.environ.get("LLM_API_KEY") or None
    asking = asking_server(args.api_url, key, args.max_retries, args.request_timeout_s)
    try:
        batch.run(lambda: asking, args.concurrency)
    except GoneError as error:
        raise UserError(str(error)) from error
    return batch


def main() -> None:
    """Read flags and requests, answer, and say what failed."""
    args, place = load(SCRIPTS[_PROG], prog=_PROG, description=__doc__ or "")
    check_one_answers(args, place)
    _check_places(args)
    batch = _run_there(args) if args.api_url is not None else _run_here(args, place)
    if batch.failed:
        _note(f"{batch.failed} requests failed: {args.error_place}; {batch.first_fault}\n")
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
