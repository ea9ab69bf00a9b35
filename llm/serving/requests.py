"""What the engine has to do for one HTTP request, and doing it.

Each family of routes makes a :class:`Plan` of its bodies; :class:`Checker` checks everything that
depends on the loaded model (prompt length, room for the answer, token ids) before a request waits
in line. :func:`run` then yields pieces of text as the engine makes them.
"""

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import DataError
from llm.engine.request import GrammarSpec, Request, SamplingParams, Token
from llm.serving.errors import ApiError
from llm.serving.loop import EngineWorker, Gone, Served
from llm.serving.text import Answer, Piece, TextAssembler
from llm.serving.tools.dialect import AUTO
from llm.serving.tools.stream import Calls
from llm.serving.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What an operator says of each request.

    Args:
        src_length: longest prompt.
        max_length: most new tokens per answer.
        tool_call_parser: name in ``llm.serving.tools.parsers.PARSERS``, or "auto".
    """

    src_length: int
    max_length: int
    tool_call_parser: str = AUTO


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request.

    ``context`` is what the detokeniser sees before the answer. Where ``max_tokens`` is 0 only the
    prompt is computed, and the answer is empty.
    """

    ids: list[int]
    text: str | None
    context: Sequence[int]
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """All generations of one request: each prompt ``n`` times, in order.

    Where ``candidates`` is more, so many are generated and the best ``n`` of them are answers.

    Args:
        prompts: what to go on from.
        sampling: fields of :class:`llm.engine.request.SamplingParams`, for all of them.
        stops: strings that end an answer.
        n: answers to each prompt.
        best_of: so many are generated for them.
        adapter: that answers.
        grammar: that answers obey.
        priority: smaller ones run first.
        keep_stop: what ends an answer is part of its text.
        show_control: control tokens are part of it, too, spelled out.
        calls: how answers call tools, where they may.
        timeout: seconds after which it ends with an error.
    """

    prompts: list[Prompt]
    sampling: dict[str, Any]
    stops: list[str] = field(default_factory=list)
    n: int = 1
    best_of: int | None = None
    adapter: str | None = None
    grammar: GrammarSpec | None = None
    priority: int = 0
    keep_stop: bool = False
    show_control: bool = False
    calls: Calls | None = None
    timeout: float | None = None

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def most_tokens(self) -> int:
        """What prompts and answers can come to together."""
        most = sum(prompt.max_tokens for prompt in self.prompts)
        return self.num_prompt_tokens + self.candidates * most


@dataclass(frozen=True)
class Event:
    """Text of choice ``index``; ``answer`` is set on the last event of that choice.

    ``num_cached``: how many tokens of its prompt were in the engine's cache. ``num_tokens``: how
    many it has come to. ``num_dropped``: how many there are in candidates that are no answers, told
    with one answer to their prompt. ``prompt``: the scores of the prompt's tokens from the second
    on, where they were asked for.
    """

    index: int
    pieces: list[Piece]
    answer: Answer | None
    num_cached: int
    num_tokens: int
    num_dropped: int = 0
    prompt: tuple[Token, ...] = ()


def encode(served: Served, text: str, param: str, *, bos: bool | None = None) -> list[int]:
    """Return a text's ids, behind the beginning-of-sequence token where there is one.

    Args:
        served: the model.
        text: in which control tokens are ordinary characters.
        param: what the request calls the text.
        bos: put that token there; None is what the tokenizer or the server's flag says.

    Raises:
        ApiError: 400, it has no ids, or the tokenizer breaks on it.
    """
    tokenizer = served.model.tokenizer
    try:
        wanted = tokenizer.adds_bos if bos is None else bos
        ids = tokenizer.encode(text, add_bos=wanted and tokenizer.bos_id is not None)
    except DataError as error:
        # Tokenizers are other people's code, which some texts break.
        raise ApiError(str(error), param=param, code="prompt_not_encoded") from error
    if not ids and bos is not False:
        raise ApiError(
            f"{param} is empty, and no beginning-of-sequence token stands before it to start "
            "from; send some text",
            param=param,
            code="empty_prompt",
        )
    return ids


@dataclass(frozen=True)
class Checker:
    """Checks of one prompt; the two names are how the request calls them."""

    served: Served
    limits: Limits | None
    prompt_name: str
    max_name: str

    def token_ids(self, ids: Sequence[int]) -> None:
        vocab_size = self.served.model.vocab_size
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise ApiError(
                    f"{self.prompt_name} has the token id {token_id}, but this model's ids go "
                    f"from 0 to {vocab_size - 1}",
                    param=self.prompt_name,
                    code="invalid_token_id",
                )

    def prompt(
        self,
        ids: list[int],
        text: str | None,
        context: Sequence[int],
        wanted: int | None,
        default: int,
    ) -> Prompt:
        longest, limited_by = self.served.engine.max_model_len, self.served.engine.limited_by
        allowed = min(self.limits.src_length, longest - 1)
        if len(ids) > allowed:
            by = "--src_length" if allowed == self.limits.src_length else limited_by
            raise ApiError(
                f"{self.prompt_name} has {len(ids)} tokens, but the limit is {allowed} ({by}); "
                "shorten it",
                param=self.prompt_name,
                code="context_length_exceeded",
            )
        room = longest - len(ids)
        if wanted is None:
            return Prompt(ids, text, context, min(default, self.limits.max_length, room))
        if wanted > self.limits.max_length:
            raise ApiError(
                f"{self.max_name}={wanted}, but this server answers with at most "
                f"{self.limits.max_length} tokens (--max_length); ask for fewer",
                param=self.max_name,
                code="invalid_value",
            )
        if wanted > room:
            raise ApiError(
                f"{self.prompt_name} has {len(ids)} tokens and {self.max_name}={wanted}: together "
                f"more than {longest} ({limited_by}); ask for at most {room}",
                param=self.max_name,
                code="context_length_exceeded",
            )
        return Prompt(ids, text, context, wanted)


