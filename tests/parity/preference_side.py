"""Preference losses in the peers' environment: ``-m tests.parity.preference_side score DIR``.

The directory holds two models (``policy``, ``reference``), ``rows.safetensors`` (whole rows of
token ids, a mask of prompt and answer and one of the answer, chosen rows first) and ``cases.json``.
Written back are the losses and every gradient: from formulas on PyTorch's log-softmax, and from
TRL's own trainer where TRL is installed.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import logging

from tests.parity.hf_side import open_model

Tensors = dict[str, torch.Tensor]


def log_probs(model: torch.nn.Module, rows: Tensors) -> torch.Tensor:
    """Return the summed log-probability of each row's answer."""
    logits = model(rows["ids"], attention_mask=rows["attended"], use_cache=False).logits[:, :-1]
    scores = F.log_softmax(logits, -1).gather(-1, rows["ids"][:, 1:, None])[..., 0]
    return (scores * rows["answer"][:, 1:]).sum(-1)


def loss_by_formula(policy, reference, rows: Tensors, case: dict) -> torch.Tensor:
    """Return the mean loss as the papers write it."""
    moved = log_probs(policy, rows) - reference
    if case["loss_type"] == "ipo":
        moved = moved / rows["answer"].sum(-1)
    chosen, rejected = moved.chunk(2)
    x = chosen - rejected
    if case["loss_type"] == "ipo":
        return ((x - 0.5 / case["beta"]) ** 2).mean()
    x = case["beta"] * x
    if case["loss_type"] == "hinge":
        return torch.clamp(1 - x, min=0).mean()
    smoothing = case["label_smoothing"]
    right, wrong = torch.sigmoid(x.double()), torch.sigmoid(-x.double())
    return -((1 - smoothing) * right.log() + smoothing * wrong.log()).mean().float()


def loss_by_trl(directory: Path, case: dict, rows: Tensors) -> tuple[torch.Tensor, torch.nn.Module]:
    """Return the loss of TRL's DPOTrainer on the rows, and the policy that it belongs to."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    # The trainer insists on data of its own; the loss is asked for our rows below.
    unused = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}])
    with tempfile.TemporaryDirectory() as scratch:
        settings = DPOConfig(
            scratch,
            beta=case["beta"],
            loss_type=[case["loss_type"]],
            use_cpu=True,
            bf16=False,
            report_to="none",
            gradient_checkpointing=False,
        )
        trainer = DPOTrainer(
            open_model(directory / "policy"),
            ref_model=open_model(directory / "reference"),
            args=settings,
            train_dataset=unused,
            processing_class=tokenizer,
        )
        trainer.model.eval()
        inputs = {
            "input_ids": rows["ids"],
            "attention_mask": rows["attended"],
            "completion_mask": rows["answer"],
        }
        return trainer._compute_loss(trainer.model, inputs, False), trainer.model


def score(directory: Path) -> None:
    """Write ``peer.safetensors``: reference scores, and losses and gradients of every case."""
    rows = load_file(directory / "rows.safetensors")
    out: Tensors = {}
    with torch.no_grad():
        out["reference"] = log_probs(open_model(directory / "reference"), rows)
    has_trl = importlib.util.find_spec("trl") is not None
    for name, case in json.loads((directory / "cases.json").read_text("utf-8")).items():
        policy = open_model(directory / "policy")
        answers = {"formula": (loss_by_formula(policy, out["reference"], rows, case), policy)}
        if has_trl and not case["label_smoothing"]:
            answers["trl"] = loss_by_trl(directory, case, rows)
        for kind, (loss, model) in answers.items():
            loss.backward()
            out[f"{name}/{kind}/loss"] = loss.detach()
            for parameter, tensor in model.named_parameters():
                out[f"{name}/{kind}/{parameter}"] = tensor.grad.clone()
    save_file(out, directory / "peer.safetensors")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("score",))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    score(args.directory)


if __name__ == "__main__":
    main()
