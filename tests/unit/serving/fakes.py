"""A tokenizer and an engine with the real interfaces, small enough to reason about.

The engine "answers" with a text that the test chose, token by token, as slowly as the test wants.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

from common.errors import DataError, UserError
from data.tokenization.added_tokens import Region, RegionIds, SpecialTokens
from data.tokenization.stream import StreamDecoder
from llm.engine.opening import OpenedModel
from llm.engine.request import Request, SamplingParams, Token
from llm.engine.stats import EngineStats
from llm.serving import local
from llm.serving.steps import Loaded

MakeClient = Callable[..., FlaskClient]  # what the fixture make_client is

BOS, EOS = 1, 2
_BYTES = 3  # ids of the 256 bytes begin here
_WORDS = 259

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


class FakeStreamDecoder(StreamDecoder):
    """Bytes are shown once they form characters, as the real one does."""

    def __init__(self, tokenizer: "FakeTokenizer") -> None:
        self._tokenizer = tokenizer
        self._pending = b""

    def push(self, token_id: int) -> str:
        self._pending += self._tokenizer.token_bytes(token_id)
        try:
            text = self._pending.decode("utf-8")
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise
            text = self._pending[: error.start].decode("utf-8")
        self._pending = self._pending[len(text.encode("utf-8")) :]
        return text

    def finish(self) -> str:
        text = self._pending.decode("utf-8", errors="replace")
        self._pending = b""
        return text


class FakeTokenizer:
    """Listed words are one token, everything else is bytes; the longest word wins."""

    bos_id: int | None = BOS
    eos_ids = (EOS,)
    pad_id = 0

    def __init__(
        self, words: tuple[str, ...] = ("hello", " world"), chat_template: str | None = TEMPLATE
    ) -> None:
        self.words = words
        self.chat_template = chat_template
        self.vocab_size = _WORDS + len(words)
        self.special = SpecialTokens({"<pad>": 0, "<s>": BOS, "</s>": EOS}, BOS, (EOS,), 0)
        self.special_text = {one: text for text, one in self.special.ids.items()}

    @property
    def adds_bos(self) -> bool:
        return self.bos_id is not None

    def config(self) -> dict[str, object]:
        return {"tokenizer_class": "Fake", "bos_token": "<s>", "eos_token": "</s>"}

    def encode(self, text: str, *, add_bos: bool = False, **_: bool) -> list[int]:
        ids = [BOS] if add_bos else []
        rest = text
        while rest:
            word = max((w for w in self.words if rest.startswith(w)), key=len, default=None)
            if word is not None:
                ids.append(_WORDS + self.words.index(word))
                rest = rest[len(word) :]
            else:
                ids += [_BYTES + byte for byte in rest[0].encode("utf-8")]
                rest = rest[1:]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < _BYTES:
            return b""
        if token_id < _WORDS:
            return bytes([token_id - _BYTES])
        return self.words[token_id - _WORDS].encode("utf-8")

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str:
        special = {} if skip_special else self.special_text
        parts = (special.get(i, "").encode() or self.token_bytes(i) for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def stream(self) -> FakeStreamDecoder:
        return FakeStreamDecoder(self)

    def apply_chat_template(self, messages: list[dict[str, str]], **variables: Any) -> list[int]:
        return self.encode(self.render_chat(messages, **variables), add_bos=True)

    def render_chat(
        self,
        messages: list[dict[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Any = None,
        **variables: Any,
    ) -> str:
        if messages[-1]["role"] == "assistant" and not continue_final_message:
            raise DataError("the template wants the last message to be the user's")
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return text + "<assistant>" * (add_generation_prompt and not continue_final_message)

    def require_template(self, *, tools: bool = False) -> str:
        return self.chat_template or ""

    def template_variables(self, *, tools: bool = False) -> frozenset[str]:
        return frozenset({"messages", "style"})

    def encode_regions(self, regions: list[Region]) -> list[RegionIds]:
        return [RegionIds(self.encode("".join(map(str, region.parts))), []) for region in regions]


@dataclass(eq=False)
class FakeHandle:
    """A request that the fake engine answers."""

    request: Request
    produced: deque[Token] = field(default_factory=deque)
    error: Exception | None = None
    num_cached: int = 2
    position: int = 0
    is_running: bool = False
    started: float | None = None


@dataclass
class FakeEngine:
    """Answers every prompt with ``answer`` and the end token, a token of each a step.

    Args:
        answer: token ids; ``repeat`` begins them again for ever.
        delay: seconds before each step.
        gate: directory; the token at position N waits for a file N in it.
        fail_at: end a request with a `failure` instead of the token at this position.
        refuses: raise what bad input raises on prompts of this length.
        max_sequences: requests that run together.
    """

    answer: list[int]
    repeat: bool = False
    delay: float = 0.0
    gate: str | None = None
    fail_at: int | None = None
    failure: type[Exception] = RuntimeError
    refuses: int | None = None
    max_model_len: int = 200
    max_sequences: int = 4
    longest: int = 200
    vocab_size: int = 300
    eos_ids: tuple[int, ...] = ()
    calls: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    choices: list[int] = field(default_factory=list)
    named: list[str | None] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    steps: int = 0
    last_step: int = 0
    most_running: int = 0
    threads: set[int] = field(default_factory=set)
    handles: list[FakeHandle] = field(default_factory=list)

    @property
    def running(self) -> int:
        return sum(handle.is_running for handle in self.handles)

    @property
    def stats(self) -> EngineStats:
        waiting = len(self.handles) - self.running
        return EngineStats(self.running, waiting, 16, 10, 8, 3, 40, 20, 2, 5, 4, self.last_step)

    @property
    def has_work(self) -> bool:
        return bool(self.handles)

    def add(self, request: Request) -> FakeHandle:
        if len(request.prompt_ids) == self.refuses:
            raise UserError("no blocks for that")
        self.calls.append((request.prompt_ids, request.params))
        self.choices.append(request.choice)
        self.named.append(request.adapter)
        self.asked.append(request)
        self.handles.append(FakeHandle(request))
        return self.handles[-1]

    def abort(self, handle: FakeHandle) -> None:
        handle.is_running = False
        if handle in self.handles:
            self.handles.remove(handle)

    def step(self) -> None:
        self.last_step = 0
        if not self.handles:
            return
        self.threads.add(threading.get_ident())
        chosen = self.handles[: self.max_sequences]
        for handle in chosen:
            handle.started = handle.started or time.monotonic()
            handle.is_running = True  # before the wait: a test that sees it may act in it
        self.most_running = max(self.most_running, self.running)
        time.sleep(self.delay)
        for handle in chosen:
            self.last_step += len(handle.request.prompt_ids) if handle.position == 0 else 1
            self._advance(handle)

    def _advance(self, handle: FakeHandle) -> None:
        position, params = handle.position, handle.request.params
        while self.gate is not None and not (Path(self.gate) / str(position)).exists():
            time.sleep(0.005)
        if position == self.fail_at:
            handle.error = self.failure("a kernel broke")
            self.abort(handle)
            return
        handle.position += 1
        self.steps += 1
        if not self.repeat and position == len(self.answer):
            token = Token(EOS, -0.5, "stop")
        else:
            last = position == params.max_new_tokens - 1
            token_id = self.answer[position % len(self.answer)]
            token = Token(token_id, -0.25 * (position + 1), "length" if last else None)
        handle.produced.append(_told(token, handle.request, position))
        if token.finish_reason:
            self.abort(handle)

    def stream(self, request: Request) -> Iterator[Token]:
        """As the real one's, for the terminal."""
        handle = self.add(request)
        while True:
            while not handle.produced:
                if handle.error is not None:
                    raise handle.error
                self.step()
            token = handle.produced.popleft()
            yield token
            if token.finish_reason:
                return


