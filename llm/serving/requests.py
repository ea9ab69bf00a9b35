"""From a checked body to what the engine has to do, and doing it.

:func:`plan_chat`, :func:`plan_completion` and :func:`plan_generate` check everything that depends
on the loaded model (prompt length, room for the answer, token ids) before a request waits in line.
:func:`run` then yields pieces of text as the engine makes them.
"""

import logging
import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from common.errors import DataError
from llm.engine.request import Request, SamplingParams
from llm.serving.errors import ApiError
from llm.serving.loop import EngineWorker, Gone, Served
from llm.serving.metrics import Metrics
from llm.serving.schema import ChatRequest, CompletionRequest, GenerateParameters, GenerateRequest
from llm.serving.text import Answer, Piece, TextAssembler

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens in /v1/completions
DEFAULT_GENERATE_TOKENS = 100  # TGI's default of max_new_tokens


@dataclass(frozen=True)
class Limits:
    """Token limits of one request.

    Args:
        src_length: longest prompt.
        max_length: most new tokens per answer.
    """

    src_length: int
    max_length: int


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request. ``context`` is what the detokeniser sees before the answer."""

    ids: list[int]
    text: str | None
    context: Sequence[int]
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """All generations of one request: each prompt ``n`` times, in order.

    Where ``candidates`` is more, so many are generated and the best ``n`` of them are answers.
    """

    prompts: list[Prompt]
    sampling: dict[str, Any]
    stops: list[str] = field(default_factory=list)
    n: int = 1
    best_of: int | None = None
    adapter: str | None = None

    @property
    def candidates(self) -> int:
        return self.best_of or self.n

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


@dataclass(frozen=True)
class Event:
    """Text of choice ``index``; ``answer`` is set on the last event of that choice.

    ``num_cached``: how many tokens of its prompt were in the engine's cache. ``num_dropped``: how
    many there are in candidates that are no answers, told with one answer to their prompt.
    """

    index: int
    pieces: list[Piece]
    answer: Answer | None
    num_cached: int
    num_dropped: int = 0


def plan_chat(body: ChatRequest, served: Served, limits: Limits) -> Plan:
    """Render the conversation and check it against the model.

    Raises:
        ApiError: 400.
    """
    if served.model.tokenizer.chat_template is None:
        raise ApiError(
            f"model {served.model.name!r} has no chat template; use /v1/completions, or start the "
            "server with --chat_template (llama2, llama3, simple, or a Jinja file)",
            param="messages",
            code="no_chat_template",
        )
    messages = [message.as_template_message() for message in body.messages]
    ids = _render(served, messages)
    wanted = body.max_completion_tokens or body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    checker = _Checker(served, limits, "messages", name)
    prompt = checker.prompt(ids, None, (), wanted, limits.max_length)
    sampling = _openai_sampling(body, served)
    adapter = served.adapter(body.model)
    return Plan([prompt], sampling, body.stop or [], body.n or 1, adapter=adapter)


def _render(served: Served, messages: list[dict[str, str]]) -> list[int]:
    try:
        return served.model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except ValueError as error:
        # Templates raise on what the model was not trained for, such as two turns of one role.
        raise ApiError(str(error), param="messages", code="chat_template") from error


def plan_completion(body: CompletionRequest, served: Served, limits: Limits) -> Plan:
    """Encode the prompts and check them against the model.

    Raises:
        ApiError: 400.
    """
    prompts = []
    for position, given in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt.{position}"
        checker = _Checker(served, limits, param, "max_tokens")
        if isinstance(given, str):
            ids, text = _encode(served, given, param), given
        else:
            checker.token_ids(given)
            ids, text = given, (served.model.tokenizer.decode(given) if body.echo else None)
        prompts.append(checker.prompt(ids, text, ids, body.max_tokens, DEFAULT_COMPLETION_TOKENS))
    sampling = _openai_sampling(body, served)
    adapter = served.adapter(body.model)
    return Plan(prompts, sampling, body.stop or [], body.n or 1, body.best_of, adapter)


def plan_generate(body: GenerateRequest, served: Served, limits: Limits) -> Plan:
    """Encode the input of ``/generate`` and check it against the model.

    As in TGI, giving a temperature, ``top_k`` or ``top_p`` samples even without ``do_sample``, and
    nothing of it is greedy.

    Raises:
        ApiError: 400.
    """
    parameters = body.parameters or GenerateParameters()
    ids = _encode(served, body.inputs, "inputs")
    if parameters.truncate is not None:
        ids = ids[-parameters.truncate :]
    checker = _Checker(served, limits, "inputs", "parameters.max_new_tokens")
    prompt = checker.prompt(
        ids, body.inputs, ids, parameters.max_new_tokens, DEFAULT_GENERATE_TOKENS
    )
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    samples = (
        parameters.do_sample
        or temperature != 1.0
        or parameters.top_k is not None
        or (parameters.top_p is not None and parameters.top_p < 1)
    )
    sampling = {
        "temperature": temperature if samples else 0.0,
        "top_k": parameters.top_k or 0,
        "top_p": 1.0 if parameters.top_p is None else parameters.top_p,
        "repetition_penalty": parameters.repetition_penalty or 1.0,
        "seed": parameters.seed,
    }
    if samples and parameters.seed is None:
        # Reported in the details, to have the answer again; any client's numbers can hold it.
        sampling["seed"] = secrets.randbits(53)
    return Plan([prompt], sampling, parameters.stop or [])


def _encode(served: Served, text: str, param: str) -> list[int]:
    tokenizer = served.model.tokenizer
    try:
        ids = tokenizer.encode(text, add_bos=tokenizer.bos_id is not None)
    except DataError as error:
        # Tokenizers are other people's code, which some texts break.
        raise ApiError(str(error), param=param, code="prompt_not_encoded") from error
    if not ids:
        raise ApiError(
            f"{param} is empty, and this tokenizer has no beginning-of-sequence token to start "
            "from; send some text",
            param=param,
            code="empty_prompt",
        )
    return ids


def _openai_sampling(body: ChatRequest | CompletionRequest, served: Served) -> dict[str, Any]:
    stop_ids = body.stop_token_ids or []
    _Checker(served, None, "stop_token_ids", "").token_ids(stop_ids)
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_k": max(body.top_k or 0, 0),
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "repetition_penalty": body.repetition_penalty or 1.0,
        "seed": body.seed,
        "stop_ids": tuple(stop_ids),
        "ignore_eos": bool(body.ignore_eos),
    }


@dataclass(frozen=True)
class _Checker:
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
        longest = self.served.engine.max_model_len
        allowed = min(self.limits.src_length, longest - 1)
        if len(ids) > allowed:
            raise ApiError(
                f"{self.prompt_name} has {len(ids)} tokens, but the limit is {allowed}; shorten it",
                param=self.prompt_name,
                code="context_length_exceeded",
            )
        room = longest - len(ids)
        if wanted is None:
            return Prompt(ids, text, context, min(default, self.limits.max_length, room))
        if wanted > self.limits.max_length:
            raise ApiError(
                f"{self.max_name}={wanted}, but this server answers with at most "
                f"{self.limits.max_length} tokens; ask for fewer",
                param=self.max_name,
                code="invalid_value",
            )
        if wanted > room:
            raise ApiError(
                f"{self.prompt_name} has {len(ids)} tokens and {self.max_name}={wanted}: together "
                f"more than the model's context of {longest}; ask for at most {room}",
                param=self.max_name,
                code="context_length_exceeded",
            )
        return Prompt(ids, text, context, wanted)


def run(
    plan: Plan, worker: EngineWorker, gone: Gone, metrics: Metrics
) -> Generator[Event, None, None]:
    """Yield the text of all choices as it comes; of the best of several, when these have ended.

    Closing the generator ends them.

    Raises:
        ApiError: 503 when too many wait or the server stops, 500 when the engine fails.
        ClientGoneError: the client left.
    """
    with closing(_run(plan, worker, gone, metrics)) as events:
        yield from events if plan.candidates == plan.n else _best(plan, events)


def _best(plan: Plan, events: Iterable[Event]) -> Iterator[Event]:
    """Yield the answers of each prompt whose tokens are likeliest in the mean, these first."""
    ended: list[dict[int, tuple[Answer, int]]] = [{} for _ in plan.prompts]
    for event in events:
        if event.answer is None:
            continue
        number, candidate = divmod(event.index, plan.candidates)
        found = ended[number]
        found[candidate] = event.answer, event.num_cached
        if len(found) < plan.candidates:
            continue
        cached = found[0][1]
        answers = [found[one][0] for one in range(plan.candidates)]
        answers.sort(key=lambda answer: -answer.logprob / answer.num_tokens)
        dropped = sum(answer.num_tokens for answer in answers[plan.n :])
        for place, answer in enumerate(answers[: plan.n]):
            index = number * plan.n + place
            yield Event(index, answer.pieces, answer, cached, 0 if place else dropped)


def _run(
    plan: Plan, worker: EngineWorker, gone: Gone, metrics: Metrics
) -> Generator[Event, None, None]:
    """Yield the text of all candidates as it comes; they are generated together.

    Closing the generator ends them. The random numbers of a choice hang on the seed and on its
    number, so that choices differ and still repeat.

    Raises:
        ApiError: 503 when too many wait or the server stops, 500 when the engine fails.
        ClientGoneError: the client left.
    """
    begin = time.monotonic()
    decoder = worker.served.model.decoder
    choices = [(prompt, number) for prompt in plan.prompts for number in range(plan.candidates)]
    assemblers = [TextAssembler(decoder(prompt.context), plan.stops) for prompt, _ in choices]
    unfinished = set(range(len(choices)))
    with metrics.request(), closing(worker.open(_requests(plan, choices), gone)) as tokens:
        metrics.prompt_tokens.inc(plan.num_prompt_tokens)
        for count, (index, token) in enumerate(tokens):
            if count == 0:
                metrics.first_token_seconds.observe(time.monotonic() - begin)
            if index not in unfinished:
                continue  # made in the step before the stop string was seen
            pieces, answer = assemblers[index].push(token), assemblers[index].answer
            done = answer.finish_reason != "abort"
            if done:
                unfinished.discard(index)
                tokens.drop(index)
                metrics.finished(answer.finish_reason, answer.num_tokens)
            if pieces or done:
                cached = tokens.num_cached(index)
                yield Event(index, pieces, answer if done else None, cached)
            if not unfinished:
                break
    metrics.latency_seconds.observe(time.monotonic() - begin)


def _requests(plan: Plan, choices: Sequence[tuple[Prompt, int]]) -> list[Request]:
    # Each HTTP request is a client of its own: one with many choices lets others through.
    client = secrets.token_hex(8)
    return [
        Request(
            prompt.ids,
            SamplingParams(**plan.sampling, max_new_tokens=prompt.max_tokens),
            choice=number,
            client=client,
            adapter=plan.adapter,
        )
        for prompt, number in choices
    ]
