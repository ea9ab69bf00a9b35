"""Quantize a trained model: python quantize_generation.py --model_name_or_path DIR."""

import sys
import time
from pathlib import Path

from common.flags import load, run_script
from data.errors import DataError
from llm import runtime
from llm.config.tools import QuantizeArguments

_DESCRIPTION = """\
Round the linears of a model directory to 8 or 4 bits and write a new one.

  python quantize_generation.py --model_name_or_path outputs/model --output_dir outputs/model-w8

  python quantize_generation.py --model_name_or_path outputs/model --output_dir outputs/model-w4 \\
      --quant_type W4 --calibration_file train.jsonl --eval_file heldout.jsonl

Predict, export, finetune with LoRA, and evaluate take the result like any other model."""


def main() -> None:
    """Read flags, load, measure, round, measure again, write."""
    (args,) = load((QuantizeArguments,), prog="quantize_generation.py", description=_DESCRIPTION)
    from data.tokenizer import check_vocabulary, load_tokenizer
    from llm.llama.config import load_config

    config = load_config(args.model_name_or_path)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or args.model_name_or_path)
    check_vocabulary(tokenizer, config.vocab_size)
    runtime.prepare(args.threads, args.device)
    runtime.load_paddle(args.device)
    from llm.evaluation import quantized
    from llm.llama.build import load_model
    from llm.llama.quantization import post_training
    from llm.llama.quantization.network import dequantize_model
    from llm.llama.saving import save_directory

    quantized.check_paths(args)
    rows, held_out = None, None
    if args.reads_text:
        documents = quantized.read_documents(args.calibration_file, tokenizer)
        length = min(args.calibration_length, config.max_position_embeddings)
        rows = quantized.calibration_rows(documents, args.calibration_samples, length)
    if args.eval_file is not None:
        held_out = quantized.read_documents(args.eval_file, tokenizer, args.eval_limit)
    model = load_model(args.model_name_or_path, use_flash_attention=True)
    if args.dequantize:
        save_directory(dequantize_model(model), tokenizer, Path(args.output_dir))
        sys.stderr.write(f"wrote {args.output_dir}\n")
        return
    length = min(args.eval_length, config.max_position_embeddings)
    before = quantized.measure(model, held_out, length) if held_out else None
    start = time.perf_counter()
    report = post_training.quantize(model, args, rows)
    report["seconds"] = round(time.perf_counter() - start, 1)
    if held_out:
        after = quantized.measure(model, held_out, length)
        report["perplexity"] = {
            "file": Path(args.eval_file).name,
            "window": length,
            "before": before,
            "after": after,
        }
    documents = {post_training.REPORT_NAME: report}
    save_directory(model, tokenizer, Path(args.output_dir), documents=documents)
    sys.stdout.write(quantized.table(report) + "\n")
    sys.stderr.write(f"wrote {args.output_dir}\n")


if __name__ == "__main__":
    run_script(main, DataError)
