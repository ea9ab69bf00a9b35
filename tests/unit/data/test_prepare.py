"""`python -m data.prepare`: what becomes a document, the same bytes however it ran, bad lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import status

from common.errors import DataError
from data.corpus import prepare_job, prepare_worker
from data.corpus.prepare_job import Journal
from data.corpus.token_store import TokenStore
from data.corpus.token_store_writer import TokenStoreWriter
from data.prepare import main, prepare
from data.tokenizer import Tokenizer

REPO = Path(__file__).resolve().parents[3]
STORE_FILES = (".bin", ".idx", "_ids.npy", "_idx.npz", ".meta.json", ".bad_lines.txt")


def run(prefix: Path, tokenizer: Path, *inputs: Path, flags: tuple[str, ...] = ()) -> TokenStore:
    arguments = ["--input", *map(str, inputs), "--tokenizer", str(tokenizer)]
    prepare([*arguments, "--output_prefix", str(prefix), *flags])
    return TokenStore.open(prefix)


def texts_of(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(store.document(i)) for i in range(store.num_documents)]


def store_bytes(prefix: Path) -> dict[str, bytes]:
    files = {suffix: prefix.with_name(prefix.name + suffix) for suffix in STORE_FILES}
    return {suffix: path.read_bytes() for suffix, path in files.items() if path.exists()}


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name[0] == "."]


@pytest.fixture
def corpus(tmp_path: Path, prose: list[str]) -> list[Path]:
    """JSON lines and plain text, larger than several pieces."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(prose)]
    (directory / "a.jsonl").write_text("\n".join(lines * 3) + "\n")
    (directory / "b.jsonl").write_text("\n".join(lines[::2]))
    (directory / "c.txt").write_text("\n\n\n".join(prose))
    return sorted(directory.iterdir())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_worker, "SMALLEST_PIECE", 1 << 15)
    monkeypatch.setattr(prepare_worker, "LARGEST_PIECE", 1 << 15)
    monkeypatch.setattr(prepare_job, "SAVE_SECONDS", 0)


def test_ids_are_the_tokenizers_own(
    tmp_path: Path, tiny: Tokenizer, tiny_model: Path, prose: list[str]
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"content": text}) for text in prose))
    flags = ("--json_key", "content", "--append_eos", "--prepend_bos")
    store = run(tmp_path / "out", tiny_model, source, flags=flags)
    expected = [tiny.encode(text, add_bos=True, add_eos=True) for text in prose]
    assert [store.document(i).tolist() for i in range(store.num_documents)] == expected
    assert store.meta["tokenizer_fingerprint"] == tiny.fingerprint
    assert store.meta["append_eos"] is True


