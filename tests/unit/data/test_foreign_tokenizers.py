"""What foreign libraries cannot do: long runs are cut as Meta cuts them, panics become errors."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from common.errors import DataError
from data.conversations.chat_encoding import ConversationEncoder, Named
from data.corpus.token_store import TokenStore
from data.prepare import prepare
from data.tokenization import tiktoken_file
from data.tokenization.fence import fenced
from data.tokenizer import load_tokenizer

# Written apart from the code under test, after Meta's llama3/tokenizer.py.
LONGEST_TEXT, LONGEST_RUN = 400_000, 25_000


def metas_pieces(text: str) -> Iterator[str]:
    for first in range(0, len(text), LONGEST_TEXT):
        part = text[first : first + LONGEST_TEXT]
        start, length, white = 0, 0, part[0].isspace()
        for index, character in enumerate(part):
            if character.isspace() != white:
                white, length = not white, 1
                continue
            length += 1
            if length > LONGEST_RUN:
                yield part[start:index]
                start, length = index, 1
        yield part[start:]


def test_long_runs_are_cut_as_metas_code_cuts_them(
    tiny_tiktoken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiktoken_file, "STACK", 60_000)
    tokenizer = load_tokenizer(tiny_tiktoken)
    itself = tokenizer._encoding.encode_ordinary
    text = "begin" + " " * 61_000 + "word " * 70_000 + "the" * 10_000
    expected = [token_id for piece in metas_pieces(text) for token_id in itself(piece)]
    assert expected != itself(text)
    assert tokenizer.encode(text) == expected
    packed, sizes = tokenizer.packed_encoder(np.int32).encode(["a b", text, "c"])
    assert packed.tolist() == [*itself("a b"), *expected, *itself("c")]
    assert sizes[1] == len(expected)


def test_a_million_spaces_do_not_end_the_work(tiny_tiktoken: Path) -> None:
    tokenizer = load_tokenizer(tiny_tiktoken)
    text = " " * 1_000_000
    with pytest.raises(BaseException, match="StackOverflow"):
        tokenizer._encoding.encode_ordinary(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_what_tiktoken_can_answer_is_its_own(tiny_tiktoken: Path) -> None:
    tokenizer = load_tokenizer(tiny_tiktoken)
    text = "a" + " " * 60_000 + "b" + "\n" * 60_000 + "x" * 60_000
    expected = tokenizer._encoding.encode_ordinary(text)
    assert tokenizer.encode(text) == expected
    assert tokenizer.packed_encoder(np.int32).encode([text])[0].tolist() == expected


# A token that takes the white space after it, and one of white space that takes what is before it:
# `tokenizers` panics where the second lies in what the first has taken.
PANICS = [
    {"content": "<r>", "special": False, "rstrip": True, "normalized": False},
    {"content": " \t", "special": False, "lstrip": True, "normalized": False},
]
BAD = "a <r> \t  b"


@pytest.fixture(params=["sentencepiece", "tiktoken", "json"])
def panicking(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_model: Path,
    tiny_tiktoken: Path,
    prose: list[str],
) -> Path:
    """A model directory of each kind with tokens that make the library panic."""
    directory = tmp_path / "model"
    directory.mkdir()
    if request.param == "json":
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            special_tokens=["<s>", "</s>"], vocab_size=400, show_progress=False
        )
        tokenizer.train_from_iterator(prose[:20], trainer)
        tokenizer.save(str(directory / "tokenizer.json"))
    else:
        source = tiny_tiktoken if request.param == "tiktoken" else tiny_model / "tokenizer.model"
        (directory / "tokenizer.model").write_bytes(source.read_bytes())
    first = load_tokenizer(directory).vocab_size
    config = {"added_tokens_decoder": {str(first + n): token for n, token in enumerate(PANICS)}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_panic_names_file_and_line(panicking: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", BAD, "two", BAD, "three")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_text(f"four\n\n\n{BAD}\ngoes on\n\nfive\n")
    command = ["--input", str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"), "--workers", "2"]
    command += ["--tokenizer", str(panicking), "--output_prefix", str(tmp_path / "out")]
    reason = "the tokenizers library cannot encode a text of 10 characters"
    if (panicking / "tokenizer.json").exists():
        reason = "tokenizer.json .* cannot encode a text of 10 characters"
    with pytest.raises(DataError, match=rf"a.jsonl:2: {reason}[\s\S]*a.jsonl:4: [\s\S]*b.txt:4: "):
        prepare(command)
    prepare([*command, "--on_bad_line", "skip"])
    assert TokenStore.open(tmp_path / "out").num_documents == 5
    listed = (tmp_path / "out.bad_lines.txt").read_text().splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in listed] == [
        *("a.jsonl:2", "a.jsonl:4", "b.txt:4"),
    ]


def test_a_panic_spoils_one_conversation(panicking: Path) -> None:
    tokenizer = load_tokenizer(panicking, chat_template="plain")
    if tokenizer.eos_id is None:
        pytest.skip("no end of text")
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = load_tokenizer(panicking, chat_template=template)
    turns = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        for text in ("one", BAD, "two")
    ]
    encoder = ConversationEncoder(tokenizer)
    rows = encoder.try_many([Named(f"f:{n}", talk) for n, talk in enumerate(turns, 1)])
    assert [isinstance(row, DataError) for row in rows] == [False, True, False]
    assert str(rows[1]).startswith("f:2: ")
    with pytest.raises(DataError, match="cannot encode"):
        tokenizer.apply_chat_template(turns[1])


class PanicException(BaseException):
    """As pyo3 makes one."""


@pytest.mark.parametrize(
    ("thrown", "caught"),
    [
        (RuntimeError("C++\nmore"), "it cannot encode a text of 2 characters, 'ab': C"),
        (PanicException("panic"), "cannot encode .*: panic"),
        (PanicException(), "cannot encode .*: PanicException"),
        (KeyboardInterrupt(), None),
        (SystemExit(3), None),
        (MemoryError(), None),
    ],
)
def test_only_what_libraries_throw_is_fenced(thrown: BaseException, caught: str | None) -> None:
    expected = type(thrown) if caught is None else DataError
    with pytest.raises(expected, match=caught), fenced("it", ["ab"]):
        raise thrown
