"""Many clients of all kinds for minutes on a real server; every answer beside its single run.

    python -m tests.soak --seconds 600 --clients 64

First each request of the table is answered alone. Then clients draw from it at random: whole and
streamed, tools, schemas, adapters, several choices, some that leave in the middle and some that
leave before the first token. Nothing may be wrong, hang, stay in the server or grow.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from llm import runtime
from tests.served import MODEL, Served, serving

_PATIENCE_S = 120.0
_GROWS = 0.05  # of the memory after a fifth of the time
_SLOTS = 16
_WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": _WEATHER}}
Request = tuple[str, dict[str, Any]]


def write_adapters(place: Path) -> list[str]:
    """Write two LoRA adapters of the tiny model whose products are not zero; return the flags."""
    runtime.prepare(1, "cpu")
    runtime.load_paddle("cpu")
    import numpy as np

    from llm.llama.adapters.lora import LoRAConfig, add_lora, save_lora
    from llm.llama.build import build_model
    from llm.llama.config import load_config

    words = ["--adapters"]
    for seed, name in enumerate(("one", "two")):
        model = add_lora(build_model(load_config(MODEL), seed=1), LoRAConfig(r=4), seed=seed)
        rng = np.random.default_rng(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                drawn = rng.standard_normal(parameter.shape, dtype=np.float32)
                parameter.set_value(drawn / 8)
        save_lora(model, place / name)
        words.append(f"{name}={place / name}")
    return words


def table(draw: random.Random) -> list[Request]:
    """Return requests of all kinds, each of which has one right answer."""
    chat, text = "/v1/chat/completions", "/v1/completions"
    found: list[Request] = []
    for number in range(8):
        say = [{"role": "user", "content": " ".join(draw.choices("abcdefgh", k=4 * number + 1))}]
        size = {"max_tokens": draw.randint(4, 60), "ignore_eos": True}
        drawn = {**size, "temperature": 0.8, "seed": number}
        schema = {"type": "json_schema", "json_schema": {"name": "w", "schema": _WEATHER}}
        held = {"temperature": 0.7, "seed": number, "max_tokens": 120}
        found += [
            (chat, {"messages": say, **size, "temperature": 0}),
            (chat, {"messages": say, **drawn, "top_p": 0.9, "n": 3}),
            (chat, {"messages": say, **held, "response_format": schema}),
            (chat, {"messages": say, **held, "tools": [_TOOL], "tool_choice": "required"}),
            (text, {"prompt": say[0]["content"] * 9, **drawn, "logprobs": 2}),
            (text, {"prompt": [5 + number] * (20 * number + 1), **size, "temperature": 0}),
            (text, {"prompt": "shared " * 30 + str(number), **drawn, "model": "one"}),
            (
                text,
                {"prompt": "shared " * 30 + str(number), **size, "temperature": 0, "model": "two"},
            ),
        ]
    return found


def canonical(body: dict[str, Any]) -> str:
    """Return what an answer says, without what is drawn for each request."""
    choices = []
    for one in body["choices"]:
        message = dict(one.get("message") or {})
        calls = [call["function"] for call in message.pop("tool_calls", None) or []]
        kept = {key: one.get(key) for key in ("index", "text", "finish_reason", "logprobs")}
        choices.append({**kept, "content": message.get("content"), "calls": calls})
    return json.dumps(choices, sort_keys=True)


class Streamed:
    """Chunks of a stream put together to the answer that is not streamed."""

    def __init__(self) -> None:
        self.choices: dict[int, dict[str, Any]] = {}
        self.error: Any = None

    def take(self, event: dict[str, Any]) -> None:
        """Add a chunk."""
        self.error = event.get("error", self.error)
        for one in event.get("choices", []):
            kept = self.choices.setdefault(one["index"], {"text": "", "calls": {}, "reason": None})
            delta = one.get("delta") or {}
            kept["text"] += one.get("text") or delta.get("content") or ""
            kept["reason"] = one.get("finish_reason") or kept["reason"]
            for call in delta.get("tool_calls") or []:
                name, arguments = kept["calls"].get(call["index"], ("", ""))
                function = call.get("function") or {}
                name = name or function.get("name") or ""
                kept["calls"][call["index"]] = (name, arguments + (function.get("arguments") or ""))

    def said(self) -> str:
        """Return texts, calls and reasons, as :func:`said_of` of the whole answer."""
        return json.dumps(
            [
                [one["text"], sorted(one["calls"].values()), one["reason"]]
                for _, one in sorted(self.choices.items())
            ]
        )


def said_of(answer: str) -> str:
    """Return what a stream can say of an answer in its canonical form."""
    rows = []
    for one in json.loads(answer):
        calls = sorted((call["name"], call["arguments"]) for call in one["calls"])
        rows.append([one["text"] or one["content"] or "", calls, one["finish_reason"]])
    return json.dumps(rows)


class Soak:
    """Clients, what they should be told, and what was wrong."""

    def __init__(self, served: Served, requests: Sequence[Request]) -> None:
        self._served, self._requests = served, requests
        self._right: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def alone(self, session: aiohttp.ClientSession) -> None:
        """Answer each request by itself."""
        for number, (path, body) in enumerate(self._requests):
            async with session.post(self._served.url + path, json=body) as answer:
                text = await answer.text()
            assert answer.status == 200, f"{answer.status} {text} to {body}"
            self._right[number] = canonical(json.loads(text))

    async def client(self, session: aiohttp.ClientSession, draw: random.Random, end: float) -> None:
        """Ask until the time is over."""
        while time.monotonic() < end:
            number = draw.randrange(len(self._requests))
            kind = draw.choices(("whole", "stream", "leaves", "cancelled"), (5, 5, 2, 1))[0]
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    wrong = await getattr(self, f"_{kind}")(session, number, draw)
            except TimeoutError:
                wrong = "hangs"
            except aiohttp.ClientError as error:
                wrong = repr(error)
            self.counts[kind] += 1
            if wrong:
                self.wrong.append(f"{kind} {self._requests[number]}: {wrong}")

    async def _whole(self, session: Any, number: int, _: random.Random) -> str | None:
        path, body = self._requests[number]
        async with session.post(self._served.url + path, json=body) as answer:
            text = await answer.text()
        if answer.status != 200:
            return f"{answer.status} {text[:300]}"
        found = canonical(json.loads(text))
        return None if found == self._right[number] else f"{found} is not {self._right[number]}"

    async def _stream(self, session: Any, number: int, _: random.Random) -> str | None:
        return await self._read(session, number, None)

    async def _leaves(self, session: Any, number: int, draw: random.Random) -> str | None:
        return await self._read(session, number, draw.randint(1, 12))

    async def _read(self, session: Any, number: int, most: int | None) -> str | None:
        path, body = self._requests[number]
        streamed, done, events = Streamed(), False, 0
        sent = {**body, "stream": True}
        async with session.post(self._served.url + path, json=sent) as answer:
            if answer.status != 200:
                return f"{answer.status} {(await answer.text())[:300]}"
            async for line in answer.content:
                text = line.decode().strip().removeprefix("data: ")
                done = done or text == "[DONE]"
                if not text or done:
                    continue
                streamed.take(json.loads(text))
                events += 1
                if events == most:
                    answer.close()  # in the middle
                    return None
        right = said_of(self._right[number])
        if not done or streamed.error or streamed.said() != right:
            return f"{streamed.error or streamed.said()} is not {right}"
        return None

    async def _cancelled(self, session: Any, number: int, draw: random.Random) -> str | None:
        path, body = self._requests[number]
        asked = asyncio.ensure_future(session.post(self._served.url + path, json=body))
        await asyncio.sleep(draw.random() * 0.05)
        asked.cancel()
        results = await asyncio.gather(asked, return_exceptions=True)
        if isinstance(results[0], aiohttp.ClientResponse):
            results[0].close()
        return None


async def run(served: Served, requests: Sequence[Request], seconds: float, clients: int) -> Soak:
    """Answer alone, then let clients ask; memory is noted on the way."""
    soak = Soak(served, requests)
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await soak.alone(session)
        end = time.monotonic() + seconds
        tasks = [
            asyncio.create_task(soak.client(session, random.Random(n), end)) for n in range(clients)
        ]
        await asyncio.sleep(seconds / 5)
        early = served.resident()
        await asyncio.gather(*tasks)
    grown = served.resident() - early
    print(f"soak: memory {early:.0f} MiB after a fifth of the time, {grown:+.1f} MiB at the end")
    if grown > _GROWS * early:
        soak.wrong.append(f"memory grew from {early:.0f} MiB by {grown:.0f} MiB")
    return soak


def left_in(served: Served) -> list[str]:
    """Return what is still in the server, some seconds after the last client."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    end = time.monotonic() + 10
    while True:
        found = served.metrics()
        left = [f"{n} is {found[f'vllm:{n}']:g}" for n in names if found[f"vllm:{n}"]]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


def main(argv: Sequence[str]) -> int:
    """Soak a server; the status is 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=64)
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        place = Path(name)
        flags = ["--max_num_seqs", str(_SLOTS), "--max_queue", "1000", "--src_length", "400"]
        flags += ["--max_length", "200", *write_adapters(place)]
        with serving(place, flags) as served:
            requests = table(random.Random(0))
            soak = asyncio.run(run(served, requests, given.seconds, given.clients))
            soak.wrong += left_in(served)
            status, log = served.stop()
    if status or "Traceback" in log:
        soak.wrong.append(f"the server ended with {status}: {log[-1500:]}")
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.counts.items()))
    print(f"soak: {given.clients} clients, {given.seconds:g} s: {counts}; {len(soak.wrong)} wrong")
    for one in soak.wrong[:10]:
        print(f"  {one[:1500]}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
