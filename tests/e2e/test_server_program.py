"""server.py on a real exported program, against a loop that recomputes every token in dygraph."""

import inspect
import io
import json
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import sentencepiece
from serving_process import ServerProcess, free_port

from data.tokenizer import Tokenizer, load_tokenizer

PROMPTS = ["The", "def load(path):", "x", "Return the number of items in the list.", "naïve 中"]
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A small exported model with random weights, and the network it came from."""
    from llm.llama.build import build_model, save_model
    from llm.llama.config import PRESETS
    from llm.llama.export import export_program

    directory = tmp_path_factory.mktemp("export")
    model_file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(inspect.getsource(inspect).splitlines()),
        model_writer=model_file,
        vocab_size=512,
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model_file.getvalue())
    tokenizer = load_tokenizer(directory)
    model = build_model(
        PRESETS["tiny-random-llama"].replace(vocab_size=512, max_position_embeddings=128), seed=3
    )
    for name, parameter in model.named_parameters():
        if "norm" not in name:  # spread the logits, so that no choice hangs on rounding
            parameter.set_value(parameter * 10)
    model.eval()
    beside = directory.parent / "model" / "tiny-test"
    save_model(model, beside)
    tokenizer.save(beside)
    export_program(
        model,
        directory / "llama",
        model_name="tiny-test",
        block_size=8,
        max_model_len=128,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return directory, model


@pytest.fixture(scope="module")
def tokenizer(export: tuple[Path, Any]) -> Tokenizer:
    return load_tokenizer(export[0])


def command(directory: Path, port: int, repo: Path, kind: str = "program") -> list[str]:
    flags = [f"--model_dir={directory}", "--model_prefix=llama", f"--flask_port={port}"]
    if kind == "directory":
        flags[:2] = [f"--model_name_or_path={directory.parent / 'model' / 'tiny-test'}"]
    return [sys.executable, str(repo / "server.py"), "--no_ui", "--chat_template=simple", *flags]


@pytest.fixture(scope="module", params=["program", "directory"])
def server(
    request: pytest.FixtureRequest,
    export: tuple[Path, Any],
    repo: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ServerProcess(command(export[0], port, repo, request.param), log, port) as process:
        process.wait_until_ready()
        yield process
        assert process.stop(signal.SIGTERM) == 0, process.log.read_text()
        assert "Traceback" not in process.log.read_text()


def recompute(model: Any, prompt: list[int]) -> list[int]:
    import paddle

    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        with paddle.no_grad():
            ids.append(int(model(paddle.to_tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(export: tuple[Path, Any], tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Greedy ids of every prompt, by the network that was exported."""
    return {p: recompute(export[1], tokenizer.encode(p, add_bos=True)) for p in PROMPTS}


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    response = requests.post(server.url + path, json=body, timeout=60)
    assert response.ok, response.text
    return response.json()


def test_version_lists_the_forms_of_ops(server: ServerProcess) -> None:
    body = requests.get(f"{server.url}/version", timeout=10).json()
    assert body["model"] == "tiny-test"
    for row in body["ops"]:
        assert row["op"] and row["form"] and row["why"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_over_http_are_those_of_the_network(
    server: ServerProcess, expected: dict[str, list[int]], prompt: str
) -> None:
    parameters = {"max_new_tokens": NEW_TOKENS, "details": True}
    body = post(server, "/generate", inputs=prompt, parameters=parameters)
    ids = [token["id"] for token in body["details"]["tokens"]]
    assert ids == expected[prompt][: len(ids)]
    ended = body["details"]["finish_reason"] == "eos_token"
    assert len(ids) == NEW_TOKENS or (ended and ids[-1] == 2)


def continuation(tokenizer: Tokenizer, prompt: str, ids: list[int]) -> str:
    before = tokenizer.encode(prompt, add_bos=True)
    return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]


def test_five_prompts_of_unequal_length_past_the_end_token(
    server: ServerProcess, tokenizer: Tokenizer, expected: dict[str, list[int]]
) -> None:
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    body = post(server, "/v1/completions", prompt=PROMPTS, **options)
    for prompt, choice in zip(PROMPTS, body["choices"], strict=True):
        assert choice["text"] == continuation(tokenizer, prompt, expected[prompt])
        assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == NEW_TOKENS * len(PROMPTS)


def test_many_at_once_answer_as_alone(
    server: ServerProcess, tokenizer: Tokenizer, expected: dict[str, list[int]]
) -> None:
    """More clients than run together, greedy and sampled, some with several choices."""
    sampled = {"prompt": PROMPTS[3], "seed": 5, "n": 3, "max_tokens": NEW_TOKENS}
    choices = post(server, "/v1/completions", **sampled)["choices"]
    assert len({choice["text"] for choice in choices}) == 3

    def ask(number: int) -> bool:
        if number % 4 == 3:
            return bool(post(server, "/v1/completions", **sampled)["choices"] == choices)
        prompt = PROMPTS[number % len(PROMPTS)]
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        (choice,) = post(server, "/v1/completions", prompt=prompt, **options)["choices"]
        return bool(choice["text"] == continuation(tokenizer, prompt, expected[prompt]))

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(ask, range(40))) == [True] * 40


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_text_is_the_whole_text(
    server: ServerProcess, tokenizer: Tokenizer, expected: dict[str, list[int]], prompt: str
) -> None:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    with requests.post(url, json={**body, "stream": True}, stream=True, timeout=60) as response:
        lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
    assert lines.pop() == b"[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
    assert text == continuation(tokenizer, prompt, expected[prompt])


