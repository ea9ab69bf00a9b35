"""Encoding in bulk: ids equal to the libraries' own, with gigatoken, without, with a wrong one."""

import base64
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hard_texts import hard_texts

from data.corpus.prepare_worker import SMALLEST_PIECE
from data.prepare import prepare
from data.tokenization import bulk
from data.tokenization.batch import encode_batch
from data.tokenization.bulk import BulkEncoder
from data.tokenization.packed import PlainEncoder
from data.tokenization.sentencepiece_model import SentencePieceTokenizer
from data.tokenizer import Tokenizer, load_tokenizer
from tests.same_tokens import sentencepiece_itself, tiktoken_itself


def rows(packed: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, sizes = packed
    assert int(sizes.sum()) == len(ids)
    return [row.tolist() for row in np.split(ids, np.cumsum(sizes)[:-1])]


def corpus(shared_data: Path) -> list[str]:
    """Real English, with WikiText's line breaks, and Chinese."""
    texts = [json.loads(line)["text"] for line in (shared_data / "c4_300docs.jsonl").open()]
    texts.append((shared_data / "wikitext2.valid.txt").read_text())
    texts.append(Path(random.__file__).read_text())
    texts.append("大语言模型是用大量文本训练的神经网络。它们能写诗、翻译，也会写代码！\n" * 3)
    return texts


def test_llama2_ids_are_sentencepieces_own(shared_data: Path) -> None:
    path = shared_data / "llama2.tokenizer.model"
    itself, ours = sentencepiece_itself(path), load_tokenizer(path)
    texts = corpus(shared_data) + hard_texts(3000)
    expected = [itself.encode(text) for text in texts]
    encoder = ours.packed_encoder(np.int32)
    assert isinstance(encoder, BulkEncoder)
    # Twice: words that are new, and words that were met.
    assert rows(encoder.encode(texts)) == expected
    assert rows(encoder.encode(texts)) == expected
    assert [ours.encode(text) for text in texts[-3000:]] == expected[-3000:]


def test_llama3_ids_are_tiktokens_own(shared_data: Path) -> None:
    path = shared_data / "llama3.tokenizer.model"
    itself, ours = tiktoken_itself(path), load_tokenizer(path)
    texts = corpus(shared_data) + hard_texts(3000)
    expected = [itself.encode_ordinary(text) for text in texts]
    encoder = ours.packed_encoder(np.int32)
    assert isinstance(encoder, BulkEncoder)
    assert rows(encoder.encode(texts)) == expected
    assert rows(encoder.encode(texts)) == expected
    assert [ours.encode(text) for text in texts[-3000:]] == expected[-3000:]


def test_hard_texts_one_by_one_and_together(tiny_model: Path, tiny_tiktoken: Path) -> None:
    texts = hard_texts(4000, seed=7)
    for path, expected in (
        (tiny_model / "tokenizer.model", sentencepiece_itself(tiny_model / "tokenizer.model")),
        (tiny_tiktoken, tiktoken_itself(tiny_tiktoken)),
    ):
        ours = load_tokenizer(path)
        encode = getattr(expected, "encode_ordinary", expected.encode)
        want = [encode(text) for text in texts]
        encoder = ours.packed_encoder(np.int32)
        for start in range(0, len(texts), 500):
            assert rows(encoder.encode(texts[start : start + 500])) == want[start : start + 500]
        assert rows(ours.packed_encoder(np.int32).encode(texts)) == want


def test_gigatoken_is_made_again_when_it_holds_too_much(
    tiny: Tokenizer, tiny_tiktoken: Path, prose: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "KEPT", -1 << 40)
    for tokenizer in (tiny, load_tokenizer(tiny_tiktoken)):
        encoder = tokenizer.packed_encoder(np.int32)
        made = encoder._made
        for text in prose[:20]:
            assert rows(encoder.encode([text])) == [tokenizer.encode(text)]
        assert encoder._made is not made


def test_little_text_is_not_worth_an_encoder_of_its_own(tiny: Tokenizer) -> None:
    assert isinstance(tiny.packed_encoder(np.int32, characters=1000), PlainEncoder)
    assert isinstance(tiny.packed_encoder(np.int32, characters=10**9), BulkEncoder)


@pytest.mark.parametrize("fault", ["missing", "other ids", "refuses"])
def test_the_library_has_the_last_word(
    fault: str,
    tiny_model: Path,
    tiny_tiktoken: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without gigatoken, and with one that is wrong about a single text or dies."""
    if fault == "missing":
        monkeypatch.setitem(sys.modules, "gigatoken", None)
        monkeypatch.delitem(sys.modules, "gigatoken.gigatoken_rs", raising=False)
    load = bulk._load

    def broken(model: bytes) -> object:
        if fault == "refuses":
            raise ValueError("Unknown pre_tokenizer")
        inner = load(model)

        class Wrong:
            def encode(self, text: bytes) -> np.ndarray:
                ids = inner.encode(text)
                return ids[::-1] if text == b"x" + b" " * 69 + b"y" else ids

        return Wrong()

    monkeypatch.setattr(bulk, "_load", broken)
    for tokenizer in map(load_tokenizer, (tiny_model, tiny_tiktoken)):
        caplog.clear()
        encoder = tokenizer.packed_encoder(np.int32)
        assert isinstance(encoder, PlainEncoder)
        assert "several times slower" in caplog.text
        assert rows(encoder.encode(["a b"])) == [tokenizer.encode("a b")]


def test_stores_are_the_same_with_gigatoken_in_forked_workers(
    tiny_model: Path, prose: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "corpus.txt"
    texts = [f"{number} {text}" for number in range(20) for text in prose + hard_texts(50)]
    source.write_text("\n\n".join(texts).replace("\0", ""))
    assert source.stat().st_size > 2 * SMALLEST_PIECE
    stores = []
    for worth, workers in ((10**12, 1), (0, 1), (0, 2)):
        monkeypatch.setattr(SentencePieceTokenizer, "worth_making", worth)
        prefix = tmp_path / f"{worth}-{workers}"
        words = ["--input", str(source), "--tokenizer", str(tiny_model), "--append_eos"]
        prepare([*words, "--output_prefix", str(prefix), "--workers", str(workers)])
        stores.append(prefix.with_suffix(".bin").read_bytes())
    assert stores[0] == stores[1] == stores[2]


def test_characters_that_the_libraries_know_from_different_unicodes(tmp_path: Path) -> None:
    """Letters and digits of Unicode 17, where a word's end shows in the ids."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"'s", b" \xf0"]
    lines = (f"{base64.b64encode(one).decode()} {rank}\n" for rank, one in enumerate(tokens))
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(lines))
    encoder, itself = load_tokenizer(path).packed_encoder(np.int32), tiktoken_itself(path)
    assert isinstance(encoder, BulkEncoder)
    newer = [*range(0x11DB0, 0x11DEA), *range(0x16FF4, 0x16FF7), *range(0x323B0, 0x323C0)]
    texts = [around.format(chr(one)) for one in newer for around in ("a {} b", "{}'s", "1{}2")]
    assert rows(encoder.encode(texts)) == [itself.encode_ordinary(text) for text in texts]


def test_models_whose_parts_depend_on_each_other_use_the_plain_way(
    tmp_path: Path, prose: list[str]
) -> None:
    """A model that normalizes or ends pieces with spaces cannot be cut; its ids stay right."""
    corpus_path = tmp_path / "corpus.txt"
    corpus_path.write_text("\n".join(prose))
    for name, options in {
        "normalizing": {"normalization_rule_name": "nmt_nfkc"},
        "suffix": {"treat_whitespace_as_suffix": True, "normalization_rule_name": "identity"},
        "unigram": {"model_type": "unigram", "normalization_rule_name": "identity"},
    }.items():
        prefix = tmp_path / name
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus_path),
            model_prefix=str(prefix),
            vocab_size=600,
            byte_fallback=True,
            minloglevel=2,
            **{"model_type": "bpe", **options},
        )
        path = prefix.with_suffix(".model")
        ours, itself = load_tokenizer(path), sentencepiece_itself(path)
        texts = hard_texts(300) + prose[:20]
        encoder = ours.packed_encoder(np.int32)
        assert not isinstance(encoder, BulkEncoder)
        assert rows(encoder.encode(texts)) == [itself.encode(text) for text in texts]
        ids = itself.encode(prose[0])
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == itself.decode(ids)


def test_batches_are_the_same_on_any_number_of_cores(
    tiny: Tokenizer, prose: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.tokenization.batch.WORTH_A_PROCESS", 1000)
    monkeypatch.setattr(type(tiny), "worth_making", 1000)
    monkeypatch.setattr("data.tokenization.batch.may_fork", lambda: True)
    texts = [*prose, "", "end"]
    expected = [[1, *tiny.encode(text), 2] for text in texts]
    for workers in (1, 2, 3):
        assert encode_batch(tiny, texts, add_bos=True, add_eos=True, workers=workers) == expected
    assert encode_batch(tiny, []) == []
    monkeypatch.setattr("data.tokenization.batch.may_fork", lambda: False)
    assert encode_batch(tiny, texts, add_bos=True, add_eos=True) == expected
    monkeypatch.setattr(type(tiny), "worth_making", 10**9)
    assert encode_batch(tiny, texts, add_bos=True, add_eos=True) == expected
