"""The samples that ship, the tasks that are made, and how a task's files are found."""

import json
from pathlib import Path

import pytest
from commands import status

from common.errors import DataError
from data.conversations.instruct import read_examples
from data.conversations.instruct_dataset import InstructDataset, Limits
from data.conversations.instruct_store import open_instruct, write_instruct_store
from data.conversations.make_task import KINDS, RULES, main, make_task
from data.conversations.preference import PreferenceDataset, read_pairs
from data.conversations.tasks import TASKS, calibration_files, find_task
from data.tokenizer import load_tokenizer


def test_samples_are_sound() -> None:
    tokenizer = load_tokenizer("__internal_testing__/tiny-random-llama")
    for name in TASKS:
        files = find_task(name)
        assert files.built_in and files.format == TASKS[name]
        if name == "preference":
            train, dev = read_pairs(files.train), read_pairs(files.dev)
            assert len(PreferenceDataset(train, tokenizer)) == len(train)
            questions = [{pair.chosen[0]["content"] for pair in part} for part in (train, dev)]
        else:
            train, dev = (read_examples(f, format=files.format) for f in (files.train, files.dev))
            both = InstructDataset.from_examples([*train, *dev], tokenizer)
            assert len(both) == len(train) + len(dev)
            questions = [{e.messages[0]["content"] for e in part} for part in (train, dev)]
        assert 40 <= len(train) <= 200 and len(dev) == 12
        assert len(questions[0]) == len(train) and not questions[0] & questions[1]
        assert sum(path.stat().st_size for path in files.train + files.dev) < 50_000


def test_squad_samples_have_the_layout() -> None:
    for path in (*find_task("squad").train, *find_task("squad").dev):
        content = json.loads(path.read_text())
        ids = []
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    ids.append(qa["id"])
                    for answer in qa["answers"]:
                        start = answer["answer_start"]
                        stop = start + len(answer["text"])
                        assert paragraph["context"][start:stop] == answer["text"]
        assert len(ids) == len(set(ids))


def test_files_of_ones_own(tmp_path: Path) -> None:
    def put(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"src": "q", "tgt": "a"}))
        return path

    train, dev = put("a/train.jsonl"), put("a/validation.json")
    put("a/test.jsonl")
    put("a/training_notes.json")
    found = find_task("anything", dataset_path=tmp_path / "a")
    assert (found.train, found.dev, found.built_in) == ([train], [dev], False)
    assert find_task("squad", "a", tmp_path).train == [train]
    assert find_task(None, dataset_path=train).train == [train]
    assert find_task(None, dataset_path=train).dev == []
    assert find_task("preference", dataset_path=tmp_path / "a").format == "preference"
    shards = [put(f"b/train-0000{n}-of-00002.parquet") for n in (0, 1)]
    old = put("b/dev-v1.1.json")
    found = find_task(None, dataset_path=tmp_path / "b")
    assert (found.train, found.dev) == (shards, [old])
    single = put("c/everything.csv")
    assert find_task(None, dataset_path=tmp_path / "c").train == [single]


def test_the_directories_of_paddlenlp(tmp_path: Path) -> None:
    def put(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"src": "q", "tgt": "a"}))
        return path

    train, dev = [put(f"a/train/{n}.json") for n in (1, 2)], put("a/dev/1.json")
    put("a/train/notes.md")
    found = find_task(None, dataset_path=tmp_path / "a")
    assert (found.train, found.dev) == (train, [dev])
    assert calibration_files(tmp_path / "a") == train
    quant = put("a/quant.json")
    assert calibration_files(tmp_path / "a") == [quant] and calibration_files(dev) == [dev]
    other = put("other.json")
    assert find_task(None, None, tmp_path / "a", other).dev == [other]
    assert find_task(None, None, other, dev).dev == [dev]
    put("a/train.json")
    with pytest.raises(DataError, match=r"its part 'train' twice, as train\.json and as the dir"):
        find_task(None, dataset_path=tmp_path / "a")
    with pytest.raises(DataError, match=r"dev_dataset_path .* is a directory"):
        find_task(None, None, other, tmp_path / "a")
    with pytest.raises(DataError, match="nothing is at dev_dataset_path"):
        find_task(None, None, other, tmp_path / "nowhere.json")


def test_prepared_stores_are_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("__internal_testing__/tiny-random-llama")
    examples = read_examples(find_task("alpaca").dev)
    dataset = InstructDataset.from_examples(examples, tokenizer)
    for name in ("train", "dev"):
        write_instruct_store(tmp_path / name, dataset, Limits())
    found = find_task("alpaca", dataset_path=tmp_path)
    assert (found.train, found.dev) == ([tmp_path / "train"], [tmp_path / "dev"])
    assert find_task(None, dataset_path=tmp_path / "dev").train == [tmp_path / "dev"]
    assert open_instruct(found.train, tokenizer).fingerprint() == dataset.fingerprint()


@pytest.mark.parametrize("name", RULES)
def test_made_tasks(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--name", name, "--output_dir", str(tmp_path / "a"), "--train", "300"]
    assert status(main, [*arguments, "--dev", "50", "--seed", "7"]) == 0
    said = capsys.readouterr().out.split()
    assert said == [str(tmp_path / "a" / "train.jsonl"), str(tmp_path / "a" / "dev.jsonl")]
    again = make_task(name, tmp_path / "b", train=300, dev=50, seed=7)
    other = make_task(name, tmp_path / "c", train=300, dev=50, seed=8)
    for one, two, three in zip(said, again, other, strict=True):
        assert Path(one).read_bytes() == two.read_bytes() != three.read_bytes()
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in again]
    assert [len(part) for part in rows] == [300, 50]
    asked = [{row["input"] for row in part} for part in rows]
    assert len(asked[0]) == 300 and len(asked[1]) == 50 and not asked[0] & asked[1]
    rules = {
        "last-word": lambda words: words[-1],
        "copy": " ".join,
        "reverse": lambda words: " ".join(words[::-1]),
        "kinds": lambda words: next(k for k, named in KINDS.items() if {*words} <= set(named)),
        "keyword": lambda words: next(k for k, named in KINDS.items() if set(named) & {*words}),
    }
    for row in rows[0] + rows[1]:
        assert row["output"] == rules[name](row["input"].rstrip(".").split())
    assert len(read_examples([tmp_path / "a" / "dev.jsonl"])) == 50
    if name in ("keyword", "kinds"):
        kinds = [row["output"] for row in rows[1]]
        assert all(kinds.count(kind) > 5 for kind in KINDS)
