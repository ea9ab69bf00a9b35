"""Tokenizers in GGUF files of the ``gguf`` package, beside those whose lists were put there."""

import json

import gguf
import pytest
import tokenizers

from common.errors import DataError
from data.tokenization.sentencepiece_model import load_processor
from data.tokenization.training import train_sentencepiece
from data.tokenizer import load_tokenizer
from tests.unit.data.hard_texts import HARD_CHARACTERS, hard_texts

TEXTS = ["", " ", "Hello world", "It's 12345 o'clock\n\n  x", "".join(HARD_CHARACTERS), "a  b\t c"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
CORPUS = [f"word{n} It's {n * n} times 你好 {n}" for n in range(300)]
# Splits by the `tokenizers` library's own steps, named as llama.cpp names them.
_BYTES = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": _BYTES,
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), _BYTES]
    ),
}


def write(file, kind, tokens, kinds, **more):
    """Write a vocabulary alone."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if kinds:
        writer.add_token_types(kinds)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return file


def trained(split):
    """A byte-level BPE with added tokens, special and not."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer, library.decoder = split, tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return library


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_vocabularies_give_the_library_s_ids(pre, tmp_path):
    library = trained(SPLITS[pre])
    vocabulary = library.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {"<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4}
    merges = json.loads(library.to_str())["model"]["merges"]
    file = write(
        tmp_path / "model.gguf",
        "gpt2",
        tokens,
        [special.get(token, 1) for token in tokens],
        token_merges=[" ".join(pair) for pair in merges],
        tokenizer_pre=pre,
        bos_token_id=0,
        eos_token_id=1,
        chat_template=TEMPLATE,
    )
    ours = load_tokenizer(file)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (0, (1,), len(tokens))
    for text in [*TEXTS, *CORPUS[:9], "<think>x</think> <|im_end|>"]:
        theirs = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == theirs, text
        assert ours.decode(theirs, skip_special=False) == text
    rendered = ours.apply_chat_template([{"role": "user", "content": "Hi <|im_end|>"}])
    forged = ours.encode("Hi <|im_end|>")
    assert rendered == [0, *forged, 1]
    ours.save(tmp_path)  # the saved files say all that the metadata did
    again = load_tokenizer(tmp_path / "tokenizer.json")
    beside = load_tokenizer(tmp_path)
    assert beside.chat_template == TEMPLATE and beside.eos_ids == (1,)
    assert again.encode(TEXTS[4]) == beside.encode(TEXTS[4]) == ours.encode(TEXTS[4])


def test_sentencepiece_vocabularies_give_the_library_s_ids(tmp_path):
    model = train_sentencepiece(CORPUS, 300, tmp_path / "tokenizer.model")
    library = load_processor(model, model.read_bytes())
    count = library.get_piece_size()
    kinds = [
        next((n for n, of in ((2, library.is_unknown), (3, library.is_control)) if of(i)), 1)
        for i in range(count)
    ]
    kinds = [6 if library.is_byte(i) else kind for i, kind in enumerate(kinds)]
    write(
        tmp_path / "model.gguf",
        "llama",
        [library.id_to_piece(i) for i in range(count)],
        kinds,
        token_scores=[library.get_score(i) for i in range(count)],
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
    )
    model.unlink()
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, (2,), count)
    for text in [*TEXTS, *CORPUS[:9], *hard_texts(40)]:
        assert ours.encode(text) == library.encode(text), text


def test_what_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "model.gguf"
    good = {"tokenizer_pre": "gpt-2", "token_merges": ["a b"]}
    for kind, tokens, kinds, more, said in (
        ("bert", ["a"], [1], {}, "kind 'bert'"),
        ("gpt2", ["a", "b"], [1, 1], {**good, "tokenizer_pre": "tekken"}, "pre='tekken'"),
        ("gpt2", ["a", "a"], [1, 1], good, "stands twice"),
        ("gpt2", ["a", "b"], [1], good, "2 tokens, and 1 entries"),
        ("gpt2", ["a", "b"], [1, 1], {"tokenizer_pre": "gpt-2"}, "merges is missing"),
        ("gpt2", ["a", "b", "ab"], [1] * 3, {**good, "eos_token_id": 3}, "=3 is no id of its 3"),
        ("gpt2", ["a", "b"], [1, 1], good, "tokenizer.json"),  # a merge leads nowhere
        ("llama", ["a", "b"], [1, 1], {}, "0 tokens of the kind unknown"),
        ("llama", ["<unk>", "b"], [2, 1], {"token_scores": [0.0]}, "and 1 entries"),
    ):
        write(file, kind, tokens, kinds, **more)
        with pytest.raises(DataError, match=said):
            load_tokenizer(file)
