"""Stores in shards, put together: byte for byte the store of one run; and stores that make none."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, UserError
from data import merge, prepare
from data.corpus import shards
from data.corpus.shards import Shard
from data.corpus.sources import open_sources
from data.corpus.token_store import StorePaths, TokenStore
from data.corpus.token_store_writer import TokenStoreWriter

TINY = "__internal_testing__/tiny-random-llama"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two files of lines of many lengths; one of them is no JSON."""
    random = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        lines = [
            json.dumps({"text": " ".join(f"word{n}" for n in random.integers(0, 99, size))})
            for size in random.integers(1, 60, 200)
        ]
        lines[150] = "no JSON"
        (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(place: Path, *words: str) -> None:
    common = ["--input", str(place / "in"), "--tokenizer", TINY, "--workers", "1"]
    prepare.main([*common, "--append_eos", "--on_bad_line", "skip", *words])


def files(prefix: Path) -> dict[str, bytes]:
    found = sorted(prefix.parent.glob(f"{prefix.name}.*"))
    return {file.name.removeprefix(prefix.name): file.read_bytes() for file in found}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_shards_make_the_store_of_one_run_byte_for_byte(text: Path, count: int) -> None:
    run(text, "--output_prefix", str(text / "whole"))
    for number in range(count, 0, -1):
        run(text, "--output_prefix", str(text / "parts"), "--shard", f"{number}/{count}")
    merge.main(["--input", str(text / "parts"), "--output_prefix", str(text / "parts")])
    whole, parts = files(text / "whole"), files(text / "parts")
    assert whole == parts and len(whole) == 4
    assert b"a.jsonl:151: " in whole[".bad_lines.txt"]
    assert b"b.jsonl:151: " in whole[".bad_lines.txt"]


def test_files_may_lie_elsewhere_on_each_machine(text: Path) -> None:
    (text / "other").mkdir()
    (text / "other" / "in").symlink_to(text / "in")
    run(text, "--output_prefix", str(text / "w"), "--shard", "1/2")
    run(text / "other", "--output_prefix", str(text / "w"), "--shard", "2/2")
    names = [str(Shard(number, 2).prefix(text / "w")) for number in (2, 1)]
    merge.main(["--input", *names, "--output_prefix", str(text / "w")])
    run(text, "--output_prefix", str(text / "whole"))
    assert files(text / "w")[".bin"] == files(text / "whole")[".bin"], "in the order of the input"


def test_a_shard_that_was_stopped_goes_on(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a file, whose earlier lines count in the list of bad ones."""
    run(text, "--output_prefix", str(text / "whole"))
    second = ["--output_prefix", str(text / "parts"), "--shard", "2/3"]
    add, calls = TokenStoreWriter.add_documents, []

    def stopped(self, ids, sizes):  # type: ignore[no-untyped-def]
        calls.append(len(ids))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return add(self, ids, sizes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenStoreWriter, "add_documents", stopped)
        run(text, *second)
    assert (text / ".parts-00002-of-00003.journal").is_file()
    for number in ("1", "2", "3"):
        run(text, "--output_prefix", str(text / "parts"), "--shard", f"{number}/3")
    merge.main(["--input", str(text / "parts"), "--output_prefix", str(text / "parts")])
    assert files(text / "whole") == files(text / "parts")


@pytest.mark.parametrize("words", ["0/2", "3/2", "1", "a/b", "-1/2", "1/2/3", "1/0"])
def test_words_that_are_no_shard(text: Path, words: str) -> None:
    with pytest.raises(UserError, match="give a part and how many there are, from 1/8 to 8/8"):
        run(text, "--output_prefix", str(text / "w"), "--shard", words)


def test_more_shards_than_documents(text: Path) -> None:
    with pytest.raises(DataError, match=r"shard 999/9999 has nothing to do: .* shards at most"):
        run(text, "--output_prefix", str(text / "w"), "--shard", "999/9999")


def test_bounds_are_a_partition() -> None:
    for pieces in (8, 9, 31, 100):
        for count in range(1, 9):
            bounds = [Shard(number, count).bounds(pieces) for number in range(1, count + 1)]
            assert [n for first, stop in bounds for n in range(first, stop)] == [*range(pieces)]


def store(prefix: Path, documents: list[list[int]], **meta: object) -> Path:
    with TokenStoreWriter(prefix, np.uint16, vocab_size=1000, meta=meta) as writer:
        for ids in documents:
            writer.add_document(ids)
    return prefix


def merged(place: Path, *names: str, target: str = "out") -> TokenStore:
    words = ["--input", *(str(place / name) for name in names)]
    merge.main([*words, "--output_prefix", str(place / target)])
    return TokenStore.open(place / target)


def test_any_stores_of_one_tokenizer_follow_each_other(tmp_path: Path) -> None:
    store(tmp_path / "a", [[1, 2], [], [3]])
    store(tmp_path / "b", [[4]])
    whole = merged(tmp_path, "b", "a")
    assert whole.tokens.tolist() == [4, 1, 2, 3] and whole.sizes.tolist() == [1, 2, 0, 1]


def test_large_stores_are_copied_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK", 7)
    documents = [list(range(n % 11)) for n in range(100)]
    store(tmp_path / "a", documents)
    store(tmp_path / "b", [[5] * 30])
    whole = merged(tmp_path, "a", "b")
    flat = [one for ids in documents for one in ids]
    assert whole.tokens.tolist() == flat + [5] * 30
    assert whole.num_documents == 101


def test_a_result_that_differs_from_its_parts_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path / "a", [[1, 2], [3]])
    add = TokenStoreWriter.add_documents

    def flipped(self, ids, sizes):  # type: ignore[no-untyped-def]
        return add(self, np.where(ids == 3, 4, ids), sizes)

    monkeypatch.setattr(TokenStoreWriter, "add_documents", flipped)
    with pytest.raises(DataError, match="did not read back as its parts, and is deleted"):
        merged(tmp_path, "a")
    assert {file.name for file in tmp_path.iterdir()} == {"a.bin", "a.idx", "a.meta.json"}


def test_what_makes_no_whole_is_refused_before_anything_is_written(text: Path) -> None:
    for number in (1, 3):
        run(text, "--output_prefix", str(text / "s"), "--shard", f"{number}/3")
    run(text, "--output_prefix", str(text / "t"), "--shard", "2/3", "--prepend_bos")
    second = Shard(2, 3).prefix(text / "t").name
    store(text / "plain", [[1]])
    store(text / "eos", [[1]], append_eos=True)
    store(text / "mask", [[1]], task="ids")
    first = Shard(1, 3).prefix(text / "s").name
    before = sorted(text.iterdir())
    for names, message in (
        (["s"], r"1 of 3 shards are missing: make them with --shard 2/3"),
        (["s", second], "are shards of different runs"),
        (["s", first], r"are both shard 1: name one"),
        (["s", "plain"], "plain is no shard, and others are"),
        (["plain", "eos"], "append_eos is True in .*eos and None in .*plain"),
        (["mask"], "holds ids of examples: only stores of text"),
        (["nowhere"], "no token store at"),
        (["plain", "plain"], "plain and .*plain hold the same documents"),
    ):
        with pytest.raises(DataError, match=message):
            merged(text, *names)
    with pytest.raises(DataError, match="is one of the parts: choose another"):
        merge.main([*f"--input {text}/plain --output_prefix {text}/plain --overwrite".split()])
    for nothing in ("", "."):
        with pytest.raises(DataError, match=r"'\.' is a directory, and no name in it"):
            merge.main(["--input", nothing, "--output_prefix", str(text / "out")])
    with pytest.raises(DataError, match="exists already"):
        merged(text, "eos", target="plain")
    assert sorted(text.iterdir()) == before


@pytest.mark.parametrize("linked", [".bin", ".idx", ".meta.json", ".bad_lines.txt", "_ids.npy"])
def test_a_store_s_files_are_not_written_through_links(tmp_path: Path, linked: str) -> None:
    """The index would go where the link leads, the tokens would not: two stores would be lost."""
    store(tmp_path / "a", [[1, 2]])
    store(tmp_path / "b", [[3]])
    (tmp_path / f"link{linked}").symlink_to(tmp_path / f"a{linked}")
    before = {file.name: file.read_bytes() for file in tmp_path.glob("[ab].*")}
    words = ["--input", str(tmp_path / "b"), "--output_prefix", str(tmp_path / "link")]
    with pytest.raises(DataError, match=rf"link{re.escape(linked)} is a link to .*a{linked}"):
        merge.main([*words, "--overwrite"])
    assert {file.name: file.read_bytes() for file in tmp_path.glob("[ab].*")} == before


# datatrove's files, whose format its own reader shows: tokens, and where each document ends.


def write_ds(prefix: Path, documents: list[list[int]], code: str) -> None:
    ends = np.cumsum([len(ids) for ids in documents]).tolist()
    tokens = [one for ids in documents for one in ids]
    paths = StorePaths(prefix)
    paths.tokens("ds").write_bytes(struct.pack(f"<{len(tokens)}{code}", *tokens))
    paths.index("ds").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))


@pytest.mark.parametrize("code", ["H", "I"])
def test_stores_of_datatrove_are_read(tmp_path: Path, code: str) -> None:
    documents = [[5, 6, 7], [], [8], [60000, 1]]
    write_ds(tmp_path / "00000_00000_shuffled", documents, code)
    write_ds(tmp_path / "00001_00000_shuffled", [[9] * 6], code)
    sources = open_sources([str(tmp_path)], "input_dir")
    first = sources.stores[0]
    assert [first.document(n).tolist() for n in range(4)] == documents
    assert (first.layout, first.dtype.itemsize) == ("ds", struct.calcsize(code))
    assert sources.weights == (1, 1) and sources.by_size
    assert merged(tmp_path, "00000_00000_shuffled").tokens.tolist() == first.tokens.tolist()


def test_damaged_stores_of_datatrove(tmp_path: Path) -> None:
    paths = StorePaths(tmp_path / "x")
    for content, index, message in (
        (b"12345", struct.pack("<Q", 3), "has 5 bytes, but .* describes 3 tokens of 2 or 4 bytes"),
        (b"123456", struct.pack("<Q", 3)[:5], "has 5 bytes, which are not 8 for each document"),
        (b"123456", struct.pack("<QQ", 3, 2), "document 1 ends at token 2, before it begins at 3"),
        (b"", struct.pack("<Q", 0), "holds no tokens"),
        (b"123456", b"", "has 0 bytes, which are not 8"),
    ):
        paths.tokens("ds").write_bytes(content)
        paths.index("ds").write_bytes(index)
        with pytest.raises(DataError, match=message):
            TokenStore.open(tmp_path / "x")
    write_ds(tmp_path / "x", [[1]], "H")
    (tmp_path / "x.ds.loss").write_bytes(b"\0")
    with pytest.raises(DataError, match="pretraining learns all of them"):
        TokenStore.open(tmp_path / "x")
