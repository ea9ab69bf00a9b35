"""The same tokens are the same text everywhere: predict and infer, evaluation, lm-eval, HTTP.

A runner whose next token is written down stands for the model, so that tokens may be chosen at
which ways could part: one that begins with a space, ones beyond the tokenizer's vocabulary, and
one in which two stop strings end.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import MakeClient
from flask.testing import FlaskClient

from data.tokenization.training import train_sentencepiece
from data.tokenizer import Tokenizer, load_tokenizer
from llm.config.generation import PromptArguments, SamplingArguments
from llm.engine.opening import OpenedModel
from llm.engine.request import SamplingParams, requests
from llm.engine.texts import generate_texts
from llm.serving.steps import Loaded
from llm.serving.terminal import Asked, answer_prompts

PROMPT = "the world"
PADDING = 64


class Scripted:
    """A runner that answers with a list of ids, by the place in the sequence."""

    block_size, max_model_len, longest, eos_ids = 16, 256, 256, (2,)

    def __init__(self, answer: Sequence[int], begin: int, vocab_size: int) -> None:
        self.answer, self.begin, self.vocab_size = [*answer, 2], begin, vocab_size

    def allocate(self, num_blocks: int) -> None:
        pass

    def clear(self, blocks: Sequence[int]) -> None:
        pass

    def run(self, batch: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        places = batch.position_T[batch.rows_n] + 1 - self.begin
        logits = np.zeros((len(places), self.vocab_size), np.float32)
        for row, place in enumerate(places):
            logits[row, self.answer[place] if 0 <= place < len(self.answer) else 2] = 60
        return logits


@pytest.fixture(scope="module", params=["bytes", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Of either kind: sentencepiece takes a space from the beginning of a text, or adds it."""
    if request.param == "bytes":
        return load_tokenizer("__internal_testing__/tiny-random-llama", chat_template="simple")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([str(argparse.__doc__), "the world the end " * 99], 400, path)
    return load_tokenizer(path, chat_template="simple")


def the(tokenizer: Tokenizer, count: int = 1) -> list[int]:
    """Ids of " the", as often as asked."""
    (token,) = tokenizer.encode("the" if tokenizer.adds_space else " the")
    return [token] * count


def opened(tokenizer: Tokenizer, answer: Sequence[int], prompt: Sequence[int]) -> OpenedModel:
    runner = Scripted(answer, len(prompt), tokenizer.vocab_size + PADDING)
    return OpenedModel("scripted", tokenizer, runner)


def predicted(model: OpenedModel, path: Path, *, chat: bool, sampled: bool) -> str:
    sampling = SamplingArguments(max_length=12, seed=3)
    sampling.decode_strategy = "sampling" if sampled else "greedy_search"
    asked = PromptArguments(prompt=[PROMPT], output_file=str(path), chat=chat)
    answer_prompts(model, [Asked(PROMPT)], asked, sampling)
    return str(json.loads(path.read_text())["output"])


def evaluated(model: OpenedModel, prompt: list[int], stops: list[str], *, chat: bool) -> str:
    """As evaluation asks, and lm-eval."""
    engine = model.open_engine(1, 64)
    asked = requests([prompt], SamplingParams(max_new_tokens=12, temperature=0))
    decoders = [model.decoder([] if chat else prompt)]
    return generate_texts(engine, asked, decoders, [stops])[0]


def served(client: FlaskClient, stops: list[str], *, chat: bool, sampled: bool) -> dict[str, str]:
    """By the way of asking, streamed and not."""
    how = {"temperature": 1.0 if sampled else 0.0, "stop": stops or None, "max_tokens": 12}
    found = {}
    if chat:
        body = {"messages": [{"role": "user", "content": PROMPT}], **how}
        answer = client.post("/v1/chat/completions", json=body).get_json()
        return {"chat": answer["choices"][0]["message"]["content"]}
    answer = client.post("/v1/completions", json={"prompt": PROMPT, **how}).get_json()
    found["completions"] = answer["choices"][0]["text"]
    parameters = {"do_sample": sampled, "stop": stops, "max_new_tokens": 12}
    body = {"inputs": PROMPT, "parameters": parameters}
    found["generate"] = client.post("/generate", json=body).get_json()["generated_text"]
    streamed = client.post("/generate", json={**body, "stream": True}).get_data(as_text=True)
    events = [json.loads(line[5:]) for line in streamed.splitlines() if line.startswith("data:")]
    found["streamed"] = "".join(event["token"]["text"] for event in events)
    return found


# What is answered, as pieces; the stop strings; the text behind a prompt.
Answer = Callable[[Tokenizer], list[int]]
CASES: dict[str, tuple[Answer, list[str], str]] = {
    "a space first": (lambda t: the(t, 2), [], " the the"),
    "beyond the vocabulary": (
        lambda t: [t.vocab_size, *the(t), t.vocab_size + PADDING - 1, *the(t)],
        [],
        " the the",
    ),
    "only beyond it": (lambda t: [t.vocab_size + 5] * 3, [], ""),
    "stops within a token": (lambda t: the(t, 2), [" the", "h"], " t"),
    "the longest of two that end together": (lambda t: the(t, 2), ["e t", "the t"], " "),
}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_text(
    case: str, chat: bool, tokenizer: Tokenizer, tmp_path: Path, make_client: MakeClient
) -> None:
    answer, stops, expected = CASES[case]
    if chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
    else:
        prompt = tokenizer.encode(PROMPT, add_bos=True)
    ids = answer(tokenizer)
    model = opened(tokenizer, ids, prompt)
    texts = {"evaluation": evaluated(model, prompt, stops, chat=chat)}
    client = make_client(Loaded(model, model.open_engine(1, 200)))
    for sampled in (False, True):
        found = served(client, stops, chat=chat, sampled=sampled)
        texts |= {f"{way}, sampled={sampled}": text for way, text in found.items()}
        if not stops:
            path = tmp_path / f"{sampled}.jsonl"
            texts[f"predict {sampled}"] = predicted(model, path, chat=chat, sampled=sampled)
    assert len(set(texts.values())) == 1, texts
    # A turn begins anew, and the space before its first word is none there.
    anew = chat and tokenizer.adds_space and not stops
    assert texts["evaluation"] == (expected.removeprefix(" ") if anew else expected) or (
        chat and stops
    )
