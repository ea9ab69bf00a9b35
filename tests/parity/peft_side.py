"""What runs in the peers' environment for adapters: Hugging Face PEFT on transformers.

``python -m tests.parity.peft_side write DIR`` makes, for every case of ``DIR/cases.json``, a random
model and an adapter, trains it and stores what PEFT computes on the way. ``… read DIR`` opens the
adapters that this suite wrote there. ``… reference DIR`` makes the small cases whose results are
committed. Nothing of the suite is imported.
"""

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from tests.parity.adapter_cases import REFERENCE
from tests.parity.cases import MIN_MARGIN

Tensors = dict[str, torch.Tensor]
NEW_TOKENS = 12


def random_model(config: dict[str, Any], seed: int) -> LlamaForCausalLM:
    """Return a model whose logits are of order one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]))
    return model


def adapted(model: LlamaForCausalLM, case: dict[str, Any]) -> PeftModel:
    """Put a new adapter of the case's kind on a model."""
    kind = LoraConfig if case["kind"] == "lora" else PrefixTuningConfig
    return get_peft_model(model, kind(task_type="CAUSAL_LM", **case["options"]))


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Save as PEFT does, and a prefix's projection, which it leaves out, beside it."""
    model.save_pretrained(directory)
    (directory / "README.md").unlink()  # an empty model card
    if hasattr(model, "prompt_encoder"):
        encoder = model.prompt_encoder["default"]
        if hasattr(encoder, "transform"):
            state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
            save_file(state, directory / "prefix_encoder.safetensors")


def trained(model: PeftModel, batches: torch.Tensor, case: dict[str, Any]) -> Tensors:
    """Train with AdamW; return the losses and the gradients of the first step."""
    steps, rate = case["steps"], case["rate"]
    optimizer = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=rate,
        loraplus_lr_ratio=case["faster"],
        loraplus_weight_decay=0.01,
    )
    if case["faster"] == 1:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    losses, found = [], {}
    for step in range(steps):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            found = {
                f"grad.{n.replace('.modules_to_save', '').replace('.default', '')}": p.grad.clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return {"losses": torch.stack(losses), **found}


def answers(model: torch.nn.Module, ids: torch.Tensor) -> Tensors:
    """Return logits of whole rows, and greedy answers to the starts of rows."""
    with torch.no_grad():
        tensors = {"logits": model(input_ids=ids).logits}
        for number, length in enumerate((3, 1, 9)):
            prompt = ids[:1, :length]
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(out.logits).topk(2, dim=-1).values
            margin = float((best[..., 0] - best[..., 1]).min())
            if margin < MIN_MARGIN:
                raise ValueError(f"a greedy choice has margin {margin}; change the seed")
            tensors[f"generated.{number}"] = out.sequences[0, -NEW_TOKENS:].clone()
    return tensors


def write_case(case: dict[str, Any], directory: Path) -> None:
    """Store base, adapter before and after training, and everything computed."""
    base = random_model(case["config"], case["seed"])
    base.save_pretrained(directory / "base")
    vocab = case["config"]["vocab_size"]
    batches = torch.randint(vocab, (4, 3, 24), generator=torch.Generator().manual_seed(1))
    model = adapted(copy.deepcopy(base), case)
    save_adapter(model, directory / "initial")
    tensors = trained(model, batches, case)
    save_adapter(model, directory / "trained")
    model.eval()
    tensors |= answers(model, batches[0])
    if case["kind"] == "lora":
        merged = model.merge_and_unload()
        with torch.no_grad():
            tensors["merged"] = merged(input_ids=batches[0]).logits
    tensors["batches"] = batches
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "expected.safetensors")


def read_case(directory: Path) -> None:
    """Open what the suite wrote to ``ours`` and store what PEFT answers with it."""
    base = LlamaForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, directory / "ours").eval()
    ids = load_file(directory / "expected.safetensors")["batches"][0]
    tensors = answers(model, ids)
    save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "read.safetensors")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("write", "read", "reference"))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if args.command == "reference":
        args.directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(REFERENCE, indent=1) + "\n"
        (args.directory / "cases.json").write_text(text, encoding="utf-8")
    cases = json.loads((args.directory / "cases.json").read_text(encoding="utf-8"))
    for name, case in cases.items():
        if args.command == "read":
            read_case(args.directory / name)
        else:
            write_case(case, args.directory / name)


if __name__ == "__main__":
    main()
