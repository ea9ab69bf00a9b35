"""Answer prompts with a trained model: python predict_generation.py --model_name_or_path DIR."""

from common.ending import run_script  # isort: split

import sys

from common.errors import UserError
from common.flags import load, meant
from llm import runtime
from llm.config.generation import OpenArguments
from llm.config.scripts import SCRIPTS

_PROG = "predict_generation.py"
_MERGING = {"model_name_or_path", "device", "threads"}  # what merging ranks looks at
_DESCRIPTION = """\
Generate with a model directory: Hugging Face's layout, or PaddleNLP's model_state*.pdparams.

  one prompt, streamed    --prompt "The sky is"
  many, in batches        --data_file prompts.jsonl --output_file answers.jsonl
  a chat on the terminal  --chat True (no prompt)

An adapter goes on top: --lora_path DIR or --prefix_path DIR.
A model too large for one device is shared out over several (tensor parallelism):

  python -m paddle.distributed.launch --nproc_per_node 2 predict_generation.py ..."""


def _merge(target: str, place: OpenArguments, *answering: object) -> None:
    """Write a checkpoint's complete tensors, whatever its layout."""
    source, adapter = place.model_name_or_path, place.path
    if source is None:
        raise UserError(
            "--merge_tensor_parallel_path needs --model_name_or_path: the directory of the ranks"
        )
    if adapter is not None:
        raise UserError(
            f"--merge_tensor_parallel_path merges ranks, not the adapter {adapter}; merge_lora.py "
            "does that to the result"
        )
    idle = sorted(name for group in (place, *answering) for name in meant(group) - _MERGING)
    if idle:
        raise UserError(
            f"{', '.join(idle)} would have no effect: --merge_tensor_parallel_path answers "
            "nothing; drop one of them"
        )
    from llm.llama.files.checkpoint import open_checkpoint
    from llm.llama.files.conversion import convert

    convert(open_checkpoint(source), target, threads=place.threads or runtime.cpu_count())
    sys.stderr.write(f"wrote {target}\n")


def main() -> None:
    """Read flags, open the model, answer."""
    place, asked, sampling, merging = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    if merging.merge_tensor_parallel_path is not None:
        if place.rank == 0:
            _merge(merging.merge_tensor_parallel_path, place, asked, sampling)
        return
    from llm.serving.terminal import run

    run(place, asked, sampling)


if __name__ == "__main__":
    run_script(main)