def test_what_is_a_document_in_text(tmp_path: Path, tiny: Tokenizer, tiny_model: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \t\nthree  \r\n\r\n\n\nfour")
    for kind, expected in {
        "blank_line": ["one\ntwo", "three  ", "four"],
        "line": ["one", "two", "three  ", "four"],
        "file": ["one\ntwo\n\n \t\nthree  \n\n\n\nfour"],
    }.items():
        store = run(tmp_path / kind, tiny_model, source, flags=("--txt_documents", kind))
        assert texts_of(store, tiny) == expected


WIKITEXT = """ \n = First = \n \n Text of it . \n = not a title = here \n \n = = Part = = \n
 \n More @-@ text . \n \n = Second one = \n \n Other . \n \n \n"""


def test_what_is_a_document_in_wikitext(tmp_path: Path, tiny: Tokenizer, tiny_model: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text(WIKITEXT)
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    for name in ("wiki.train.tokens", "wiki.txt"):
        store = run(tmp_path / name.replace(".", "_"), tiny_model, tmp_path / name)
        first, second = texts_of(store, tiny)
        assert first.startswith(" = First = \n")
        assert "= = Part = =" in first
        assert "= not a title = here" in first
        assert second.startswith(" = Second one = \n")


def test_wikitext_articles(
    shared_data: Path, tmp_path: Path, tiny: Tokenizer, tiny_model: Path
) -> None:
    """WikiText-2's validation set has 60 articles; nothing of the text is lost."""
    source = shared_data / "wikitext2.valid.txt"
    store = run(tmp_path / "wiki", tiny_model, source)
    assert store.num_documents == 60
    texts = texts_of(store, tiny)
    assert "\n".join(texts).split() == source.read_text().split()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("layout", ["bin", "npy"])
def test_any_number_of_workers_and_any_pieces_give_the_same_bytes(
    tmp_path: Path,
    corpus: list[Path],
    tiny_model: Path,
    layout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ("--append_eos", "--format", layout)
    run(tmp_path / "one", tiny_model, *corpus, flags=(*flags, "--workers", "1"))
    run(tmp_path / "three", tiny_model, *corpus, flags=(*flags, "--workers", "3"))
    monkeypatch.setattr(prepare_worker, "SMALLEST_PIECE", 1 << 20)
    monkeypatch.setattr(prepare_worker, "LARGEST_PIECE", 1 << 20)
    run(tmp_path / "large", tiny_model, *corpus, flags=(*flags, "--workers", "1"))
    expected = store_bytes(tmp_path / "one")
    assert len(expected) == 3
    assert store_bytes(tmp_path / "three") == expected
    assert store_bytes(tmp_path / "large") == expected
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("layout", ["bin", "npy"])
@pytest.mark.parametrize("where", ["advance", "add_documents", "flush", "_write_index"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path,
    corpus: list[Path],
    tiny_model: Path,
    layout: str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 1}\n' + corpus[0].read_text() + "not json\n")
    flags = ("--format", layout, "--workers", "2", "--on_bad_line", "skip")
    run(tmp_path / "whole", tiny_model, bad, *corpus, flags=flags)
    owner = Journal if where == "advance" else TokenStoreWriter
    original = getattr(owner, where)
    calls = []

    def stop(self: object, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 4 or where == "_write_index":
            raise KeyboardInterrupt
        return original(self, *arguments)

    arguments = ["--input", str(bad), *map(str, corpus), "--tokenizer", str(tiny_model)]
    arguments += ["--output_prefix", str(tmp_path / "part"), *flags]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, stop)
        assert status(main, arguments) == 130
    assert "goes on" in capsys.readouterr().err
    with pytest.raises(DataError):
        TokenStore.open(tmp_path / "part")
    assert status(main, arguments) == 0
    assert store_bytes(tmp_path / "part") == store_bytes(tmp_path / "whole")
    assert leftovers(tmp_path) == []


def test_killed_for_good_and_resumed(tmp_path: Path, tiny_model: Path, prose: list[str]) -> None:
    """kill -9 in the middle: its workers end by themselves, and the rest follows."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": t * 9}) + "\n" for t in prose for _ in range(9)))
    code = (
        "import data.corpus.prepare_job as job, data.prepare as p; job.SAVE_SECONDS = 0; p.main()"
    )
    command = [sys.executable, "-c", code, "--input", str(source), "--workers", "2"]
    command += ["--tokenizer", str(tiny_model), "--output_prefix", str(tmp_path / "part")]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL) as process:
        journal = tmp_path / ".part.journal"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    assert not (tmp_path / "part.idx").exists()
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    run(tmp_path / "whole", tiny_model, source)
    assert store_bytes(tmp_path / "part") == store_bytes(tmp_path / "whole")
    assert done >= 2
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_killed_between_the_last_steps(
    tmp_path: Path,
    corpus: list[Path],
    tiny_model: Path,
    stop_at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens, meta and index get their names one after the other, then the journal goes."""
    run(tmp_path / "whole", tiny_model, corpus[0])
    replace, unlink, steps = Path.replace, Path.unlink, []

    def stopping_replace(self: Path, target: Path) -> Path:
        steps.append(target)
        if len(steps) == stop_at:
            raise KeyboardInterrupt
        return replace(self, target)

    def stopping_unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name.endswith(".journal"):
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping_replace)
        patch.setattr(Path, "unlink", stopping_unlink)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part", tiny_model, corpus[0])
    assert len(steps) == min(stop_at, 3)
    run(tmp_path / "part", tiny_model, corpus[0])
    assert store_bytes(tmp_path / "part") == store_bytes(tmp_path / "whole")
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_said_and_the_run_goes_on_later(
    tmp_path: Path,
    corpus: list[Path],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_pieces: None,
) -> None:
    del small_pieces
    run(tmp_path / "whole", tiny_model, *corpus)
    original, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(1)
        if len(calls) > 13:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"no space is left on the disk .* goes on from where"):
            run(tmp_path / "part", tiny_model, *corpus)
    assert not (tmp_path / "part.idx").exists()
    run(tmp_path / "part", tiny_model, *corpus)
    assert store_bytes(tmp_path / "part") == store_bytes(tmp_path / "whole")


BAD_LINES = {
    b"{not json": "not JSON: Expecting property name",
    b'{"text": "a"': "not JSON",
    b"[1, 2]": "a JSON array, not an object",
    b"null": "a JSON null, not an object",
    b'{"body": "a", "id": 3}': r"no key 'text' \(its keys: 'body', 'id'\)",
    b"{}": r"no key 'text' \(its keys: none\)",
    b'{"text": 3}': "the value of 'text' is a JSON number, not a string",
    b'{"text": null}': "is a JSON null, not a string",
    b'{"text": ["a"]}': "is a JSON array, not a string",
    b'{"text": "\xff\xfe"}': r"not UTF-8 at byte 10 \(0xff\)",
    b'{"text": "a\x00"}': "holds a NUL byte",
    b'{"text": "a\\u0000"}': r"the text holds a NUL character",
    b'{"text": "a\\ud800b"}': r"the text holds the lone surrogate \\ud800",
    b"[" * 20000: "not JSON: maximum recursion depth",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_an_error_with_its_place(
    tmp_path: Path, tiny_model: Path, line: bytes
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError, match=f"a.jsonl:3: .*{BAD_LINES[line]}"):
        run(tmp_path / "out", tiny_model, source)
    assert not list(tmp_path.glob("out*"))
    store = run(tmp_path / "out", tiny_model, source, flags=("--on_bad_line", "skip"))
    assert store.num_documents == 2
    assert (tmp_path / "out.bad_lines.txt").read_text().startswith(f"{source}:3: ")


@pytest.mark.usefixtures("small_pieces")
def test_bad_lines_are_counted_and_numbered_across_pieces(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = []
    expected = []
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps({"text": f"line {i} " * 9}) for i in range(1, 1000)]
        for number in (1, 77, 500, 999):
            lines[number - 1] = "broken"
            expected.append(f"{tmp_path / name}:{number}")
        (tmp_path / name).write_text("\n".join(lines))
        names.append(tmp_path / name)
    (tmp_path / "c.txt").write_bytes(b"good\nb\xe9d\n\ngood\n")
    expected.append(f"{tmp_path / 'c.txt'}:2")
    flags = ("--on_bad_line", "skip", "--workers", "2")
    store = run(tmp_path / "out", tiny_model, *names, tmp_path / "c.txt", flags=flags)
    assert store.num_documents == 2 * 995 + 2
    report = (tmp_path / "out.bad_lines.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in report] == expected
    assert "9 bad lines were left out, listed in" in capsys.readouterr().out


def test_blank_documents_are_counted(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "a"}\n{"text": " \\n"}\n')
    store = run(tmp_path / "out", tiny_model, tmp_path / "a.jsonl", flags=("--append_eos",))
    assert store.num_documents == 1
    assert "2 blank documents were left out" in capsys.readouterr().out


def test_directories_and_globs(
    tmp_path: Path, tiny: Tokenizer, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("bee")
    (folder / "a.jsonl").write_text('{"text": "ay"}')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    store = run(tmp_path / "dir", tiny_model, tmp_path / "in")
    assert texts_of(store, tiny) == ["bee", "ay"]
    assert "passed over 1 other, hidden or repeated files" in capsys.readouterr().out
    # Given twice, read once.
    pattern = Path(f"{tmp_path}/in/**/*.jsonl")
    store = run(tmp_path / "glob", tiny_model, pattern, folder / "a.jsonl")
    assert texts_of(store, tiny) == ["ay"]


def test_help_teaches() -> None:
    begin = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "data.prepare", "--help"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - begin < 10
    for word in ("examples:", "--on_bad_line", "kill -9", "run_pretrain.py --input_dir"):
        assert word in result.stdout


def test_paddle_is_not_imported() -> None:
    code = (
        "import sys, data.prepare, data.tokenizer, data.corpus.pretrain_dataset\n"
        "import data.tokenization.training\n"
        "assert not {'paddle', 'paddlenlp', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
