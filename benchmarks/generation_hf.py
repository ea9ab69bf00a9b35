"""Hugging Face transformers for bench_generation.py."""

import sys
from pathlib import Path

import generation_models as shared
import numpy as np
import torch
import transformers
from interleave import Run, serve


class Cases:
    """What the worker runs."""

    def __init__(self, directory: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.logits_file = directory / f"hf-{dtype}.npy"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory / "hf", dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.ids = torch.from_numpy(shared.prompt(self.model.config.vocab_size))

    @torch.inference_mode()
    def prompt(self, length: int, batch: int, kept: int) -> tuple[torch.Tensor, object]:
        """Compute the prompt; return the logits of the last rows and the cache."""
        cache = transformers.DynamicCache(config=self.model.config)
        ids = self.ids[None, :length].repeat(batch, 1)
        done = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=kept)
        return done.logits, cache

    def decode(self, batch: int) -> Run:
        """Return what generates for so many sequences, and goes on where it was."""
        _, cache = self.prompt(shared.CONTEXT, batch, 1)
        ids = self.ids[:batch, None]

        @torch.inference_mode()
        def run() -> None:
            nonlocal ids
            for _ in range(shared.STEPS):
                logits = self.model(ids, past_key_values=cache, use_cache=True).logits
                ids = logits[:, -1:].argmax(-1)

        return run

    def check(self) -> None:
        """Write the logits of the last rows of the prompt."""
        logits, _ = self.prompt(shared.PROMPT, 1, shared.CHECKED)
        np.save(self.logits_file, logits[0].float().numpy())

    def make(self, case: str) -> Run:
        """Return what a case runs."""
        if case == "check":
            return self.check
        name, number = case.split()
        if name == "decode":
            return self.decode(int(number))
        return lambda: self.prompt(int(number), 1, 1)


if __name__ == "__main__":
    serve(Cases(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).make)
