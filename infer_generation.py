"""Answer prompts with an exported program in Paddle Inference; paddlenlp is never imported."""

from common.ending import run_script  # isort: split

from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "infer_generation.py"
_DESCRIPTION = """\
Generate with what export_generation_model.py wrote.

  python infer_generation.py --model_dir inference --model_prefix llama --prompt "The sky is" """


def main() -> None:
    """Read flags, open the program, answer."""
    place, asked, sampling = load(SCRIPTS[_PROG], prog=_PROG, description=_DESCRIPTION)
    from llm.serving.terminal import run

    run(place, asked, sampling)


if __name__ == "__main__":
    run_script(main)
