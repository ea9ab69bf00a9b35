"""The whole chain on one machine, each stage by the command that a user would type.

Raw text, tokenizer, token store, pretraining, prediction, export, Paddle Inference in a fresh
process, a LoRA adapter for a small task: `make demo`, or python demo.py --output_dir DIR.
"""

from common.ending import run_script  # isort: split

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import jsonl
from common.errors import UserError
from common.flags import arg, load
from llm import runtime

_ROOT = Path(__file__).resolve().parent
_PROMPTS = ["Return the number of", "This module provides", "Raise an error if"]
_KEY = "eval_exact_match"
_STAGES = 8


@dataclass
class DemoArguments:
    """Where the demo writes, and how long it trains."""

    output_dir: str = arg("outputs/demo", "everything goes below this directory")
    max_steps: int = arg(480, "weight updates", minimum=1)
    vocab_size: int = arg(4096, "tokens of the tokenizer; the model's vocabulary", minimum=300)


class _Demo:
    def __init__(self, args: DemoArguments) -> None:
        self.args = args
        self.root = Path(args.output_dir).absolute()  # commands run from the checkout
        self.started = time.perf_counter()
        self.stage = 0

    def announce(self, title: str) -> None:
        self.stage += 1
        elapsed = time.perf_counter() - self.started
        print(f"\n[{self.stage}/{_STAGES}] {title}  ({elapsed:.0f} s)", flush=True)

    def command(self, *words: str | Path) -> None:
        shown = shlex.join(str(word) for word in words)
        print(f"  $ python {shown}", flush=True)
        done = subprocess.run([sys.executable, *map(str, words)], cwd=_ROOT, check=False)
        if done.returncode:
            raise UserError(f"the demo stops: `python {shown}` ended with {done.returncode}")

    def perplexities(self, held_out: Path) -> tuple[float, float]:
        runtime.prepare()
        runtime.load_paddle()
        import numpy as np

        from data.corpus.token_store import TokenStore
        from llm.evaluation.perplexity import Document, perplexity
        from llm.evaluation.scorer import NetworkScorer
        from llm.llama.build import build_model, load_model

        trained = load_model(self.root / "model", use_flash_attention=True)
        untrained = build_model(trained.config, seed=1, use_flash_attention=True)
        store = TokenStore.open(held_out)
        text = [Document(np.concatenate([store.document(i) for i in range(store.num_documents)]))]
        before, after = (
            perplexity(NetworkScorer(model), text, max_length=256).token_perplexity
            for model in (untrained, trained)
        )
        return before, after

    def tune(self, model: Path) -> tuple[float, float]:
        """Teach a task by LoRA; return its score on held-out examples before and after."""
        from data.conversations.make_task import make_task

        task, adapter = self.root / "task", self.root / "lora"
        _, dev = make_task("kinds", task, train=800, dev=100)
        self.command(
            *("finetune_generation.py", "configs/demo_lora.yaml", "--model_name_or_path", model),
            *("--dataset_path", task, "--output_dir", adapter),
        )
        example = _records(dev)[0]
        self.command(
            *("predict_generation.py", "--model_name_or_path", model, "--lora_path", adapter),
            *("--chat", "true", "--max_length", "8"),
            *("--prompt", f"{example['instruction']}\n{example['input']}"),
        )
        scores = [r[_KEY] for r in _records(adapter / "train_log.jsonl") if _KEY in r]
        return scores[0], max(scores)


def _records(file: Path) -> list[dict]:
    return [record for _, record in jsonl.read(file) if isinstance(record, dict)]


def main() -> None:
    """Run every stage, compare, and say where everything lies."""
    (args,) = load((DemoArguments,), prog="demo.py", description=__doc__ or "")
    demo = _Demo(args)
    root = demo.root
    model, corpus, store = root / "model", root / "corpus", root / "store"

    demo.announce("text: the documentation strings of Python's standard library")
    from data.corpus.stdlib_corpus import write_corpus
    from data.tokenization.training import train_sentencepiece
    from data.tokenizer import load_tokenizer

    train, held_out = write_corpus(corpus)
    print(f"  {train.stat().st_size / 1e6:.1f} MB in {train}")

    demo.announce("tokenizer: byte-pair encoding with sentencepiece")
    texts = [record["text"] for record in _records(train)]
    vocabulary = train_sentencepiece(texts, args.vocab_size, corpus / "tokenizer.model")
    load_tokenizer(vocabulary, chat_template="simple").save(root / "tokenizer")

    demo.announce("data: tokens in Megatron's .bin/.idx")
    for part in (train, held_out):
        prefix = store / part.stem
        demo.command(
            *("-m", "data.prepare", "--input", part, "--output_prefix", prefix),
            *("--tokenizer", root / "tokenizer", "--append_eos", "--overwrite"),
        )

    demo.announce("pretraining: run_pretrain.py")
    demo.command(
        *("run_pretrain.py", "configs/demo.yaml", "--input_dir", store / "train"),
        *("--tokenizer_name_or_path", root / "tokenizer", "--output_dir", model),
        *("--max_steps", str(args.max_steps), "--warmup_steps", str(min(40, args.max_steps // 4))),
    )

    demo.announce("answers: predict_generation.py")
    asked = ["--prompt", *_PROMPTS, "--max_length", "40", "--repetition_penalty", "1.3"]
    predicted, inferred = root / "predicted.jsonl", root / "inferred.jsonl"
    demo.command(
        *("predict_generation.py", "--model_name_or_path", model, *asked),
        *("--output_file", predicted),
    )

    demo.announce("export, and the same answers from Paddle Inference in a fresh process")
    demo.command(
        *("export_generation_model.py", "--model_path", model),
        *("--output_path", root / "inference" / "llama"),
    )
    demo.command(
        *("infer_generation.py", "--model_dir", root / "inference", *asked),
        *("--output_file", inferred),
    )
    pairs = zip(_records(predicted), _records(inferred), strict=True)
    if any(one["ids"] != other["ids"] for one, other in pairs):
        raise UserError(f"greedy ids differ between {predicted} and {inferred}")

    demo.announce("finetuning: a LoRA adapter that tells what words have in common")
    untuned, tuned = demo.tune(model)

    demo.announce("perplexity on held-out text")
    before, after = demo.perplexities(store / "heldout")
    answer = _records(inferred)[0]
    print(
        f"\nDone in {time.perf_counter() - demo.started:.0f} s.\n"
        f"  answer       {answer['prompt']} … {answer['output']}\n"
        f"  perplexity   {before:.0f} before training, {after:.1f} after, on held-out text\n"
        f"  LoRA         {untuned:.0f} of 100 held-out answers right before, {tuned:.0f} after\n"
        f"  greedy ids   equal in dygraph and in Paddle Inference\n"
        f"  model        {model}\n"
        f"  loss curve   {model / 'loss_curve.png'}\n"
        f"  log          {model / 'train_log.jsonl'}\n"
        f"  program      {root / 'inference'}\n"
        f"  adapter      {root / 'lora'}\n"
        f"Next: `make serve` opens a chat page and an HTTP API on this model."
    )


if __name__ == "__main__":
    run_script(main)
