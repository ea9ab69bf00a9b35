"""What this suite computes, in the terms in which the peer's results are stored."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.numpy import load_file

from llm.engine.engine import Engine
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.llama.build import load_model
from llm.llama.modeling import LlamaForCausalLM
from llm.train.objectives import next_token_objective
from tests.parity.cases import NEW_TOKENS, ParityCase, version_4_config

LOGIT_LIMIT = 1e-5  # absolute
GRADIENT_LIMIT = 1e-5  # norm of the difference over norm of the peer's gradient, per parameter


def expected_of(directory: Path) -> dict[str, np.ndarray]:
    """Read what the peer computed."""
    return load_file(directory / "expected.safetensors")


def logit_error(model: LlamaForCausalLM, expected: dict[str, np.ndarray]) -> float:
    """Return the largest absolute difference of any logit."""
    with paddle.no_grad():
        logits = model(paddle.to_tensor(expected["ids"]), paddle.to_tensor(expected["positions"]))
    return float(np.abs(logits.numpy() - expected["logits"]).max())


def in_file_layout(model: LlamaForCausalLM, name: str, value: np.ndarray) -> np.ndarray:
    """Transpose what a linear layer stores ``[in, out]``."""
    owner = dict(model.named_sublayers()).get(name.rsplit(".", 1)[0])
    is_matrix = isinstance(owner, paddle.nn.Linear) and value.ndim == 2
    return value.T if is_matrix else value


def mean_loss(
    model: LlamaForCausalLM, ids: np.ndarray, labels: np.ndarray, **extra: np.ndarray
) -> paddle.Tensor:
    """Return the mean over the labels that count, as training computes it."""
    batch = {"input_ids": ids, "labels": labels} | extra
    tensors = {name: paddle.to_tensor(value) for name, value in batch.items()}
    total, weight, _ = next_token_objective(model, tensors)
    return total / weight


def gradient_errors(
    model: LlamaForCausalLM, expected: dict[str, np.ndarray]
) -> tuple[float, dict[str, float]]:
    """Return the loss's absolute error and each parameter's relative gradient error."""
    model.train()
    ids = expected["ids"]
    labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
    loss = mean_loss(model, ids, labels, positions=expected["positions"])
    loss.backward()
    errors = {}
    for name, parameter in model.named_parameters():
        wanted = expected[f"grad.{name}"].astype(np.float64)
        got = in_file_layout(model, name, parameter.grad.numpy())
        errors[name] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    model.clear_gradients()
    model.eval()
    stored = {name.removeprefix("grad.") for name in expected if name.startswith("grad.")}
    assert stored == errors.keys()
    return abs(float(loss) - float(expected["loss"])), errors


def wrong_generations(
    model: LlamaForCausalLM, case: ParityCase, expected: dict[str, np.ndarray]
) -> list[int]:
    """Return prompts whose greedy ids differ, run to the full length or to an end token.

    The engine answers all prompts in one batch.
    """
    numbers = range(len(case.prompts))
    prompts = [expected[f"prompt.{number}"].tolist() for number in numbers]
    engine = Engine(DygraphRunner(model, block_size=4), max_sequences=3, max_step_tokens=16)
    free = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    ends = tuple(expected["ends"].tolist())
    stopping = dataclasses.replace(free, stop_ids=ends)
    wrong = []
    for params, stored in ((free, "generated"), (stopping, "stopped")):
        answers = engine.generate(requests(prompts, params))
        wrong += [n for n in numbers if answers[n].ids != expected[f"{stored}.{n}"].tolist()]
    return wrong


def packed_error(
    model: LlamaForCausalLM, case: ParityCase, expected: dict[str, np.ndarray]
) -> float:
    """Return the largest logit error of all documents in one row, the last one padding."""
    numbers = range(len(case.documents))
    ids = np.concatenate([expected[f"document.{n}"] for n in numbers])
    positions = np.concatenate([np.arange(length) for length in case.documents])
    segments = np.repeat(np.asarray(numbers), case.documents)
    with paddle.no_grad():
        logits = model(*(paddle.to_tensor(a[None]) for a in (ids, positions, segments)))
    wanted = np.concatenate([expected[f"document_logits.{n}"] for n in numbers])
    return float(np.abs(logits.numpy()[0] - wanted).max())


def with_version_4_config(directory: Path, copy: Path) -> Path:
    """Copy a model directory, its config.json rewritten as transformers 4 spelled it."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(version_4_config(config)), encoding="utf-8")
    return copy


def load(directory: Path, **options: Any) -> LlamaForCausalLM:
    """Load a model directory for evaluation."""
    model = load_model(directory, **options)
    model.eval()
    return model