def run(
    plan: Plan, worker: EngineWorker, gone: Gone, watch: Watch | None = None
) -> Generator[Event, None, None]:
    """Yield the text of all choices as it comes; of the best of several, when these have ended.

    Closing the generator ends them.

    Args:
        plan: what is generated.
        worker: that answers.
        gone: tells whether the client has left.
        watch: of the HTTP request, which is told of every token.

    Raises:
        ApiError: 503 when too many wait or the server stops, 500 when the engine fails.
        ClientGoneError: the client left.
    """
    gone = gone if plan.timeout is None else _until(plan.timeout, gone)
    with closing(_run(plan, worker, gone, watch or Watch())) as events:
        scored = events if plan.sampling.get("prompt_logprobs") is None else _scored(plan, events)
        yield from scored if plan.candidates == plan.n else _best(plan, scored)


def _until(seconds: float, gone: Gone) -> Gone:
    """Return a test whether the client is gone that also knows when its time is up."""
    end = time.monotonic() + seconds

    def check() -> bool:
        if time.monotonic() > end:
            raise ApiError(
                f"the answer did not end within timeout={seconds:g} seconds; raise it, or ask for "
                "fewer tokens",
                status=408,
                param="timeout",
                code="timeout",
            )
        return gone()

    return check


def _scored(plan: Plan, events: Iterable[Event]) -> Iterator[Event]:
    """Tell each event what its prompt scores: computed once for all answers, with the first."""
    scores: dict[int, tuple[Token, ...]] = {}
    held: dict[int, list[Event]] = {}
    for event in events:
        number, candidate = divmod(event.index, plan.candidates)
        if candidate == 0:
            scores.setdefault(number, event.prompt)
        held.setdefault(number, []).append(event)
        if number in scores:
            for one in held.pop(number):
                yield replace(one, prompt=scores[number])


def _best(plan: Plan, events: Iterable[Event]) -> Iterator[Event]:
    """Yield the answers of each prompt whose tokens are likeliest in the mean, these first."""
    ended: list[dict[int, tuple[Answer, Event]]] = [{} for _ in plan.prompts]
    for event in events:
        if event.answer is None:
            continue
        number, candidate = divmod(event.index, plan.candidates)
        found = ended[number]
        found[candidate] = event.answer, event
        if len(found) < plan.candidates:
            continue
        answers = [found[one][0] for one in range(plan.candidates)]
        answers.sort(key=lambda answer: -answer.logprob / max(answer.num_tokens, 1))
        dropped = sum(answer.num_tokens for answer in answers[plan.n :])
        for place, answer in enumerate(answers[: plan.n]):
            yield replace(
                found[0][1],
                index=number * plan.n + place,
                pieces=answer.pieces,
                answer=answer,
                num_tokens=answer.num_tokens,
                num_dropped=0 if place else dropped,
            )


def _run(
    plan: Plan, worker: EngineWorker, gone: Gone, watch: Watch
) -> Generator[Event, None, None]:
    """Yield the text of all candidates as it comes; they are generated together.

    Closing the generator ends them. The random numbers of a choice hang on the seed and on its
    number, so that choices differ and still repeat.

    Raises:
        ApiError: 503 when too many wait or the server stops, 500 when the engine fails.
        ClientGoneError: the client left.
    """
    choices = [(prompt, number) for prompt in plan.prompts for number in range(plan.candidates)]
    assemblers = [_assembler(plan, prompt, worker.served) for prompt, _ in choices]
    unfinished = set(range(len(choices)))
    sizes = [(len(prompt.ids), prompt.max_tokens) for prompt, _ in choices]
    requests = _requests(plan, choices, watch.client)
    with (
        closing(worker.open(requests, gone)) as tokens,
        watch.answering(worker.served.model.name, sizes, plan.candidates),
    ):
        for index, token in tokens:
            if index not in unfinished:
                continue  # made in the step before the stop string was seen
            assembler = assemblers[index]
            empty = choices[index][0].max_tokens == 0
            watch.token(index, tokens.started(index), tokens.num_cached(index), kept=not empty)
            pieces = assembler.skip(token) if empty else assembler.push(token)
            answer = assembler.answer
            done = answer.finish_reason != "abort"
            if done:
                unfinished.discard(index)
                tokens.drop(index)
                watch.ended(index, answer.finish_reason)
            if pieces or done:
                cached = tokens.num_cached(index)
                ended = answer if done else None
                yield Event(index, pieces, ended, cached, answer.num_tokens, prompt=answer.prompt)
            if not unfinished:
                break


def _assembler(plan: Plan, prompt: Prompt, served: Served) -> TextAssembler:
    return TextAssembler(
        served.model.decoder(prompt.context),
        plan.stops,
        keep_stop=plan.keep_stop,
        control=served.model.tokenizer.special_text if plan.show_control else None,
    )


def _requests(plan: Plan, choices: Sequence[tuple[Prompt, int]], client: str) -> list[Request]:
    once: tuple[dict[str, Any], ...] = ({}, {"prompt_logprobs": None})
    return [
        Request(
            prompt.ids,
            # The engine draws what follows the prompt in any case.
            SamplingParams(
                **plan.sampling | once[number > 0], max_new_tokens=prompt.max_tokens or 1
            ),
            choice=number,
            priority=plan.priority,
            grammar=plan.grammar,
            client=client,
            adapter=plan.adapter,
        )
        for prompt, number in choices
    ]
