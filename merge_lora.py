"""Merge a LoRA adapter: python merge_lora.py --model_path DIR --lora_path DIR --output_dir DIR."""

import sys

from common.flags import load, run_script
from data.errors import DataError
from llm import runtime
from llm.config.generation import MergeArguments

_DESCRIPTION = """\
Write a complete model: weights with the adapter in them, configuration, tokenizer, chat template.

  python merge_lora.py --model_path outputs/model --lora_path outputs/lora --output_dir outputs/new

The logits of merged and unmerged model are compared, and the files are read back."""


def main() -> None:
    """Read flags, load, merge, write."""
    (args,) = load((MergeArguments,), prog="merge_lora.py", description=_DESCRIPTION)
    from data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_place
    from llm.llama.config import load_config
    from llm.llama.files import peft

    config = load_config(args.model_name_or_path)
    places = (args.tokenizer_name_or_path, args.lora_path, args.model_name_or_path)
    tokenizer = load_tokenizer(tokenizer_place(*places))
    check_vocabulary(tokenizer, config.vocab_size)
    peft.read_config(args.lora_path, "LORA")
    runtime.prepare(args.threads, args.device)
    runtime.load_paddle(args.device)
    from llm.llama.adapters.lora import load_lora
    from llm.llama.build import load_model
    from llm.llama.saving import check_vacant, save_merged

    check_vacant(args.output_dir)
    model = load_lora(load_model(args.model_name_or_path), args.lora_path)
    save_merged(model, args.output_dir, tokenizer, dtype=args.dtype)
    sys.stderr.write(f"wrote {args.output_dir}\n")


if __name__ == "__main__":
    run_script(main, DataError)
