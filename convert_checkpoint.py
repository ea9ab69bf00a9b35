"""Convert checkpoints: python convert_checkpoint.py --input_dir DIR --output_dir NEW."""

from common.ending import run_check, run_script  # isort: split

import subprocess
import sys
from pathlib import Path

from common.errors import UserError
from common.files import check_directory
from common.flags import load
from llm import runtime
from llm.config.scripts import SCRIPTS
from llm.config.tools import ConvertArguments

_PROG = "convert_checkpoint.py"
_DESCRIPTION = """\
From Hugging Face's safetensors and .bin, PaddleNLP's model_state.tp0N_pp0M.pdparams and
safetensors, Meta's consolidated.0N.pth, llama.cpp's GGUF or Megatron's checkpoints to any of them.

  to PaddleNLP        --output_format paddlenlp, or --tensor_parallel_degree 4 for its ranks
  to Hugging Face     --input_dir ANY_OTHER, such as MODEL.gguf
  to Meta's           --output_format meta --tensor_parallel_degree 8
  to Megatron's       --output_format megatron --tensor_parallel_degree 8
  to llama.cpp        --output_format gguf --dtype float16, or --gguf_type q8_0
  another type        --dtype bfloat16
  other file sizes    --max_shard_size 2
  more tokens         --vocab_size 32001
  compare the result  --check, or later --check_only

Tensors stream from file to file: memory holds twice the largest, not the model."""


def _compare(args: ConvertArguments) -> None:
    from llm.llama.files.checkpoint import open_checkpoint

    sides = open_checkpoint(args.input_dir), open_checkpoint(args.output_dir)
    runtime.prepare(args.threads)
    runtime.load_paddle()
    from llm.llama.files import comparing

    sys.stdout.write(comparing.report(comparing.compare(*sides)))


def main() -> None:
    """Read flags, convert, compare."""
    (args,) = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    from llm.llama.files.checkpoint import open_checkpoint
    from llm.llama.files.conversion import convert, form_of, loses_tokenizer
    from llm.llama.files.resizing import resized

    if args.check_only:
        _compare(args)
        return
    check_directory(args.output_dir, "output_dir", "the result")
    source = open_checkpoint(args.input_dir)
    threads = args.threads or runtime.cpu_count()
    layout = form_of(args)

    def check(result: Path) -> None:
        """Compare in a process that has seen nothing of the conversion."""
        words = [__file__, "--check_only", "--input_dir", args.input_dir]
        words += ["--output_dir", str(result), "--threads", str(threads)]
        done = run_check(words, stderr=subprocess.PIPE)
        if done.returncode:
            # What was said of the files before has been said by this process, too.
            raise UserError(done.stderr.rpartition("error: ")[2].strip())

    with resized(source, args.vocab_size or source.config.vocab_size) as larger:
        differing = convert(
            larger,
            args.output_dir,
            layout=layout,
            dtype=args.dtype,
            max_shard_bytes=round(args.max_shard_size * 1e9),
            threads=threads,
            check=check if args.check else None,
        )
    if differing:
        sys.stderr.write(
            f"the ranks of {source.directory} hold unequal copies of {', '.join(differing[:3])}"
            f"{' and others' * (len(differing) > 3)}; rank 0's were taken\n"
        )
    if loses_tokenizer(Path(args.input_dir), Path(args.output_dir)):
        sys.stderr.write(
            f"{args.output_dir} holds no tokenizer: {args.output_format} has a form of its own for "
            f"one; keep that of {args.input_dir}\n"
        )
    sys.stderr.write(f"wrote {args.output_dir} from {source.describe()}\n")


if __name__ == "__main__":
    run_script(main)