class FakeModel(OpenedModel):
    """Paddle is not loaded to describe it."""

    ops = ()
    paddle_version = "none"


class LocalWorker(local.LocalWorker):
    """Routes see the fake engine itself as ``worker.served.engine``; tests look into it."""

    def __init__(self, load: Callable[[], Loaded], max_queue: int = 4, **options: float) -> None:
        super().__init__(load, max_queue, FakeTokenizer(), **options)

    def _know(self, facts: Any, limits: Any, stats: Any) -> None:
        model, engine, limited_by = self.steps.loaded
        engine.limited_by = limited_by
        self._tokenizer = model.tokenizer
        super()._know(facts, engine, stats)


def _told(token: Token, request: Request, position: int) -> Token:
    """Return the token with what its request asks to be told: the prompt's scores, likely ones."""
    params, ids = request.params, request.prompt_ids
    if params.prompt_logprobs is not None and position == 0:
        scores = [Token(one, -float(one), top=_top(one, params.prompt_logprobs)) for one in ids[1:]]
        token = token._replace(prompt=tuple(scores))
    return token._replace(top=_top(token.token_id, params.logprobs))


def _top(token_id: int, count: int) -> tuple[tuple[int, float], ...]:
    """Return the control token EOS as likelier than the token itself, and half a character."""
    return ((EOS, -0.125), (token_id, -0.25), (_BYTES + 0xE4, -8.0))[:count]


def make_served(
    answer: str = "hello world", tokenizer: FakeTokenizer | None = None, **engine: object
) -> Loaded:
    """Return a model that answers with a text; it is its own engine."""
    tokenizer = tokenizer or FakeTokenizer()
    fake = FakeEngine(answer=tokenizer.encode(answer), vocab_size=tokenizer.vocab_size, **engine)
    return Loaded(FakeModel("fake-llama", tokenizer, runner=fake), fake)


def typed_events(client: FlaskClient, url: str, body: Any) -> list[Any]:
    """Return the events of a stream in which each is named after its own type."""
    response = client.post(url, json={**body, "stream": True})
    assert response.status_code == 200, response.get_data(as_text=True)
    found = []
    for block in response.get_data(as_text=True).strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found
