"""Both layouts: byte for byte what the format says, and what PaddleNLP reads and writes."""

import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data.corpus.token_store import TokenStore, best_dtype, find_stores
from data.corpus.token_store_writer import TokenStoreWriter, npy_header

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12], [65499]]


def write(prefix: Path, layout: str, documents: list[list[int]] = DOCUMENTS) -> Path:
    with TokenStoreWriter(prefix, np.uint16, layout=layout, vocab_size=65500) as writer:
        for ids in documents:
            writer.add_document(ids)
    return prefix


@pytest.mark.parametrize("layout", ["bin", "npy"])
def test_what_is_written_is_read(tmp_path: Path, layout: str) -> None:
    store = TokenStore.open(write(tmp_path / "corpus", layout))
    assert (store.layout, store.num_documents, store.num_tokens) == (layout, 5, 9)
    assert [store.document(i).tolist() for i in range(5)] == DOCUMENTS
    assert store.sizes.tolist() == [3, 0, 1, 4, 1]
    assert store.sizes.dtype == np.int32
    assert (store.dtype, store.vocab_size, store.largest_id()) == (np.uint16, 65500, 65499)
    assert find_stores(tmp_path) == [tmp_path / "corpus"]
    # Nothing is left beside the store.
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_index_has_megatrons_bytes(tmp_path: Path) -> None:
    write(tmp_path / "corpus", "bin")
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 5, 6)
    expected += struct.pack("<5i", 3, 0, 1, 4, 1)
    expected += struct.pack("<5q", 0, 6, 6, 8, 16)
    expected += struct.pack("<6q", 0, 1, 2, 3, 4, 5)
    assert (tmp_path / "corpus.idx").read_bytes() == expected
    assert (tmp_path / "corpus.bin").read_bytes() == struct.pack(
        "<9H", 5, 6, 7, 8, 9, 10, 11, 12, 65499
    )


def test_arrays_are_numpys(tmp_path: Path) -> None:
    write(tmp_path / "corpus", "npy")
    assert np.load(tmp_path / "corpus_ids.npy").tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 65499]
    with np.load(tmp_path / "corpus_idx.npz") as arrays:
        assert {name: (arrays[name].dtype, arrays[name].tolist()) for name in arrays} == {
            "lens": (np.int32, [3, 0, 1, 4, 1]),
            "sents": (np.int64, [0, 3, 3, 4, 8, 9]),
            "docs": (np.int64, [0, 1, 2, 3, 4, 5]),
        }
    assert len(npy_header(np.dtype("<i4"), 2**60)) == 128


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron's preprocessing with --split-sentences writes these."""
    body = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 3)
    body += struct.pack("<3i", 2, 1, 2) + struct.pack("<3q", 0, 8, 12) + struct.pack("<3q", 0, 2, 3)
    (tmp_path / "c.idx").write_bytes(body)
    (tmp_path / "c.bin").write_bytes(struct.pack("<5i", 1, 2, 3, 4, 70000))
    store = TokenStore.open(tmp_path / "c")
    assert [store.document(i).tolist() for i in range(2)] == [[1, 2, 3], [4, 70000]]


def test_both_layouts_have_the_same_fingerprint(tmp_path: Path) -> None:
    first = TokenStore.open(write(tmp_path / "a", "bin")).fingerprint()
    assert TokenStore.open(write(tmp_path / "b", "npy")).fingerprint() == first
    other = [*DOCUMENTS[:-1], [65498]]
    assert TokenStore.open(write(tmp_path / "c", "bin", other)).fingerprint() != first


def test_a_writer_goes_on_where_another_was_killed(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", "npy")
    writer = TokenStoreWriter(tmp_path / "part", np.uint16, layout="npy", vocab_size=65500)
    for ids in DOCUMENTS[:3]:
        writer.add_document(ids)
    written = writer.flush()
    # Written after the last flush, so not to be relied on.
    writer.add_document([1, 2, 3] * 50)
    writer.close()
    with TokenStoreWriter(
        tmp_path / "part", np.uint16, layout="npy", vocab_size=65500, resume=written
    ) as writer:
        for ids in DOCUMENTS[3:]:
            writer.add_document(ids)
    for suffix in ("_ids.npy", "_idx.npz", ".meta.json"):
        part = tmp_path / f"part{suffix}"
        assert part.read_bytes() == whole.with_name(f"whole{suffix}").read_bytes()


def test_an_exception_leaves_no_files(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        TokenStoreWriter(tmp_path / "corpus", np.uint16) as writer,
    ):
        writer.add_document([1])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("vocab_size", "name"), [(65499, "uint16"), (65500, "int32")])
def test_type_by_vocabulary(vocab_size: int, name: str) -> None:
    assert best_dtype(vocab_size).name == name


def test_vocabulary_is_checked_by_reading_where_it_is_not_recorded(tmp_path: Path) -> None:
    prefix = write(tmp_path / "corpus", "bin")
    TokenStore.open(prefix).check_vocab(65500)
    (tmp_path / "corpus.meta.json").unlink()
    TokenStore.open(prefix).check_vocab(65500)
    with pytest.raises(
        DataError, match=r"holds token id 65499, but the model's vocabulary has 100"
    ):
        TokenStore.open(prefix).check_vocab(100)


PADDLENLP = """
import json, sys
import numpy as np
from paddlenlp.data.causal_dataset import build_train_valid_test_datasets
from paddlenlp.data.indexed_dataset import MMapIndexedDatasetBuilder, make_dataset

out = {}
for layout in ("bin", "npy"):
    store = make_dataset(f"{sys.argv[1]}/{layout}", "mmap", skip_warmup=True)
    out[layout] = [store.get(i)[0].tolist() for i in range(len(store))]
    assert store.sizes.shape[0] == store.doc_idx[-1]
    parts = build_train_valid_test_datasets(
        [f"{sys.argv[1]}/{layout}"], "mmap", "6,3,1", [77, 20, 0], 8, 1234, True,
        data_cache_path=f"{sys.argv[1]}/theirs-{layout}",
    )
    out[f"{layout}-samples"] = [[part[i]["text"].tolist() for i in range(len(part))]
                                for part in parts[:2]]
builder = MMapIndexedDatasetBuilder(f"{sys.argv[1]}/theirs.bin", np.int32)
for ids in ([3, 1, 4], [1, 5, 9, 2]):
    builder.add_doc(ids, [len(ids)])
builder.finalize(f"{sys.argv[1]}/theirs.idx")
json.dump(out, open(f"{sys.argv[1]}/out.json", "w"))
"""


def test_paddlenlp_reads_and_writes_the_same(tmp_path: Path) -> None:
    """Stores both ways, and the same samples in the same order for the same seed."""
    import json

    from data.corpus.pretrain_dataset import build_pretrain_datasets

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 65000, int(n)).tolist() for n in rng.integers(1, 40, 30)]
    for layout in ("bin", "npy"):
        write(tmp_path / layout, layout, documents)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PADDLENLP), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = json.loads((tmp_path / "out.json").read_text())
    for layout in ("bin", "npy"):
        assert theirs[layout] == documents
        parts = build_pretrain_datasets(
            tmp_path / layout, seq_length=8, split="6,3,1", num_samples=(77, 20, 0), seed=1234
        )
        for part, samples in zip(parts, theirs[f"{layout}-samples"], strict=False):
            assert part is not None
            ours = [[*s["input_ids"].tolist(), int(s["labels"][-1])] for s in part]
            assert ours == samples
    store = TokenStore.open(tmp_path / "theirs")
    assert [store.document(i).tolist() for i in range(2)] == [[3, 1, 4], [1, 5, 9, 2]]
