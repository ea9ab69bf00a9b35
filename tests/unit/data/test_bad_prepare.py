"""Bad input to data.prepare: each case with the message a user sees."""

import json
from pathlib import Path

import pytest
from commands import status

from common.errors import DataError
from data.corpus.prepare_job import BadLines
from data.corpus.token_store import TokenStore
from data.prepare import main
from data.tokenizer import load_tokenizer

CLI_CASES: dict[str, tuple[dict[str, object], list[str], str]] = {
    "unknown flag": ({}, ["--appendeos"], "unknown 'appendeos'; did you mean 'append_eos'?"),
    "unknown flag with value": (
        {},
        ["--worker=2"],
        "unknown 'worker'; did you mean 'workers'?",
    ),
    "missing file": ({"--input": "no.txt"}, [], "no such file or directory: no.txt"),
    "empty glob": ({"--input": "no/*.txt"}, [], "no file matches no/*.txt"),
    "directory without text": ({"--input": "pictures"}, [], "has no file ending in .jsonl"),
    "empty file": ({"--input": "empty.txt"}, [], "the input is empty: empty.txt hold(s) 0 bytes"),
    "blank file": ({"--input": "blank.txt"}, [], "the input gave no tokens: 1 file(s), 4 bytes"),
    "unknown ending": ({"--input": "a.xyz"}, [], "a.xyz: unknown ending '.xyz'; known are .jsonl"),
    "compressed": ({"--input": "a.jsonl.gz"}, [], "is compressed: unpack it first (`gzip -dk"),
    "json array": (
        {"--input": "array.json"},
        [],
        "array.json:1: item 2: no key 'text' (its keys: 't')",
    ),
    "key twice": ({"--input": "twice.jsonl"}, [], "twice.jsonl:2: not JSON: the key 'text' stands"),
    "not UTF-8": ({"--input": "latin.txt"}, [], "latin.txt:2: not UTF-8 at byte 1 (0xe9)"),
    "UTF-16": (
        {"--input": "utf16.txt"},
        [],
        "utf16.txt:1: holds a NUL byte: binary data, or UTF-16",
    ),
    "device": ({"--input": "/dev/null"}, [], "/dev/null is not a regular file"),
    "no tokenizer": ({"--tokenizer": "no"}, [], "no tokenizer at no: it must be a local directory"),
    "no workers": ({"--workers": "0"}, [], "workers=0 but the minimum is 1"),
    "workers no number": ({"--workers": "two"}, [], "workers='two' is not a valid int"),
    "unknown format": ({"--format": "arrow"}, [], "format='arrow' is not one of bin, npy"),
    "output is a directory": ({"--output_prefix": "pictures"}, [], "is a directory: add a name"),
    "output below a file": (
        {"--output_prefix": "good.txt/x"},
        [],
        "a file stands where a directory is needed",
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
        "twice.jsonl": b'{"text": "a", "id": 1, "id": 2}\n{"text": "a", "text": "b"}\n',
        "array.json": b'[{"text": "a"}, {"t": 1}]',
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
    assert status(main, [*arguments, *flags]) == 2
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
    assert status(main, arguments) == 2
    assert "a.jsonl:61: not JSON" in capsys.readouterr().err
    assert status(main, [*arguments, "--append_eos"]) == 2
    error = capsys.readouterr().err
    assert "unfinished run with other settings (append_eos was false, is true)" in error
    # What to do with bad lines does not change what is done already.
    assert status(main, [*arguments, "--on_bad_line", "skip"]) == 0
    assert TokenStore.open(tmp_path / "out").num_documents == 60
    assert status(main, [*arguments, "--append_eos", "--on_bad_line", "skip"]) == 2
    assert status(main, [*arguments, "--append_eos", "--on_bad_line", "skip", "--overwrite"]) == 0
    assert TokenStore.open(tmp_path / "out").meta["append_eos"] is True


def test_a_damaged_journal_is_said(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / ".out.journal").write_bytes(b"{}\nwhat\n")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_model)]
    assert status(main, [*arguments, "--output_prefix", str(tmp_path / "out")]) == 2
    assert "journal is damaged" in capsys.readouterr().err


def test_store_of_another_tokenizer(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    arguments = ["--input", str(tmp_path / "a.txt"), "--tokenizer", str(tiny_model)]
    assert status(main, [*arguments, "--output_prefix", str(tmp_path / "c")]) == 0
    store = TokenStore.open(tmp_path / "c")
    store.check_vocab(700, fingerprint=load_tokenizer(tiny_model).fingerprint)
    with pytest.raises(DataError, match=r"made with another tokenizer \(tokenizer.model\)"):
        store.check_vocab(700, fingerprint="0" * 64)


def test_there_is_no_list_of_bad_lines_before_the_first(tmp_path: Path) -> None:
    path = tmp_path / "out.bad_lines.txt"
    path.write_text("of an earlier store\n")
    report = BadLines(path, 0)
    assert report.write([]) == 0
    report.flush()
    assert not path.exists()  # a killed run would leave it so
    assert report.write(["a:1: why"]) == 9
    report.close()
    again = BadLines(path, 9)
    assert again.write(["a:2: why"]) == 18
    again.close()
    assert path.read_text() == "a:1: why\na:2: why\n"
    with pytest.raises(DataError, match="was cut off or deleted"):
        BadLines(path, 19)
