"""Merge a LoRA adapter: python merge_lora.py --model_path DIR --lora_path DIR --output_dir DIR."""

from common.ending import run_script  # isort: split

import sys

from common.files import check_directory
from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "merge_lora.py"
_DESCRIPTION = """\
Write a complete model: weights with the adapter in them, configuration, tokenizer, chat template.

  python merge_lora.py --model_path outputs/model --lora_path outputs/lora --output_dir outputs/new

A quantized model is widened first; --quantize_merged true rounds the result to its integers again.
The logits of merged and unmerged model are compared, and the files are read back."""


def main() -> None:
    """Read flags, load, merge, write."""
    (args,) = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    check_directory(args.output_dir, "output_dir", "the merged model")
    from llm.engine.finding import find_weights
    from llm.engine.opening import open_weights, start

    model, adapter = args.model_name_or_path, args.lora_path
    found = find_weights(model, tokenizer=args.tokenizer_name_or_path, adapter=adapter)
    start(args)
    from llm.llama.saving import save_merged

    def say(line: str) -> None:
        sys.stderr.write(f"{line}\n")

    network = open_weights(model, adapter=adapter, as_trained=True)
    options = {"dtype": args.dtype, "quantized": args.quantize_merged, "say": say}
    save_merged(network, args.output_dir, found.tokenizer, **options)
    sys.stderr.write(f"wrote {args.output_dir}\n")


if __name__ == "__main__":
    run_script(main)
