"""What runs in the peers' environment: model directories opened by transformers, one a line.

Reads ``{"directory": …, "ids": […]}`` from standard input; answers ``{"logits": [[…]]}``, or
``{"refused": why}``, or ``{"incomplete": [names]}`` where it would draw weights at random.
"""

import json
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

SPOILING = ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs")


def answer(directory: str, ids: list[int]) -> dict[str, Any]:
    """Return what transformers makes of a directory and a row of ids."""
    try:
        model, said = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
        )
        if spoilt := [str(name) for key in SPOILING for name in said.get(key) or ()]:
            return {"incomplete": spoilt}
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    except Exception as error:  # noqa: BLE001 - whatever it is, the directory is refused
        return {"refused": f"{type(error).__name__}: {error}"[:500]}
    return {"logits": logits.float().tolist()}


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever prints
    for line in sys.stdin:
        answers.write(json.dumps(answer(**json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
