"""transformers' side of `tests/fuzz/tokenizers.py`: runs in the peers' environment.

One JSON request a line on standard input, one answer a line on standard output. A tokenizer is made
once per directory. Of a vocabulary file that is no tokenizer.json transformers 5 makes a
tokenizer.json of its own; for sentencepiece that one parts spaces in another way than the library
does, so it says here where added tokens are, and the library says what the rest becomes.
"""

import json
import sys
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils.chat_template_utils import render_jinja_template

FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


class Kind:
    """A tokenizer of a directory, asked for ids and texts."""

    def __init__(self, directory, added):
        self.fast = self.make(directory, added)

    def encode(self, text, special):
        encoded = self.fast(text, add_special_tokens=False, split_special_tokens=not special)
        return encoded.input_ids

    def decode(self, ids, skip):
        return self.fast.decode(ids, skip_special_tokens=skip)

    def chat(self, messages, template):
        encoded = self.fast.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=True
        )
        return encoded["input_ids"]


class Json(Kind):
    """A directory with a tokenizer.json, through transformers' own loader."""

    def make(self, directory, added):
        return PreTrainedTokenizerFast.from_pretrained(directory)


class Tiktoken(Kind):
    """A tiktoken file converted by transformers, with the declared tokens added in order."""

    def make(self, directory, added):
        converted = TikTokenConverter(vocab_file=f"{directory}/tokenizer.model").converted()
        converted.add_tokens([read(token) for _, token in sorted(added.items(), key=number)])
        return PreTrainedTokenizerFast(tokenizer_object=converted, bos_token="<|begin_of_text|>")


class Sentencepiece(Kind):
    """A sentencepiece model: the library itself between the tokens that `tokenizers` finds."""

    def make(self, directory, added):
        config = json.loads(Path(directory, "tokenizer_config.json").read_text())
        self.model = sentencepiece.SentencePieceProcessor(model_file=f"{directory}/tokenizer.model")
        self.first = config.get("legacy", True) is False
        cut = tokenizers.Tokenizer(tokenizers.models.BPE())  # knows nothing else
        cut.add_tokens([read(token) for _, token in sorted(added.items(), key=number)])
        self.ids = {cut.token_to_id(one["content"]): int(i) for i, one in added.items()}
        self.added = {int(i): one for i, one in added.items()}
        # As LlamaTokenizer's.
        self.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        return cut

    def encode(self, text, special):
        self.fast.encode_special_tokens = not special
        ids, at = [], 0
        encoded = self.fast.encode(text, add_special_tokens=False)
        found = list(zip(encoded.ids, encoded.offsets, strict=True))
        for token, (start, stop) in [*found, (None, (len(text), len(text)))]:
            if start > at:
                ids += self.between(text[at:start], at)
            if token is not None:
                ids.append(self.ids[token])
            at = stop
        return ids

    def between(self, text, at):
        if not self.first or at == 0:
            return self.model.encode(text)
        # A line break is a piece of its own, so what follows it has no space before it.
        return self.model.encode("\n" + text)[len(self.model.encode("\n")) :]

    def decode(self, ids, skip):
        if not any(one in self.added for one in ids):
            return self.model.decode(ids)
        ids = [one for one in ids if not (skip and self.added.get(one, NONE)["special"])]
        return self.decoder.decode([self.spelled(one) for one in ids])

    def spelled(self, one):
        return self.added[one]["content"] if one in self.added else self.model.id_to_piece(one)

    def chat(self, messages, template):
        rendered, _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        return self.encode(rendered[0], True)


NONE = {"special": False}
KINDS = {"json": Json, "tiktoken": Tiktoken, "sentencepiece": Sentencepiece}


def number(item):
    return int(item[0])


def read(token):
    return AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS})


def answered(made, name, given):
    """An answer, or an object where a library panics."""
    try:
        return getattr(made, name)(*given)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return {"panic": str(error)}


def main():
    made = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "kind" in request:
            made = KINDS[request["kind"]](request["directory"], request["added"])
            answer = [tokenizers.__version__, tiktoken.__version__]
        else:
            answer = [answered(made, name, given) for name, given in request["calls"]]
        print(json.dumps(answer), flush=True)


main()
