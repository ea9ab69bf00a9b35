"""Bad input to `data`: each case with the message a user sees."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.prepare import main
from data.pretrain_dataset import ResumableSampler, build_pretrain_datasets
from data.token_store import TokenStore
from data.token_store_writer import TokenStoreWriter
from data.tokenizer import Tokenizer, load_tokenizer
from data.train_tokenizer import train_sentencepiece

HEADER = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
SIZES = struct.pack("<2i", 3, 2)
POINTERS = struct.pack("<2q", 0, 6)
MARKS = struct.pack("<3q", 0, 1, 2)


def a_store(directory: Path) -> Path:
    (directory / "c.idx").write_bytes(HEADER + SIZES + POINTERS + MARKS)
    (directory / "c.bin").write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    assert TokenStore.open(directory / "c").num_tokens == 5
    return directory / "c"


def an_npy_store(directory: Path) -> Path:
    np.save(directory / "c_ids.npy", np.arange(5, dtype=np.uint16))
    np.savez(directory / "c_idx.npz", lens=np.array([3, 2], np.int32), docs=np.array([0, 1, 2]))
    assert TokenStore.open(directory / "c").num_tokens == 5
    return directory / "c"


def index(content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / "c.idx").write_bytes(content) and None


BIN_CASES = {
    "empty index": (
        index(b"x" * 33),
        r"c.idx is cut off: it has 33 bytes, the header alone takes 34",
    ),
    "magic": (index(b"TNTIDX\x00\x00" + b"\x00" * 91), r"begins with b'TNTIDX.*not b'MMIDIDX"),
    "version": (
        index(HEADER.replace(b"\x01", b"\x02", 1) + SIZES + POINTERS + MARKS),
        "has version 2 of the index layout; only version 1",
    ),
    "type code": (
        index(HEADER[:17] + b"\x07" + HEADER[18:] + SIZES + POINTERS + MARKS),
        r"has type code 7 for token ids; known are 1 \(uint8\)",
    ),
    "cut off": (
        index(HEADER + SIZES + POINTERS + MARKS[:-1]),
        "c.idx is cut off: 2 sequences and 3 document marks take 82 bytes, the file has 81",
    ),
    "too long": (index(HEADER + SIZES + POINTERS + MARKS + b"ab"), "has bytes too many: .* has 84"),
    "absurd count": (
        index(HEADER[:18] + struct.pack("<QQ", 1 << 60, 3) + SIZES + POINTERS + MARKS),
        "c.idx is cut off: 1152921504606846976 sequences",
    ),
    "negative size": (
        index(HEADER + struct.pack("<2i", 3, -2) + POINTERS + MARKS),
        "sequence 1 has length -2",
    ),
    "pointers": (
        index(HEADER + SIZES + struct.pack("<2q", 0, 8) + MARKS),
        "sequence 1 is said to begin at byte 8, but the lengths before it end at byte 6",
    ),
    "marks": (
        index(HEADER + SIZES + POINTERS + struct.pack("<3q", 0, 2, 1)),
        "document marks must rise from 0 to the number of sequences, 2, but they are 0 to 1",
    ),
    "tokens cut off": (
        lambda d: (d / "c.bin").write_bytes(b"\x00" * 9),
        "c.bin has 9 bytes, but .*c.idx describes 5 tokens of 2 bytes",
    ),
    "no tokens file": (lambda d: (d / "c.bin").unlink(), "c.idx is there but .*c.bin is not"),
    "no index": (lambda d: (d / "c.idx").unlink(), "c.bin is there but .*c.idx is not"),
    "both layouts": (an_npy_store, "has both layouts"),
    "meta": (
        lambda d: (d / "c.meta.json").write_text("{"),
        "c.meta.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("name", BIN_CASES)
def test_damaged_bin_store(tmp_path: Path, name: str) -> None:
    damage, message = BIN_CASES[name]
    prefix = a_store(tmp_path)
    try:
        damage(tmp_path)
    except DataError as error:
        pytest.match = error
    with pytest.raises(DataError, match=message):
        TokenStore.open(prefix)


def savez(**arrays: object) -> Callable[[Path], None]:
    return lambda directory: np.savez(directory / "c_idx.npz", **arrays)


NPY_CASES = {
    "tokens cut off": (
        lambda d: (d / "c_ids.npy").write_bytes((d / "c_ids.npy").read_bytes()[:-3]),
        "c_ids.npy is no array of token ids, or damaged",
    ),
    "no array": (lambda d: (d / "c_ids.npy").write_bytes(b"hello"), "is no array of token ids"),
    "floats": (
        lambda d: np.save(d / "c_ids.npy", np.zeros(5)),
        r"must hold a one-dimensional array of integers, not float64 of shape \(5,\)",
    ),
    "pickled objects": (
        lambda d: np.save(d / "c_ids.npy", np.array([{}], object), allow_pickle=True),
        "is no array of token ids",
    ),
    "index is no zip": (
        lambda d: (d / "c_idx.npz").write_bytes(b"hello"),
        "must hold the arrays 'lens' and 'docs', or is damaged",
    ),
    "index cut off": (
        lambda d: (d / "c_idx.npz").write_bytes((d / "c_idx.npz").read_bytes()[:-30]),
        "must hold the arrays 'lens' and 'docs', or is damaged",
    ),
    "array missing": (savez(lens=np.array([5])), "must hold the arrays 'lens' and 'docs'"),
    "array of floats": (savez(lens=np.array([5.0]), docs=np.array([0, 1])), "integer arrays"),
    "marks": (
        savez(lens=np.array([3, 2]), docs=np.array([0, 1])),
        "document marks must rise from 0 to the number of sequences, 2, but they are 0 to 1",
    ),
    "other length": (
        savez(lens=np.array([3, 3]), docs=np.array([0, 1, 2])),
        "c_ids.npy has 5 tokens, but .*c_idx.npz describes 6",
    ),
}


@pytest.mark.parametrize("name", NPY_CASES)
def test_damaged_npy_store(tmp_path: Path, name: str) -> None:
    damage, message = NPY_CASES[name]
    prefix = an_npy_store(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        TokenStore.open(prefix)


def test_missing_store_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no token store at .*; make one with"):
        TokenStore.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="there is no directory"):
        TokenStore.open(tmp_path / "no" / "nothing")
    a_store(tmp_path)
    with pytest.raises(DataError, match="did you mean .*/c?"):
        TokenStore.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="document 2 is not in .*, which holds 0 to 1"):
        TokenStore.open(tmp_path / "c").document(2)


WRITER_CASES: dict[str, tuple[dict[str, object], list[int], str]] = {
    "id too large for the type": ({"dtype": np.uint16}, [65536], "token id 65536 does not fit"),
    "id too large for the vocabulary": (
        {"dtype": np.uint16, "vocab_size": 100},
        [5, 100],
        r"token id 100 does not fit into this store, whose ids are 0 to 99 \(uint16\)",
    ),
    "negative id": ({"dtype": np.int32}, [-1], "token id -1 does not fit"),
    "type too small for the vocabulary": (
        {"dtype": np.uint16, "vocab_size": 128256},
        [1],
        "a vocabulary of 128256 ids does not fit into uint16, which holds up to 65535: use int32",
    ),
    "no integer type": ({"dtype": np.float32}, [1], "a token store cannot hold float32"),
    "nothing written": ({"dtype": np.uint16}, [], "would hold no tokens"),
}


@pytest.mark.parametrize("name", WRITER_CASES)
def test_writer_refuses(tmp_path: Path, name: str) -> None:
    options, ids, message = WRITER_CASES[name]
    with (
        pytest.raises(DataError, match=message),
        TokenStoreWriter(tmp_path / "c", **options) as writer,
    ):
        writer.add_document(ids)
    assert list(tmp_path.iterdir()) == []


DATASET_CASES: dict[str, tuple[dict[str, object], str]] = {
    "split is no number": ({"split": "a,b"}, "split must be one to three numbers .*got 'a,b'"),
    "split of four": ({"split": "1,1,1,1"}, "split must be one to three numbers"),
    "empty split": ({"split": ""}, "split must be one to three numbers"),
    "infinite split": ({"split": "inf,1"}, "split must be one to three numbers"),
    "negative split": ({"split": "2,-1"}, "no negative share"),
    "split of zeros": ({"split": "0,0,0"}, "at least one above zero"),
    "part without documents": (
        {"split": "949,50,1", "num_samples": (1, 1, 1)},
        "the valid part of .* is empty: split 949,50,1 of 2 documents leaves it none",
    ),
    "part too short": (
        {"split": "1,1", "num_samples": (1, 1, 0), "seq_length": 2},
        r"the valid part of .* has 2 tokens in 1 documents, but one sample takes 3",
    ),
    "corpus shorter than a sample": (
        {"split": "1", "seq_length": 5},
        "the train part of .* has 5 tokens in 2 documents, but one sample takes 6",
    ),
    "length of one": ({"seq_length": 1}, "seq_length must be at least 2 .*got 1"),
    "length is no integer": ({"seq_length": 2.5}, "seq_length must be an integer, got 2.5"),
    "negative samples": ({"num_samples": (-1, 0, 0)}, "num_samples of train must be at least 0"),
    "two numbers of samples": ({"num_samples": (1, 0)}, "num_samples needs a number for each"),
    "negative seed": ({"seed": -1}, "seed must be at least 0 .*got -1"),
    "samples beyond the index": (
        {"num_samples": (2**31, 0, 0), "split": "1"},
        "2147483648 train samples would take .* the limit is 2147483647: ask for fewer",
    ),
    "vocabulary too small": (
        {"vocab_size": 5},
        "holds token id 5, but the model's vocabulary has 5",
    ),
    "cache cannot be written": (
        {"cache_dir": "/proc/nowhere", "split": "1"},
        "/proc/nowhere.*choose another",
    ),
}


@pytest.mark.parametrize("name", DATASET_CASES)
def test_dataset_refuses(tmp_path: Path, name: str) -> None:
    changes, message = DATASET_CASES[name]
    options = {"seq_length": 2, "split": "1", "num_samples": (1, 0, 0), **changes}
    with pytest.raises(DataError, match=message):
        build_pretrain_datasets(a_store(tmp_path), **options)
    assert not (tmp_path / "index-cache").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0, "batch_size": 1}, "num_samples must be at least 1"),
        ({"num_samples": 9, "batch_size": 0}, "batch_size must be at least 1"),
        ({"num_samples": 9, "batch_size": 1, "rank": 2, "num_ranks": 2}, "rank must be .* most 1"),
        ({"num_samples": 9, "batch_size": 1, "consumed_samples": 10}, "at most 9, got 10"),
    ],
)
def test_sampler_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ResumableSampler(**options)


def test_store_of_another_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_model)]
    assert main([*arguments, "--output_prefix", str(tmp_path / "c")]) == 0
    store = TokenStore.open(tmp_path / "c")
    store.check_vocab(700, fingerprint=load_tokenizer(tiny_model).fingerprint)
    with pytest.raises(DataError, match=r"made with another tokenizer \(tokenizer.model\)"):
        store.check_vocab(700, fingerprint="0" * 64)


def content(name: str, data: bytes) -> Callable[[Path, Path], Path]:
    def make(directory: Path, model: Path) -> Path:
        del model
        (directory / name).write_bytes(data)
        return directory / name

    return make


def cut(directory: Path, model: Path) -> Path:
    data = (model / "tokenizer.model").read_bytes()
    (directory / "tokenizer.model").write_bytes(data[: len(data) // 2])
    return directory


def with_config(name: str, value: object) -> Callable[[Path, Path], Path]:
    def make(directory: Path, model: Path) -> Path:
        (directory / "tokenizer.model").write_bytes((model / "tokenizer.model").read_bytes())
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / name).write_text(text)
        return directory

    return make


TOKENIZER_CASES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nothing there": (
        lambda d, _: d / "meta-llama" / "Llama-2-7b",
        r"no tokenizer at .*meta-llama/Llama-2-7b: it must be a local .* \(nothing is downloaded\)",
    ),
    "empty directory": (lambda d, _: d, "holds no tokenizer: none of tokenizer.model"),
    "empty file": (content("tokenizer.model", b""), "tokenizer.model is empty"),
    "git lfs pointer": (
        content("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer",
    ),
    "some other file": (content("x.model", b"\x89PNG"), "is no tokenizer file: it begins with"),
    "sentencepiece cut off": (cut, "is not a sentencepiece model, or is damaged"),
    "tiktoken line": (
        content("t.model", b"IQ== 0\n!!! 1\n"),
        "t.model:2: expected a base64 token and its rank, got b'!!! 1'",
    ),
    "tiktoken ranks": (
        content("t.model", b"IQ== 0\nIg== 2\n"),
        "t.model:2: expected a new token with rank 1",
    ),
    "tiktoken cut off": (content("t.model", b"IQ== 0\nIg== 1\n"), "has no token for byte 0x00"),
    "tokenizer.json": (content("tokenizer.json", b'{"a": 1}'), "is not a tokenizer.json"),
    "config": (
        with_config("tokenizer_config.json", "{"),
        "tokenizer_config.json is not valid JSON",
    ),
    "config is a list": (with_config("tokenizer_config.json", []), "must hold a JSON object"),
    "added tokens": (
        with_config("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}),
        "added_tokens_decoder must look like",
    ),
    "added token of another model": (
        with_config("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<x>"}}}),
        "calls id 9 '<x>', the model file '<0x06>': the two do not belong together",
    ),
    "gap before added tokens": (
        with_config("tokenizer_config.json", {"added_tokens_decoder": {"705": {"content": "<x>"}}}),
        "adds tokens but none with id 700, right after the 700 pieces",
    ),
    "eos id": (
        with_config("generation_config.json", {"eos_token_id": ["a"]}),
        "token ids must be integers, got",
    ),
    "template": (with_config("chat_template.jinja", "{% if %}"), "not valid Jinja, line 1"),
}


@pytest.mark.parametrize("name", TOKENIZER_CASES)
def test_tokenizer_refuses(tmp_path: Path, tiny_model: Path, name: str) -> None:
    make, message = TOKENIZER_CASES[name]
    path = make(tmp_path, tiny_model)
    with pytest.raises(DataError, match=message):
        load_tokenizer(path).render_chat([{"role": "user", "content": "a"}])


TEXT_CASES: dict[str, tuple[Callable[[Tokenizer], object], str]] = {
    "bytes": (lambda t: t.encode(b"a"), "text must be a str, not bytes"),
    "lone surrogate": (lambda t: t.encode("ab\ud800"), r"lone surrogate U\+D800 at character 2"),
    "surrogate in a batch": (lambda t: t.encode_batch(["a", "\udfff"]), r"U\+DFFF"),
    "no workers": (lambda t: t.encode_batch(["a"], workers=0), "workers must be at least 1, got 0"),
    "id too large": (lambda t: t.decode([700]), "token id 700 is not in the vocabulary of"),
    "negative id": (lambda t: t.stream().push(-1), "token id -1 is not in the vocabulary of"),
    "no template": (
        lambda t: t.apply_chat_template([{"role": "user", "content": "a"}]),
        "has no chat template: put a chat_template.jinja beside it, or ask",
    ),
}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_text_is_refused(tiny: Tokenizer, name: str) -> None:
    call, message = TEXT_CASES[name]
    with pytest.raises(DataError, match=message):
        call(tiny)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list such as"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] must be an object, not str"),
        ([{"content": "a"}], r'messages\[0\] needs a "role"'),
        (
            [{"role": "user", "content": 3}],
            r'messages\[0\] needs a "content" \(a string\), got int',
        ),
        ([{"role": "assistant", "content": "a"}], "turns must alternate user, assistant"),
    ],
)
def test_messages_are_refused(tiny_model: Path, messages: object, message: str) -> None:
    chat = load_tokenizer(tiny_model, chat_template="llama2")
    with pytest.raises(DataError, match=message):
        chat.apply_chat_template(messages)


def test_unknown_template_is_refused(tiny_model: Path) -> None:
    with pytest.raises(DataError, match="unknown chat template 'lama2': choose llama2, llama3"):
        load_tokenizer(tiny_model, chat_template="lama2")


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (["a b c"], 259, "vocab_size must be above 259"),
        ([], 300, "there is no text to train a tokenizer on"),
        ([" \n "], 300, "there is no text"),
        (["abc abc"], 4000, "a vocabulary of 4000 pieces cannot be trained on 1 lines of text"),
    ],
)
def test_training_refuses(tmp_path: Path, texts: list[str], size: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_sentencepiece(texts, size, tmp_path / "tokenizer.model")
    assert list(tmp_path.iterdir()) == []


CLI_CASES: dict[str, tuple[dict[str, object], list[str], str]] = {
    "unknown flag": ({}, ["--appendeos"], "unknown flag --appendeos: did you mean --append_eos?"),
    "unknown flag with value": (
        {},
        ["--worker=2"],
        "unknown flag --worker: did you mean --workers?",
    ),
    "missing file": ({"--input": "no.txt"}, [], "no such file or directory: no.txt"),
    "empty glob": ({"--input": "no/*.txt"}, [], "no file matches no/*.txt"),
    "directory without text": ({"--input": "pictures"}, [], "has no file ending in .jsonl"),
    "empty file": ({"--input": "empty.txt"}, [], "the input is empty: empty.txt hold(s) 0 bytes"),
    "blank file": ({"--input": "blank.txt"}, [], "the input gave no tokens: 1 file(s), 4 bytes"),
    "unknown ending": ({"--input": "a.xyz"}, [], "a.xyz: unknown ending '.xyz'; known are .jsonl"),
    "compressed": ({"--input": "a.jsonl.gz"}, [], "is compressed: unpack it first (`gzip -dk"),
    "json array": ({"--input": "array.json"}, [], "is one JSON array, not JSON lines"),
    "not UTF-8": ({"--input": "latin.txt"}, [], "latin.txt:2: not UTF-8 at byte 1 (0xe9)"),
    "UTF-16": (
        {"--input": "utf16.txt"},
        [],
        "utf16.txt:1: holds a NUL byte: binary data, or UTF-16",
    ),
    "device": ({"--input": "/dev/null"}, [], "/dev/null is not a regular file"),
    "no tokenizer": ({"--tokenizer": "no"}, [], "no tokenizer at no: it must be a local directory"),
    "no workers": ({"--workers": "0"}, [], "--workers must be at least 1, got 0"),
    "workers no number": ({"--workers": "two"}, [], "argument --workers: invalid int value: 'two'"),
    "unknown format": ({"--format": "arrow"}, [], "argument --format: invalid choice: 'arrow'"),
    "output is a directory": ({"--output_prefix": "pictures"}, [], "is a directory: add a name"),
    "output below a file": (
        {"--output_prefix": "good.txt/x"},
        [],
        "writing good.txt/.x.journal failed: Not a directory",
    ),
    "type too small": (
        {"--tokenizer": "large", "--dtype": "uint16"},
        [],
        "a vocabulary of 70000 ids does not fit into uint16",
    ),
    "no BOS": (
        {"--tokenizer": "large"},
        ["--prepend_bos"],
        "has no BOS token, so none can be added",
    ),
    "store exists": ({"--output_prefix": "made"}, [], "made.idx exists already: choose another"),
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs, good and bad."""
    import tokenizers

    monkeypatch.chdir(tmp_path)
    for name, data in {
        "good.txt": b"hello\n",
        "empty.txt": b"",
        "blank.txt": b" \n \n",
        "a.xyz": b"hello",
        "a.jsonl.gz": b"\x1f\x8b",
        "array.json": b'[{"text": "a"}]',
        "latin.txt": b"good\nb\xe9d\n",
        "utf16.txt": "hello\n".encode("utf-16"),
        "pictures/a.png": b"\x89PNG",
        "made.idx": b"",
    }.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(data)
    words = {f"w{i}": i for i in range(70000)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    Path("large").mkdir()
    tokenizers.Tokenizer(model).save("large/tokenizer.json")
    return tmp_path


@pytest.mark.parametrize("name", CLI_CASES)
def test_prepare_refuses(
    workplace: Path, tiny_model: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    del workplace
    changes, flags, message = CLI_CASES[name]
    options = {"--input": "good.txt", "--tokenizer": str(tiny_model), "--output_prefix": "out"}
    arguments = [str(part) for pair in {**options, **changes}.items() for part in pair]
    assert main([*arguments, *flags]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("error: ")
    assert not Path("out.idx").exists()


def test_settings_of_an_unfinished_run_are_kept(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(json.dumps({"text": "word " * 2000}) + "\n" for _ in range(60))
    (tmp_path / "a.jsonl").write_text(lines + "broken\n")
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(tiny_model)]
    arguments += ["--output_prefix", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "a.jsonl:61: not JSON" in capsys.readouterr().err
    assert main([*arguments, "--append_eos"]) == 2
    error = capsys.readouterr().err
    assert "unfinished run with other settings (append_eos was false, is true)" in error
    # What to do with bad lines does not change what is done already.
    assert main([*arguments, "--on_bad_line", "skip"]) == 0
    assert TokenStore.open(tmp_path / "out").num_documents == 60
    assert main([*arguments, "--append_eos", "--on_bad_line", "skip"]) == 2
    assert main([*arguments, "--append_eos", "--on_bad_line", "skip", "--overwrite"]) == 0
    assert TokenStore.open(tmp_path / "out").meta["append_eos"] is True


def test_a_damaged_journal_is_said(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / ".out.journal").write_bytes(b"{}\nwhat\n")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_model)]
    assert main([*arguments, "--output_prefix", str(tmp_path / "out")]) == 2
    assert "journal is damaged" in capsys.readouterr().err
