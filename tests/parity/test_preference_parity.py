"""Losses and gradients of preference tuning against transformers on PyTorch, and against TRL."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import PRESETS
from llm.train.preference import DPOObjective, sequence_log_probs
from tests.parity.ours import GRADIENT_LIMIT, in_file_layout

PAIRS, LENGTH = 3, 20
CONFIG = PRESETS["tiny-random-llama"].replace(
    vocab_size=96, hidden_size=32, intermediate_size=48, initializer_range=0.2
)
CASES = {
    "sigmoid": {"beta": 0.1},
    "sigmoid, large beta": {"beta": 20.0},
    "sigmoid, smoothed": {"beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"beta": 0.5, "loss_type": "hinge"},
    "ipo": {"beta": 0.2, "loss_type": "ipo"},
}
CASES = {n: {"loss_type": "sigmoid", "label_smoothing": 0.0} | c for n, c in CASES.items()}


def rows():
    """Return whole rows with right padding, prompts of different lengths, chosen rows first."""
    rng = np.random.default_rng(7)
    ids = rng.integers(3, CONFIG.vocab_size, [2 * PAIRS, LENGTH])
    attended, answer = np.zeros_like(ids), np.zeros_like(ids)
    for row in range(2 * PAIRS):
        prompt, end = 2 + row % PAIRS, LENGTH - int(rng.integers(0, 9))
        attended[row, :end] = 1
        answer[row, prompt:end] = 1
    return {"ids": ids, "attended": attended, "answer": answer}


@pytest.fixture(scope="module")
def scored(peer, tmp_path_factory):
    root = tmp_path_factory.mktemp("preference")
    for seed, name in enumerate(("policy", "reference")):
        save_model(build_model(CONFIG, seed=seed), root / name)
    save_file(rows(), root / "rows.safetensors")
    (root / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    peer("score", root, module="preference_side")
    return root, load_file(root / "peer.safetensors")


def batch(reference):
    """Return our form of the rows: inputs without the last token, labels shifted and masked."""
    stored = rows()
    labels = np.where(stored["answer"][:, 1:] == 1, stored["ids"][:, 1:], -100)
    arrays = {"input_ids": stored["ids"][:, :-1], "labels": labels, "reference_logps": reference}
    return {name: paddle.to_tensor(np.ascontiguousarray(a)) for name, a in arrays.items()}


def test_reference_scores(scored, measured):
    root, expected = scored
    ours = batch(expected["reference"])
    model = load_model(root / "reference")
    with paddle.no_grad():
        got = sequence_log_probs(model, ours["input_ids"], ours["labels"]).numpy()
    error = float(np.abs(got / expected["reference"] - 1).max())
    assert measured("preference", "log-probs", error) <= 1e-5


@pytest.mark.parametrize("kind", ["formula", "trl"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case, kind, scored, measured):
    root, expected = scored
    if f"{case}/{kind}/loss" not in expected:
        pytest.skip("TRL is not installed, or its loss of this type knows no label smoothing")
    model = load_model(root / "policy")
    total, weight, _ = DPOObjective(**CASES[case])(model, batch(expected["reference"]))
    loss = total / weight
    loss.backward()
    wanted = float(expected[f"{case}/{kind}/loss"])
    error = abs(float(loss) - wanted) / max(1.0, abs(wanted))
    assert measured(f"preference, {kind}", "loss", error) <= 1e-5
    for name, parameter in model.named_parameters():
        peers = expected[f"{case}/{kind}/{name}"].astype(np.float64)
        got = in_file_layout(model, name, parameter.grad.numpy())
        error = float(np.linalg.norm(got - peers) / np.linalg.norm(peers))
        assert measured(f"preference, {kind}", "gradient", error) <= GRADIENT_LIMIT, name
