"""Tokenizers of all kinds with random added tokens beside transformers in the peers' environment.

Ids of random Unicode, with the texts of control tokens as tokens and as characters; texts of ids,
whole and streamed; conversations; and bulk encoding beside one text after the other. Each 40 cases
share a directory. PEERS_PYTHON names the peers' Python.
"""

import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer
from tests.fuzz import Tally, budget
from tests.fuzz.tokenizer_worlds import World, make_world, random_text

CASES_EACH = 40
SPACE_BYTE = 3 + ord(" ")  # of sentencepiece models
REPO = Path(__file__).resolve().parents[2]


class Peer:
    """transformers in a process of its own."""

    def __init__(self) -> None:
        python = os.environ.get("PEERS_PYTHON", str(REPO / ".venv-peers/bin/python"))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["RUST_BACKTRACE"] = "0"
        self._process = subprocess.Popen(
            [python, "-m", "tests.fuzz.tokenizers_peer"],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, request: Any) -> Any:
        """Return the answer to a request."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer ended; what it said stands above")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def running_peer() -> Iterator[Peer]:
    """A peer that is ended."""
    peer = Peer()
    try:
        yield peer
    finally:
        peer.close()


def sampled_ids(rng: random.Random, tokenizer: Tokenizer, text: str) -> list[int]:
    """Return ids of a text, or any ids, to be decoded."""
    if rng.random() < 0.7:
        ids = _encoded(tokenizer, text, True)
        ids = ids if isinstance(ids, list) else [*tokenizer.added]
        low = rng.randrange(len(ids) + 1) if rng.random() < 0.3 else 0
        return ids[low:]
    every = [*tokenizer.added, *rng.choices(range(tokenizer.vocab_size), k=40)]
    bytes_first = [*range(3, 259)] if rng.random() < 0.5 else []
    return rng.choices([*every, *bytes_first], k=rng.randrange(9))


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return a streamed text."""
    stream = tokenizer.stream()
    return "".join(map(stream.push, ids)) + stream.finish()


def compare(rng: random.Random, world: World, tokenizer: Tokenizer, peer: Peer) -> Iterator[str]:
    """Yield what differs in one case."""
    texts = [random_text(rng, world.added) for _ in range(3)]
    ids = sampled_ids(rng, tokenizer, texts[0])
    messages = [
        {"role": role, "content": random_text(rng, world.added, special=False)}
        for role in ("system", "user", "assistant", "user")[rng.randrange(2) :][
            : rng.randrange(1, 4)
        ]
    ]
    calls = [["encode", [text, special]] for text in texts for special in (True, False)]
    calls += [["decode", [ids, skip]] for skip in (True, False)]
    calls += [["chat", [messages, world.template]]]
    theirs = peer.ask({"calls": calls})
    for (name, given), answer in zip(calls[:6], theirs, strict=False):
        yield from _differs(name, given, _encoded(tokenizer, *given), answer)
    if _decodes_alike(world, tokenizer, ids):
        for (name, given), answer in zip(calls[6:8], theirs[6:], strict=False):
            own = tokenizer.decode(given[0], skip_special=given[1])
            yield from _differs(name, given, own, answer)
    whole = tokenizer.decode(ids)
    yield from _differs("streamed", [ids], streamed(tokenizer, ids), whole)
    good = [text for text in texts if isinstance(_encoded(tokenizer, text, False), list)]
    packed, sizes = tokenizer.packed_encoder(np.int32).encode(good)
    rows = [row.tolist() for row in np.split(packed, np.cumsum(sizes)[:-1])] if good else []
    yield from _differs("bulk", good, rows, [tokenizer.encode(text) for text in good])
    if _only_the_templates(world, tokenizer, messages):
        yield from _differs("chat", messages, _chat(tokenizer, messages), theirs[8])


def _encoded(tokenizer: Tokenizer, text: str, special: bool) -> Any:
    """Return ids, or the error that says that there are none."""
    try:
        return tokenizer.encode(text, allow_special=special)
    except DataError as error:
        return {"error": str(error)}


def _chat(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> Any:
    try:
        return tokenizer.apply_chat_template(messages)
    except DataError as error:
        return {"error": str(error)}


def _differs(name: str, given: Any, ours: Any, theirs: Any) -> Iterator[str]:
    # Where a library panics, which `tokenizers` does at a token that begins with the white space
    # that the one before takes with it, transformers dies, and an error is all there is to say.
    if ours != theirs and not isinstance(theirs, dict):
        yield f"{name} {given!r}: ours {ours!r}, theirs {theirs!r}"


def _decodes_alike(world: World, tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
    """Whether the two sides' libraries spell ids alike.

    sentencepiece spares whole characters among broken ones, and a first space that is a byte. The
    `tokenizers` of the peers, 0.23,
    spells an added token as it is looked for: with what a normalizer prepends.
    """
    if world.kind == "sentencepiece":
        both = tokenizer.decode(ids) + tokenizer.decode(ids, skip_special=False)
        return "\ufffd" not in both and SPACE_BYTE not in ids
    normalized = any(world.added[one].normalized for one in ids if one in world.added)
    return world.about != "prepend" or not normalized


def _only_the_templates(
    world: World, tokenizer: Tokenizer, messages: Sequence[dict[str, str]]
) -> bool:
    """Whether all control tokens come from the template: only from there do we take them."""
    found = tokenizer.special_pattern
    assert found is not None
    bare = [{**message, "content": "\x00"} for message in messages]
    if any(found.search(message["content"]) for message in messages):
        return False
    texts = [found.findall(tokenizer.render_chat(which)) for which in (messages, bare)]
    return texts[0] == texts[1]


def main(argv: Sequence[str]) -> int:
    """Run the cases; returns the exit status."""
    tally = Tally("tokenizers")
    with tempfile.TemporaryDirectory() as root, running_peer() as peer:
        world, tokenizer, made = None, None, None
        for seed in budget(argv, __doc__ or "").seeds():
            if made != seed // CASES_EACH:
                made = seed // CASES_EACH
                world = make_world(made, Path(root))
                tokenizer = None
                peer.ask(world.asked())
                try:
                    tokenizer = load_tokenizer(world.directory, chat_template=world.template)
                except DataError as error:
                    tally.differ(seed, f"refused: {error}")
            if world is None or tokenizer is None:
                continue
            differences = list(compare(random.Random(seed), world, tokenizer, peer))
            for what in differences[:1]:
                tally.differ(seed, f"{world.kind} {world.about}: {what}")
            if not differences:
                tally.count(f"{world.kind}{', ' + world.about if world.about else ''}: equal")
    return tally.report()
