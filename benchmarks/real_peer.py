"""transformers' side of `make real`: ``python benchmarks/real_peer.py REQUEST ANSWER``.

Runs in the peers' environment, and imports of the suite only its plain loop over windows of text.
The request is a JSON file: ``model``, a directory; ``questions``, texts, answered greedily in up to
``max_new_tokens``; ``text``, a file, read in windows of ``window`` tokens after the token that
begins a document; ``adapter``, a directory in PEFT's layout or null.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from tests.parity.hf_side import open_model
from tests.parity.score_side import negative_log_likelihood


def answer(model: Any, tokenizer: Any, question: str, most: int) -> dict[str, Any]:
    """Return ids of the prompt and of the greedy answer, and its smallest lead over the second."""
    asked = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=most,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.logits).topk(2, dim=-1).values
    return {
        "prompt_ids": prompt[0].tolist(),
        "ids": out.sequences[0, prompt.shape[1] :].tolist(),
        "lead": float((best[..., 0] - best[..., 1]).min()),
    }


def main(request_file: str, answer_file: str) -> None:
    """Answer one request."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text(encoding="utf-8"))
    logging.disable_progress_bar()
    model = open_model(Path(request["model"]))
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    if request["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"]).eval()
    found: dict[str, Any] = {
        "answers": [
            answer(model, tokenizer, one, request["max_new_tokens"]) for one in request["questions"]
        ]
    }
    if request["text"] is not None:
        text = Path(request["text"]).read_text(encoding="utf-8")
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        # One token more goes in than is predicted from: the last of a window is a label alone.
        window = request["window"]
        loss, count = negative_log_likelihood(model, ids, window + 1, window)
        found |= {"loss": loss, "tokens": count}
    Path(answer_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