def test_a_stop_token_ends_the_answer_and_is_not_shown(
    server: ServerProcess, tokenizer: Tokenizer, expected: dict[str, list[int]]
) -> None:
    prompt = PROMPTS[3]
    ids = expected[prompt]
    stop = ids[5]
    kept = ids[: ids.index(stop)]
    options = {"temperature": 0, "ignore_eos": True, "stop_token_ids": [stop]}
    body = post(server, "/v1/completions", prompt=prompt, **options)
    assert body["choices"][0]["text"] == continuation(tokenizer, prompt, kept)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(kept) + 1


def test_logprobs_are_those_of_the_network(
    server: ServerProcess, export: tuple[Path, Any], tokenizer: Tokenizer
) -> None:
    import paddle

    prompt = tokenizer.encode(PROMPTS[3], add_bos=True)
    options = {"max_tokens": 3, "temperature": 1.7, "seed": 5, "logprobs": 0, "ignore_eos": True}
    given = post(server, "/v1/completions", prompt=prompt, **options)["choices"][0]
    details = {"max_new_tokens": 3, "temperature": 1.7, "seed": 5, "details": True}
    tokens = post(server, "/generate", inputs=PROMPTS[3], parameters=details)["details"]["tokens"]
    ids = prompt + [token["id"] for token in tokens]
    with paddle.no_grad():
        logits = export[1](paddle.to_tensor([ids]))
        table = paddle.nn.functional.log_softmax(logits, axis=-1)[0].numpy()
    expected = [table[len(prompt) - 1 + i, t["id"]] for i, t in enumerate(tokens)]
    assert given["logprobs"]["token_logprobs"][: len(tokens)] == pytest.approx(expected, abs=1e-4)
    assert [t["logprob"] for t in tokens] == pytest.approx(expected, abs=1e-4)


def test_seeds_repeat(server: ServerProcess) -> None:
    options = {"prompt": "x", "max_tokens": 20, "n": 3, "ignore_eos": True}
    texts = [
        [c["text"] for c in post(server, "/v1/completions", seed=seed, **options)["choices"]]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert not set(texts[0]) & set(texts[2]), "another seed, other answers"
    assert len(set(texts[0])) == 3


@pytest.fixture
def local_hub_client() -> Iterator[None]:
    """The suite sets HF_HUB_OFFLINE, which would forbid even this machine's own server."""
    import huggingface_hub

    huggingface_hub.configure_http_backend(backend_factory=requests.Session)
    yield
    huggingface_hub.configure_http_backend()


@pytest.mark.usefixtures("local_hub_client")
def test_chat_with_an_independent_client(server: ServerProcess) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=f"{server.url}/v1", api_key="unused", timeout=60)
    ask = {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny-test"}
    whole = client.chat_completion(**ask, max_tokens=8, temperature=0.0, seed=1)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage.completion_tokens <= 8
    chunks = list(client.chat_completion(**ask, max_tokens=8, temperature=0.0, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.usefixtures("local_hub_client")
def test_generate_with_an_independent_client(server: ServerProcess) -> None:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{server.url}/generate", timeout=60)
    whole = client.text_generation("The", max_new_tokens=8, details=True)
    parts = list(client.text_generation("The", max_new_tokens=8, stream=True, details=True))
    assert [part.token.id for part in parts] == [token.id for token in whole.details.tokens]
    assert parts[-1].generated_text == whole.generated_text
    assert parts[-1].details.generated_tokens == whole.details.generated_tokens


def test_limits_come_from_the_model(server: ServerProcess) -> None:
    model = requests.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]
    assert (model["id"], model["max_model_len"]) == ("tiny-test", 128)
    body = {"prompt": [5] * 100, "max_tokens": 29}
    error = requests.post(f"{server.url}/v1/completions", json=body, timeout=10).json()["error"]
    assert "more than 128 (the model's context); ask for at most 28" in error["message"]
    body["max_tokens"] = 28
    assert requests.post(f"{server.url}/v1/completions", json=body, timeout=10).ok


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "llama.manifest.json").unlink(), "has no export named 'llama'"),
        (lambda d: (d / "llama.pdiparams").write_bytes(b"x"), "the manifest says"),
        (lambda d: (d / "tokenizer.model").unlink(), "holds no tokenizer"),
    ],
)
def test_a_damaged_export_is_one_line(
    export: tuple[Path, Any], repo: Path, tmp_path: Path, break_it: Any, message: str
) -> None:
    directory = tmp_path / "copy"
    directory.mkdir()
    for file in export[0].iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    break_it(directory)
    log, port = tmp_path / "log", free_port()
    with ServerProcess(command(directory, port, repo), log, port) as process:
        assert process.process.wait(30) == 2
    text = log.read_text()
    assert message in text
    assert text.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in text
