"""Bad stores and datasets: each case with the message a user sees."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data.corpus.pretrain_dataset import ResumableSampler, build_pretrain_datasets
from data.corpus.token_store import TokenStore
from data.corpus.token_store_writer import TokenStoreWriter

HEADER = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
SIZES = struct.pack("<2i", 3, 2)
POINTERS = struct.pack("<2q", 0, 6)
MARKS = struct.pack("<3q", 0, 1, 2)


def a_store(directory: Path) -> Path:
    (directory / "c.idx").write_bytes(HEADER + SIZES + POINTERS + MARKS)
    (directory / "c.bin").write_bytes(struct.pack("<5H", 1, 2, 3, 4, 5))
    assert TokenStore.open(directory / "c").num_tokens == 5
    return directory / "c"


def write_npy(directory: Path) -> None:
    np.save(directory / "c_ids.npy", np.arange(5, dtype=np.uint16))
    np.savez(directory / "c_idx.npz", lens=np.array([3, 2], np.int32), docs=np.array([0, 1, 2]))


def an_npy_store(directory: Path) -> Path:
    write_npy(directory)
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
    "byte order": (
        index(HEADER.replace(b"\x01" + bytes(7), bytes(7) + b"\x01", 1) + SIZES + POINTERS + MARKS),
        "c.idx is big-endian",
    ),
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
    "both layouts": (write_npy, "has 2 layouts"),
    "meta": (
        lambda d: (d / "c.meta.json").write_text("{"),
        "c.meta.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("name", BIN_CASES)
def test_damaged_bin_store(tmp_path: Path, name: str) -> None:
    damage, message = BIN_CASES[name]
    prefix = a_store(tmp_path)
    damage(tmp_path)
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
    with pytest.raises(DataError, match=r"no token store at .*; make one with"):
        TokenStore.open(tmp_path / "nothing")
    with pytest.raises(DataError, match="there is no directory"):
        TokenStore.open(tmp_path / "no" / "nothing")
    a_store(tmp_path)
    with pytest.raises(DataError, match=r"did you mean .*/c\?"):
        TokenStore.open(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"document 2 is not in .*, which holds 0 to 1"):
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
