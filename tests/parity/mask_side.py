"""What runs in the peers' environment for label masks: transformers' chat templates.

``python -m tests.parity.mask_side masks DIR`` reads ``DIR/request.json``, a list of {tokenizer,
bos, eos, template, conversations}, and writes ``DIR/masks.json``: ids and assistant masks as
``apply_chat_template(..., return_assistant_tokens_mask=True)`` gives them, which reads what a
template marks with ``generation``. ``render DIR`` reads {tokenizer, cases} and writes
``DIR/rendered.json``: the text of each case, null where its template refuses it. Nothing of the
suite is imported.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast


def masks(item: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Return ids and mask of each conversation."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=item["tokenizer"], bos_token=item["bos"], eos_token=item["eos"]
    )
    results = []
    for messages in item["conversations"]:
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=item["template"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        results.append({"ids": encoded["input_ids"], "mask": encoded["assistant_masks"]})
    return results


def rendered(request: dict[str, Any]) -> list[str | None]:
    """Return the text of each case."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=request["tokenizer"], bos_token="<s>", eos_token="</s>"
    )
    texts: list[str | None] = []
    for case in request["cases"]:
        try:
            text = tokenizer.apply_chat_template(
                case["messages"],
                tools=case.get("tools"),
                documents=case.get("documents"),
                chat_template=case["template"],
                add_generation_prompt=case["prompt"],
                tokenize=False,
                **case.get("variables", {}),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError):
            text = None
        texts.append(text)
    return texts


def main() -> None:
    """Answer the request."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["masks", "render"])
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    directory = arguments.directory
    request = json.loads((directory / "request.json").read_text("utf-8"))
    if arguments.command == "render":
        text = json.dumps(rendered(request))
        (directory / "rendered.json").write_text(text, encoding="utf-8")
        return
    answers = [masks(item) for item in request]
    (directory / "masks.json").write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
