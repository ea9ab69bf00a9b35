"""What runs in the peers' environment: Hugging Face transformers on PyTorch.

``python -m tests.parity.hf_side write OUT`` makes random models with transformers, saves them with
its ``save_pretrained`` and computes what they answer. ``python -m tests.parity.hf_side read DIR``
opens models that this suite saved and computes what transformers makes of them. Neither imports
anything of the suite.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tests.parity.cases import MIN_MARGIN, NEW_TOKENS, ParityCase, cases

Tensors = dict[str, torch.Tensor]


def random_model(case: ParityCase) -> LlamaForCausalLM:
    """Return a model whose logits are of order one and differ clearly between positions."""
    torch.manual_seed(case.seed)
    model = LlamaForCausalLM(LlamaConfig(**case.config))
    tied = case.config.get("tie_word_embeddings", False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "embed_tokens" in name and not tied:
                parameter.normal_(0.0, 1.0)
            else:
                gain = 0.75 if parameter.shape[0] == case.config["vocab_size"] else 1.0
                parameter.normal_(0.0, gain / math.sqrt(parameter.shape[1]))
    return model


def open_model(directory: Path) -> LlamaForCausalLM:
    """Load a directory in float32, refusing missing or unexpected tensors."""
    model, said = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: sorted(map(str, value)) for key, value in said.items() if value}
    if problems:
        raise ValueError(f"transformers loads {directory} with {problems}")
    return model.eval()


def _positions(case: ParityCase) -> torch.Tensor:
    starts = case.offset + 37 * torch.arange(case.batch) * (case.offset > 0)
    return starts[:, None] + torch.arange(case.length)


def _scores_and_gradients(model: LlamaForCausalLM, case: ParityCase) -> Tensors:
    generator = torch.Generator().manual_seed(case.seed)
    vocab = case.config["vocab_size"]
    ids = torch.randint(vocab, (case.batch, case.length), generator=generator)
    positions = _positions(case)
    out = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
    out.loss.backward()
    tensors = {f"grad.{n}": p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    scale = torch.tensor(model.model.rotary_emb.attention_scaling)
    tensors |= {"cosine_scale": scale} if scale != 1 else {}
    return tensors | {
        "ids": ids,
        "positions": positions,
        "logits": out.logits.detach(),
        "loss": out.loss.detach(),
        "inv_freq": model.model.rotary_emb.inv_freq.clone(),
    }


def _answer(
    model: LlamaForCausalLM, prompt: torch.Tensor, ends: list[int] | None
) -> tuple[torch.Tensor, float]:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits).topk(2, dim=-1).values
    margin = float((best[..., 0] - best[..., 1]).min())
    return out.sequences[0, prompt.shape[1] :].clone(), margin


def _generated(model: LlamaForCausalLM, case: ParityCase) -> Tensors:
    generator = torch.Generator().manual_seed(case.seed + 1)
    tensors = {}
    for number, length in enumerate(case.prompts):
        prompt = torch.randint(case.config["vocab_size"], (1, length), generator=generator)
        ids, margin = _answer(model, prompt, None)
        if margin < MIN_MARGIN:
            raise ValueError(f"{case.name}: a greedy choice has margin {margin}; change the seed")
        tensors |= {f"prompt.{number}": prompt[0], f"generated.{number}": ids}
    tensors["ends"] = torch.stack([tensors["generated.0"][5], tensors["generated.1"][9]])
    for number in range(len(case.prompts)):
        ends = tensors["ends"].tolist()
        tensors[f"stopped.{number}"] = _answer(model, tensors[f"prompt.{number}"][None], ends)[0]
    return tensors


def _documents(model: LlamaForCausalLM, case: ParityCase) -> Tensors:
    generator = torch.Generator().manual_seed(case.seed + 2)
    tensors = {}
    for number, length in enumerate(case.documents):
        ids = torch.randint(case.config["vocab_size"], (1, length), generator=generator)
        with torch.no_grad():
            tensors[f"document_logits.{number}"] = model(input_ids=ids).logits[0]
        tensors[f"document.{number}"] = ids[0]
    return tensors


def write_case(case: ParityCase, directory: Path) -> None:
    """Save a case's model and, as ``expected.safetensors``, what transformers computes with it."""
    random_model(case).to(getattr(torch, case.dtype)).save_pretrained(
        directory, max_shard_size=case.max_shard_size
    )
    tensors: Tensors = {}
    for compute in (_scores_and_gradients, _generated, _documents):
        # Dynamic scaling keeps state between calls: each answer comes from a fresh model.
        tensors |= compute(open_model(directory), case)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "expected.safetensors")


def read_model(directory: Path) -> None:
    """Write what transformers makes of a directory of ours: ``hf.safetensors`` and ``hf.json``."""
    ids = load_file(directory / "ids.safetensors")["ids"]
    model = open_model(directory)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    weights = {f"weight.{n}": p.detach() for n, p in model.named_parameters()}
    save_file({"logits": logits, **weights}, directory / "hf.safetensors")
    config = model.config.to_dict() | {"eos_for_generation": model.generation_config.eos_token_id}
    (directory / "hf.json").write_text(json.dumps(config), encoding="utf-8")


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("write", "read"))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if args.command == "write":
        for case in cases("live"):
            write_case(case, args.directory / case.name)
    else:
        for directory in sorted(p for p in args.directory.iterdir() if p.is_dir()):
            read_model(directory)


if __name__ == "__main__":
    main()
