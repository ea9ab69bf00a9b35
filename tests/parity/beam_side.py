"""What runs in the peers' environment for beam search: answers by Hugging Face transformers.

``python -m tests.parity.beam_side search DIR`` opens the model in ``DIR/model``, reads prompts and
settings from ``DIR/request.json`` and writes ``DIR/beams.json``. Nothing of the suite is imported.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from tests.parity.hf_side import open_model


def search(model: LlamaForCausalLM, prompt: list[int], how: dict[str, Any]) -> list[Any]:
    """Return ids and score of every answer, the best first."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_return_sequences=how["num_beams"],
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **how,
    )
    answers = []
    for row, indices, score in zip(
        out.sequences, out.beam_indices, out.sequences_scores, strict=True
    ):
        length = int((indices >= 0).sum())
        answers.append([row[len(prompt) : len(prompt) + length].tolist(), float(score)])
    return answers


def main() -> None:
    """Answer one request."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("search",))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    request = json.loads((args.directory / "request.json").read_text("utf-8"))
    model = open_model(args.directory / "model")
    with torch.no_grad():
        found = [
            [search(model, prompt, how) for prompt in request["prompts"]]
            for how in request["settings"]
        ]
    (args.directory / "beams.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
