"""Quantize a trained model: python quantize_generation.py --model_name_or_path DIR."""

from common.ending import run_script  # isort: split

import sys
import time
from pathlib import Path

from common.files import check_directory
from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "quantize_generation.py"
_DESCRIPTION = """\
Round the linears of a model directory to 8 or 4 bits and write a new one.

  python quantize_generation.py --model_name_or_path outputs/model --output_dir outputs/model-w8

  python quantize_generation.py --model_name_or_path outputs/model --output_dir outputs/model-w4 \\
      --quant_type W4 --calibration_file train.jsonl --eval_file heldout.jsonl

Predict, export, finetune with LoRA, and evaluate take the result like any other model."""


def main() -> None:
    """Read flags, load, measure, round, measure again, write."""
    (args,) = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    check_directory(args.output_dir, "output_dir", "the quantized model")
    from llm.engine.finding import find_weights
    from llm.engine.opening import open_weights, start

    found = find_weights(args.model_name_or_path, tokenizer=args.tokenizer_name_or_path)
    tokenizer, context = found.tokenizer, found.context
    start(args)
    from llm.evaluation import quantized
    from llm.llama.quantization import post_training
    from llm.llama.quantization.network import dequantize_model
    from llm.llama.saving import keep_types, save_directory

    quantized.check_paths(args)
    rows, held_out = None, None
    if args.reads_text:
        documents = quantized.calibration_text(args, tokenizer)
        length = min(args.calibration_length, context)
        rows = quantized.calibration_rows(documents, args.calibration_samples, length)
    if args.eval_file is not None:
        held_out = quantized.read_documents(args.eval_file, tokenizer, args.eval_limit)
    model = open_weights(args.model_name_or_path)
    if args.dequantize:
        save_directory(dequantize_model(model), tokenizer, Path(args.output_dir))
        sys.stderr.write(f"wrote {args.output_dir}\n")
        return
    length = min(args.eval_length, context)
    before = quantized.measure(model, held_out, length) if held_out else None
    start = time.perf_counter()
    progress = post_training.progress_of(args, rows)
    if progress is not None and len(progress):
        sys.stderr.write(f"going on with what is in {progress.directory}\n")
    report = post_training.quantize(model, args, rows, progress)
    report["seconds"] = round(time.perf_counter() - start, 1)
    if held_out:
        after = quantized.measure(model, held_out, length)
        report["perplexity"] = {
            "file": Path(args.eval_file).name,
            "window": length,
            "before": before,
            "after": after,
            "ops": {choice.op: choice.form for choice in model.ops.choices},
        }
    keep_types(model, args.model_name_or_path)
    documents = {post_training.REPORT_NAME: report}
    save_directory(model, tokenizer, Path(args.output_dir), documents=documents)
    if progress is not None:
        progress.remove()
    sys.stderr.write(f"wrote {args.output_dir}\n")
    sys.stdout.write(quantized.table(report) + "\n")
    if held_out and (note := quantized.rounding_note(model)):
        sys.stderr.write(note + "\n")


if __name__ == "__main__":
    run_script(main)
