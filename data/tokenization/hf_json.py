"""tokenizer.json, through the `tokenizers` library."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from common.errors import DataError
from data.tokenization.base import SpecialTokens, Tokenizer
from data.tokenization.model_files import Declared, merge_eos

# What a lone tokenizer.json's control tokens are for, by the names in use.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>")
PAD_NAMES = ("<|finetune_right_pad_id|>", "<pad>")


class HFTokenizer(Tokenizer):
    """Ids exactly as the `tokenizers` library gives them, without its automatic BOS and EOS."""

    def __init__(
        self, path: Path, content: bytes, declared: Declared, chat_template: str | None
    ) -> None:
        self._content = content
        self._plain = _load(path, content)
        # The texts of control tokens are then ordinary characters.
        self._plain.encode_special_tokens = True
        special = {
            token.content: token_id
            for token_id, token in self._plain.get_added_tokens_decoder().items()
            if token.special
        }
        super().__init__(
            name=f"tokenizer.json {path}",
            vocab_size=1 + max(self._plain.get_vocab(with_added_tokens=True).values()),
            special=SpecialTokens(
                ids=special,
                bos_id=_pick(special, declared.bos, declared.bos_id, BOS_NAMES),
                eos_ids=_eos_ids(special, declared),
                pad_id=_pick(special, declared.pad, declared.pad_id, PAD_NAMES),
            ),
            content=content,
            chat_template=chat_template,
            source=path,
        )

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        return _load(self.source, self._content)

    def encode_plain(self, text: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def adds_space(self) -> bool:
        first = self._plain.id_to_token(next(iter(self.encode_plain("x")), 0))
        return bool(first and first.startswith("\u2581"))

    def encode_plain_batch(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        if threads == 1:
            return [self.encode_plain(text) for text in texts]
        rows = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [row.ids for row in rows]

    def _encode_with_special(self, text: str) -> list[int]:
        # The library knows which spaces around a control token belong to it.
        ids: list[int] = self._marked.encode(text, add_special_tokens=False).ids
        return ids

    def decode_plain(self, ids: Sequence[int]) -> str:
        text: str = self._plain.decode(list(ids), skip_special_tokens=False)
        return text

    def vocabulary_file(self) -> tuple[str, bytes]:
        return "tokenizer.json", self._content


def _load(path: Path, content: bytes) -> tokenizers.Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_buffer(content)
    # The library raises plain Exception for anything it cannot read.
    except Exception as error:
        raise DataError(f"{path} is not a tokenizer.json, or is damaged: {error}") from error
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _pick(
    special: Mapping[str, int], text: str | None, token_id: int | None, names: Sequence[str]
) -> int | None:
    if text is not None and text in special:
        return special[text]
    if token_id is not None:
        return token_id
    return next((special[name] for name in names if name in special), None)


def _eos_ids(special: Mapping[str, int], declared: Declared) -> tuple[int, ...]:
    found = merge_eos(declared.eos_ids, special.get(declared.eos or ""))
    return found or tuple(special[name] for name in EOS_NAMES if name in special)
