"""Commands leave what lies there until what takes its place is whole, or refuse."""

import json
from pathlib import Path

import pytest

from data.conversations import instruct_store
from data.conversations.convert_instruct import main as convert_main
from data.conversations.make_task import main as task_main
from data.corpus.prepare_job import Job
from data.corpus.token_store import TokenStore
from data.corpus.token_store_writer import TokenStoreWriter
from data.prepare import main as prepare_main
from tests.unit.data.commands import status

PAIR = {"instruction": "i", "input": "", "output": "o"}


def contents(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["same", "link", "hard link", "directory"])
def test_a_conversion_does_not_replace_its_source(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "a.json", tmp_path / "a.json"
    source.write_text(json.dumps([PAIR]))
    given = source
    if form == "link":
        output = tmp_path / "b.json"
        output.symlink_to(source)
    elif form == "hard link":
        output = tmp_path / "b.json"
        output.hardlink_to(source)
    elif form == "directory":
        given = tmp_path
    before = contents(tmp_path)
    assert status(convert_main, ["--input", str(given), "--output", str(output)]) == 2
    assert "is the input" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_task_does_not_replace_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--name", "copy", "--output_dir", str(tmp_path), "--train", "9", "--dev", "2"]
    assert status(task_main, words) == 0
    assert status(task_main, words) == 0  # the same again
    before = contents(tmp_path)
    assert status(task_main, [*words, "--seed", "3"]) == 2
    assert "train.jsonl holds something else already" in capsys.readouterr().err
    assert contents(tmp_path) == before
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "dev.jsonl").write_text("mine, no JSON")
    assert status(task_main, words) == 2
    assert (tmp_path / "dev.jsonl").read_text() == "mine, no JSON"
    assert not (tmp_path / "train.jsonl").exists()


def arguments(place: Path, model: Path, task: str, text: str) -> list[str]:
    source = place / "source.jsonl"
    record = {"text": text} if task == "pretrain" else {**PAIR, "output": text}
    source.write_text(json.dumps(record) + "\n")
    words = ["--task", task, "--input", str(source), "--tokenizer", str(model)]
    words += ["--output_prefix", str(place / "made"), "--overwrite"]
    return [*words, "--chat_template", "simple"] if task == "instruct" else words


@pytest.mark.parametrize("layout", ["bin", "npy"])
@pytest.mark.parametrize("task", ["pretrain", "instruct"])
def test_an_old_store_stays_until_the_new_one_is_whole(
    task: str, layout: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = arguments(tmp_path, tiny_model, task, "the first text")
    assert status(prepare_main, [*words, "--format", "bin"]) == 0
    first = TokenStore.open(tmp_path / "made").tokens.tolist()
    words = [*arguments(tmp_path, tiny_model, task, "another text"), "--format", layout]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    points = [(TokenStoreWriter, "finish"), (TokenStoreWriter, "_write_index")]
    if task == "pretrain":
        points += [(Job, "_pieces"), (Job, "run")]
    for owner, name in points:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            assert status(prepare_main, words) != 0
        assert TokenStore.open(tmp_path / "made").tokens.tolist() == first, name
    # Input that cannot be used leaves it alone too.
    source = tmp_path / "source.jsonl"
    good = source.read_text()
    source.write_text("{\n")
    assert status(prepare_main, words) == 2
    assert TokenStore.open(tmp_path / "made").tokens.tolist() == first
    source.write_text(good)
    assert status(prepare_main, words) == 0
    store = TokenStore.open(tmp_path / "made")
    assert store.tokens.tolist() != first and store.layout == layout
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    other = {"bin": ".npy", "npy": ".bin"}[layout]
    assert not [path.name for path in tmp_path.iterdir() if path.suffix == other]


def test_a_run_killed_with_all_pieces_done_is_not_taken_for_the_old_store(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says that all is read; the index that lies there is the old one's."""
    words = arguments(tmp_path, tiny_model, "pretrain", "the first text")
    assert status(prepare_main, words) == 0
    first = TokenStore.open(tmp_path / "made").tokens.tolist()
    words = arguments(tmp_path, tiny_model, "pretrain", "another text")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenStoreWriter, "finish", stop)
        assert status(prepare_main, words) != 0
    words.remove("--overwrite")
    assert status(prepare_main, words) == 0
    assert TokenStore.open(tmp_path / "made").tokens.tolist() != first


STOPS = {
    # Where it stops, what stands there already: what the line advises, words to drop, words to add.
    "pieces": ("pretrain", (TokenStoreWriter, "finish"), False, "goes on from where", "", ""),
    "pieces, older": (
        "pretrain",
        (TokenStoreWriter, "finish"),
        True,
        "without --overwrite, goes on from where",
        "--overwrite",
        "",
    ),
    "text, before": ("pretrain", (Job, "run"), False, "the same command starts again", "", ""),
    "examples": ("instruct", (TokenStoreWriter, "finish"), False, "command starts again", "", ""),
    "examples, older": (
        "instruct",
        (instruct_store, "remove_layout"),
        True,
        "the same command starts again",
        "",
        "",
    ),
    "examples, in part": (
        "instruct",
        (instruct_store, "remove_layout"),
        False,
        "may not be whole: the same command with --overwrite starts again",
        "",
        "--overwrite",
    ),
}


@pytest.mark.parametrize("at", STOPS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_a_stopped_command_advises_helps(
    at: str,
    error: type[BaseException],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task, (owner, name), older, advice, dropped, added = STOPS[at]
    if older:
        assert status(prepare_main, arguments(tmp_path, tiny_model, task, "an older text")) == 0
    words = arguments(tmp_path, tiny_model, task, "another text")
    if not older:
        words.remove("--overwrite")

    def stop(*_: object, **__: object) -> None:
        raise error(143)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        assert status(prepare_main, words) in (130, 143)
    said = capsys.readouterr().err
    assert said.count("stopped; ") == 1 and advice in said
    words = [*(word for word in words if word != dropped), *added.split()]
    assert status(prepare_main, words) == 0
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = arguments(tmp_path / "..", tiny_model, task, "another text")
    fresh = tmp_path / "fresh"
    again = [str(fresh) if word.endswith("/made") else word for word in again]
    assert status(prepare_main, again) == 0
    made = TokenStore.open(tmp_path / "made").tokens.tolist()
    assert made == TokenStore.open(fresh).tokens.tolist()
