"""What runs in the peers' environment for scores: likelihoods by Hugging Face transformers.

``python -m tests.parity.score_side score DIR`` opens the model in ``DIR/model``, reads token ids
and settings from ``DIR/request.json`` and writes ``DIR/scores.json``. The loop over windows is the
one of transformers' guide "Perplexity of fixed-length models", with the sum taken over exactly the
labels that are not masked. Nothing of the suite is imported.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from tests.parity.hf_side import open_model


def negative_log_likelihood(
    model: LlamaForCausalLM, ids: list[int], max_length: int, stride: int
) -> tuple[float, int]:
    """Return the sum over a text and how many tokens count; ``max_length`` ids per window."""
    text = torch.tensor([ids])
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        window = text[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            logits = model(window).logits
        losses = F.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum")
        total += float(losses)
        count += int((labels[0, 1:] != -100).sum())
        previous_end = end
        if end == len(ids):
            break
    return total, count


def continuation(
    model: LlamaForCausalLM, context: list[int], answer: list[int]
) -> tuple[float, bool]:
    """Return the log-likelihood of an answer, and whether greedy decoding gives it."""
    with torch.no_grad():
        logits = model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1].double()
    target = torch.tensor(answer)
    logprobs = logits.log_softmax(-1).gather(1, target[:, None])
    return float(logprobs.sum()), bool((logits.argmax(-1) == target).all())


def score(directory: Path) -> None:
    """Answer one request."""
    request: dict[str, Any] = json.loads((directory / "request.json").read_text("utf-8"))
    model = open_model(directory / "model")
    answers = {
        "windows": [
            negative_log_likelihood(model, request["ids"], *window) for window in request["windows"]
        ],
        "pairs": [continuation(model, *pair) for pair in request["pairs"]],
    }
    (directory / "scores.json").write_text(json.dumps(answers), encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("score",))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    score(args.directory)


if __name__ == "__main__":
    main()
