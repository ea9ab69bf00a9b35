"""What runs where lm-evaluation-harness is installed: ``python lm_eval_side.py DIR``.

Reads ``DIR/request.json``, drives the backend class and the harness's own functions, and writes
``DIR/answers.json``.
"""

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model


def instances(kind: str, arguments: list[Any]) -> list[Instance]:
    """Return requests as tasks make them."""
    return [
        Instance(request_type=kind, doc={}, arguments=tuple(one), idx=number)
        for number, one in enumerate(arguments)
    ]


def refusal(make: Any) -> str:
    """Return the message of the ValueError that a call has to end in."""
    try:
        make()
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    """Answer one request."""
    logging.basicConfig()  # as the harness's command line does, with more
    directory = Path(sys.argv[1])
    request = json.loads((directory / "request.json").read_text("utf-8"))
    backend = get_model("paddle-llama")
    answers: dict[str, Any] = {
        "refusals": [refusal(lambda args=args: backend(**args)) for args in request["bad"]]
    }
    for name, args in request["models"].items():
        model = backend(**args)
        answers[name] = {
            "pairs": model.loglikelihood(instances("loglikelihood", request["pairs"])),
            "rolling": model.loglikelihood_rolling(
                instances("loglikelihood_rolling", [[text] for text in request["texts"]])
            ),
            "generated": model.generate_until(instances("generate_until", request["questions"])),
            "chat": model.apply_chat_template(request["chat"]),
            "open_chat": model.apply_chat_template(request["chat"], add_generation_prompt=False),
            "chat_ids": model.tok_encode(model.apply_chat_template(request["chat"])),
            "template": model.chat_template(True),
            "tokenizer_name": model.tokenizer_name,
            "setting": refusal(
                lambda model=model: model.generate_until(
                    instances("generate_until", [["x", {"num_beams": 4}]])
                )
            ),
            "room": refusal(
                lambda model=model: model.generate_until(
                    instances("generate_until", [["x", {"max_gen_toks": 4096}]])
                )
            ),
        }
    pages = import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    answers["pages"] = [pages.wikitext_detokenizer({"page": page}) for page in request["pages"]]
    answers["words"] = [pages.process_results({"page": page}, (0,))["word_perplexity"][1]
                        for page in request["pages"]]  # fmt: skip
    (directory / "answers.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
