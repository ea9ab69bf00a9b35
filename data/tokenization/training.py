"""Train a small sentencepiece tokenizer of Llama 2's kind."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from common.errors import DataError
from common.files import write_whole
from data.tokenization.fence import check_text

# 256 byte pieces, <unk>, <s> and </s>.
RESERVED = 259
LONGEST_LINE = 1 << 20


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out: str | Path) -> Path:
    """Train a BPE model with byte fallback on `texts` and write it to `out`; returns `out`.

    The settings are those of Llama 2's own model (identity normalization, a space put before
    each text, digits apart, runs of spaces as pieces, every byte a piece), so that whatever
    reads that one reads this one. One thread, so that equal texts give an equal file.

    Args:
        texts: training text; line breaks separate sentences.
        vocab_size: pieces in all, of which 259 are bytes and control tokens.
        out: the model file, e.g. MODEL_DIRECTORY/tokenizer.model.

    Raises:
        DataError: no text, or a vocabulary size that the text cannot fill.
    """
    if vocab_size <= RESERVED:
        raise DataError(
            f"vocab_size must be above {RESERVED} (256 bytes, 3 control tokens), got {vocab_size}"
        )
    lines = list(_lines(texts))
    if not lines:
        raise DataError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.99995,
            # Longer lines would be left out in silence.
            max_sentence_length=LONGEST_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"a vocabulary of {vocab_size} pieces cannot be trained on {len(lines)} lines of text "
            f"({error}): ask for fewer pieces or give more text"
        ) from error
    return write_whole(out, model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        check_text(text)
        for line in text.split("\n"):
            if line.strip():
                # sentencepiece counts bytes, of which a character has at most four.
                step = LONGEST_LINE // 4
                yield from (line[at : at + step] for at in range(0, len(line), step))
