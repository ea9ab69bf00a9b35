"""Export a model to a static program: python export_generation_model.py --model_path DIR."""

import sys
import time
from pathlib import Path

from common.errors import UserError
from common.flags import load, run_script
from llm import runtime
from llm.config.generation import (
    AdapterArguments,
    ExportArguments,
    PackingArguments,
    SourceArguments,
    check_adapted,
)

_DESCRIPTION = """\
Write one token-packed program for Paddle Inference, its weights, a manifest and the tokenizer.

  python export_generation_model.py --model_path outputs/model --output_path inference/llama

infer_generation.py and server.py run it without the checkpoint. A LoRA adapter (--lora_path DIR) is
merged first."""


def main() -> None:
    """Read flags, load, export, check."""
    source, adapter, packing, export = load(
        (SourceArguments, AdapterArguments, PackingArguments, ExportArguments),
        prog="export_generation_model.py",
        description=_DESCRIPTION,
    )
    if adapter.prefix_path is not None:
        raise UserError(
            "prefix_path cannot be exported: a program's cache belongs to the engine, which knows "
            "of no prefix; predict_generation.py takes it, and LoRA adapters can be exported"
        )
    check_adapted(source.dtype, source.device, adapter.lora_path)
    from data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_place
    from llm.llama.config import load_config
    from llm.llama.files import peft

    config = load_config(source.model_name_or_path)
    places = (source.tokenizer_name_or_path, adapter.lora_path, source.model_name_or_path)
    tokenizer = load_tokenizer(tokenizer_place(*places))
    check_vocabulary(tokenizer, config.vocab_size)
    if adapter.lora_path is not None:
        peft.read_config(adapter.lora_path, "LORA")
    threads = runtime.prepare(source.threads, source.device)
    runtime.load_paddle(source.device)
    from llm.engine.verify import verify_program
    from llm.llama.adapters.lora import load_lora, merge_lora
    from llm.llama.build import load_model
    from llm.llama.export import export_program
    from llm.llama.fused import pack_where_possible

    start = time.perf_counter()
    options = {"dtype": source.dtype, "ops": source.op_modes}
    model = load_model(source.model_name_or_path, to_pack=True, **options)
    if adapter.lora_path is not None:
        merge_lora(load_lora(model, adapter.lora_path))
    pack_where_possible(model, **packing.options)
    manifest = export_program(
        model,
        export.output_path,
        model_name=Path(source.model_name_or_path).resolve().name,
        block_size=export.block_size,
        max_model_len=export.max_model_len,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    output = Path(export.output_path)
    tokenizer.save(output.parent)
    sys.stderr.write(f"wrote {output}.* in {time.perf_counter() - start:.1f} s\n")
    if export.check:
        count = verify_program(model, output, manifest, threads, source.device)
        sys.stderr.write(f"checked in a fresh process: {count} greedy tokens equal\n")


if __name__ == "__main__":
    run_script(main)
