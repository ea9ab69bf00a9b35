"""Loads on any server of OpenAI's completions, and what its clients see of them.

Requests are streamed. They come from N clients, each of which sends its next one when it has its
answer, or by themselves at a rate (Poisson), whether the server keeps up or not.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

_PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Load:
    """What is sent, and when.

    Args:
        requests: bodies of ``/v1/completions``, without ``stream``.
        clients: how many send one after the other; None sends at a rate.
        rate: requests a second in the mean, with exponential gaps.
        seed: of the gaps.
    """

    requests: Sequence[dict[str, Any]]
    clients: int | None = None
    rate: float | None = None
    seed: int = 0


@dataclass
class Record:
    """What a client saw of one request, in seconds of this process's clock.

    ``moments`` are those of chunks that carry text, of which most servers send one a token;
    ``tokens`` is what the server says in its usage.
    """

    sent: float
    moments: list[float] = field(default_factory=list)
    end: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.moments[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between one chunk and the next."""
        return [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]

    @property
    def per_token(self) -> float:
        """Seconds a token behind the first."""
        return (self.moments[-1] - self.moments[0]) / max(self.tokens - 1, 1)


def words(count: int, random_: random.Random) -> str:
    """Return a text of so many words, for servers that take no ids."""
    return " ".join(random_.choice(_WORDS) for _ in range(count))


_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
    "be",
    "this",
    "from",
]


def requests_of(
    count: int,
    prompt_tokens: tuple[int, int],
    new_tokens: int,
    *,
    vocabulary: int | None,
    shared: int = 0,
    seed: int = 0,
    **more: Any,
) -> list[dict[str, Any]]:
    """Return bodies with random prompts, whose first tokens may be the same for all.

    Args:
        count: of requests.
        prompt_tokens: from and to how many tokens, those that are shared not counted.
        new_tokens: of each answer; ends of text do not end it.
        vocabulary: ids are drawn below it; None sends texts of so many words.
        shared: tokens that all prompts begin with.
        seed: of what is drawn.
        more: further fields.
    """
    random_ = random.Random(seed)

    def draw(length: int) -> Any:
        if vocabulary is None:
            return words(length, random_)
        return [random_.randrange(3, vocabulary) for _ in range(length)]

    begin = draw(shared) if shared else ("" if vocabulary is None else [])
    join = " " if vocabulary is None and shared else begin[:0]
    own = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return [
        {"prompt": begin + join + draw(random_.randint(*prompt_tokens)), **own, **more}
        for _ in range(count)
    ]


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in answer.content:
        text = line.decode().strip()
        if text.startswith("data:"):
            yield text.removeprefix("data:").strip()


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Record:
    record = Record(time.perf_counter())
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with session.post(f"{url}/v1/completions", json=sent) as answer:
            if answer.status != 200:
                record.error = f"{answer.status}: {(await answer.text())[:300]}"
                return record
            async for event in _events(answer):
                if event == "[DONE]":
                    break
                _take(record, json.loads(event))
    except (aiohttp.ClientError, TimeoutError) as error:
        record.error = f"{type(error).__name__}: {error}"
    record.end = time.perf_counter()
    if record.error is None and not record.moments:
        record.error = "no token came"
    return record


def _take(record: Record, event: dict[str, Any]) -> None:
    if "error" in event:
        record.error = str(event["error"])[:300]
    choices = event.get("choices") or []
    # A token may have no text yet, or none at all; its chunk says nothing of the end then.
    if any(one.get("text") or one.get("finish_reason") is None for one in choices):
        record.moments.append(time.perf_counter())
    if usage := event.get("usage"):
        record.tokens, record.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = details.get("cached_tokens") or 0


async def _drive(url: str, load: Load) -> list[Record]:
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout
    ) as session:
        if load.clients is not None:
            return await _by_clients(session, url, load.requests, load.clients)
        assert load.rate is not None
        random_, tasks = random.Random(load.seed), []
        for body in load.requests:
            tasks.append(asyncio.create_task(_ask(session, url, body)))
            await asyncio.sleep(random_.expovariate(load.rate))
        return list(await asyncio.gather(*tasks))


async def _by_clients(
    session: aiohttp.ClientSession, url: str, requests: Sequence[dict[str, Any]], clients: int
) -> list[Record]:
    left, records = iter(requests), []

    async def go() -> None:
        for body in left:
            records.append(await _ask(session, url, body))

    await asyncio.gather(*(go() for _ in range(clients)))
    return records


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of all does not exceed (the nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 100 * len(ordered)) // 100) - 1)]


def figures(
    records: Sequence[Record], seconds: float, slo_ttft: float, slo_per_token: float
) -> dict[str, float]:
    """Return what a load came to.

    Args:
        records: of all requests.
        seconds: from the first request to the last answer.
        slo_ttft: seconds to the first token that a client bears with.
        slo_per_token: seconds a token behind it.

    Raises:
        SystemExit: a request failed; the first failure is shown.
    """
    failed = [one.error for one in records if one.error is not None]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(records)} requests failed: {failed[0]}")
    gaps = [gap for one in records for gap in one.gaps] or [0.0]
    found = {
        "tokens_per_second": sum(one.tokens for one in records) / seconds,
        "requests_per_second": len(records) / seconds,
    }
    series = {
        "ttft": [one.ttft for one in records],
        "inter_token": gaps,
        "e2e": [one.end - one.sent for one in records],
    }
    for name, values in series.items():
        for share in (50, 95, 99):
            found[f"{name}_p{share}"] = quantile(values, share / 100)
    found["inter_token_max"] = max(gaps)
    good = [one for one in records if one.ttft <= slo_ttft and one.per_token <= slo_per_token]
    found["goodput_requests_per_second"] = len(good) / seconds
    found["good_share"] = len(good) / len(records)
    prompt = sum(one.prompt_tokens for one in records)
    found["cached_share"] = sum(one.cached_tokens for one in records) / max(prompt, 1)
    found["seconds"] = seconds
    return {name: round(value, 4) for name, value in found.items()}


def drive(url: str, load: Load) -> tuple[list[Record], float]:
    """Send a load; return what became of each request, and the seconds of all."""
    began = time.perf_counter()
    records = asyncio.run(_drive(url, load))
    return records, time.perf_counter() - began
