"""Export a model to a static program: python export_generation_model.py --model_path DIR."""

from common.ending import run_script  # isort: split

import sys
import time
from pathlib import Path

from common.errors import UserError
from common.files import check_directory
from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "export_generation_model.py"
_DESCRIPTION = """\
Write one token-packed program for Paddle Inference, its weights, a manifest and the tokenizer.

  python export_generation_model.py --model_path outputs/model --output_path inference/llama

infer_generation.py and server.py run it without the checkpoint. A LoRA adapter (--lora_path DIR) is
merged first."""


def main() -> None:
    """Read flags, load, export, check."""
    place, export = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    if place.prefix_path is not None:
        raise UserError(
            "prefix_path cannot be exported: a program's cache belongs to the engine, which knows "
            "of no prefix; predict_generation.py takes it, and LoRA adapters can be exported"
        )
    check_directory(Path(export.output_path).parent, "directory of output_path")
    from llm.engine.finding import find_weights
    from llm.engine.opening import open_packed, start

    model, adapter = place.model_name_or_path, place.lora_path
    found = find_weights(model, tokenizer=place.tokenizer_name_or_path, adapter=adapter)
    threads = start(place)
    from llm.engine.verify import verify_program
    from llm.llama.export import export_program

    begin = time.perf_counter()
    network = open_packed(place, to_export=True)
    manifest = export_program(
        network,
        export.output_path,
        model_name=found.name,
        block_size=export.block_size,
        max_model_len=export.max_model_len,
        tokenizer_fingerprint=found.tokenizer.fingerprint,
        cache_dtype=place.cache_dtype,
    )
    output = Path(export.output_path)
    found.tokenizer.save(output.parent)
    sys.stderr.write(f"wrote {output}.* in {time.perf_counter() - begin:.1f} s\n")
    if export.check:
        agreement = verify_program(network, output, manifest, threads, place.device)
        sys.stderr.write(f"checked in a fresh process: {agreement}\n")


if __name__ == "__main__":
    run_script(main)
