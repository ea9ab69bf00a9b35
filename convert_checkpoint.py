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
Hugging Face's safetensors and PaddleNLP's model_state.tp0N_pp0M.pdparams, any layout to any layout.

  to PaddleNLP        --tensor_parallel_degree 4 --pipeline_parallel_degree 2
  to Hugging Face     --input_dir CHECKPOINT_OF_PADDLENLP
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
    from llm.llama.files.conversion import convert
    from llm.llama.files.rank_layout import RankLayout
    from llm.llama.files.resizing import resized

    if args.check_only:
        _compare(args)
        return
    check_directory(args.output_dir, "output_dir", "the result")
    source = open_checkpoint(args.input_dir)
    threads = args.threads or runtime.cpu_count()
    layout = None
    if args.to_ranks:
        layout = RankLayout(
            *(args.tensor_parallel_degree, args.pipeline_parallel_degree),
            *(args.fuse_attention_qkv, args.fuse_attention_ffn),
        )

    def check(result: Path) -> None:
        """Compare in a process that has seen nothing of the conversion."""
        words = [__file__, "--check_only", "--input_dir", args.input_dir]
        words += ["--output_dir", str(result), "--threads", str(threads)]
        done = run_check(words, stderr=subprocess.PIPE)
        if done.returncode:
            raise UserError(done.stderr.strip().removeprefix("error: "))

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
    sys.stderr.write(f"wrote {args.output_dir} from {source.describe()}\n")


if __name__ == "__main__":
    run_script(main)
