"""Samples against a second, simpler algorithm: lay the documents end to end and cut."""

import logging
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from data.corpus.pretrain_dataset import (
    PretrainDataset,
    ResumableSampler,
    build_pretrain_datasets,
    parse_split,
    split_documents,
)
from data.corpus.token_store_writer import TokenStoreWriter


def make_store(prefix: Path, sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 30000, size) for size in sizes]
    with TokenStoreWriter(prefix, np.uint16) as writer:
        for ids in documents:
            writer.add_document(ids)
    return documents


@pytest.fixture
def documents(tmp_path: Path) -> list[np.ndarray]:
    sizes = np.random.default_rng(1).integers(0, 60, 100).tolist()
    return make_store(tmp_path / "c", [*sizes, 0, 0, 200, 1])


def check_samples(part: PretrainDataset | None, documents: list[np.ndarray], length: int) -> None:
    assert part is not None
    stream = np.concatenate([documents[i] for i in part.index.documents])
    seen = sorted(part.index.order.tolist())
    assert seen == list(range((len(stream) - 1) // length))
    for i, sample in enumerate(part):
        at = int(part.index.order[i]) * length
        assert sample["input_ids"].dtype == sample["labels"].dtype == np.int64
        np.testing.assert_array_equal(sample["input_ids"], stream[at : at + length])
        np.testing.assert_array_equal(sample["labels"], stream[at + 1 : at + length + 1])


@pytest.mark.parametrize("length", [2, 7, 64, 500])
@pytest.mark.parametrize("count", [1, 3, 100, 333, None])
def test_samples_are_cuts_of_the_documents_end_to_end(
    tmp_path: Path, documents: list[np.ndarray], length: int, count: int | None
) -> None:
    train, valid, test = build_pretrain_datasets(
        tmp_path / "c", seq_length=length, split="7,3", num_samples=(count, count, 0), seed=9
    )
    assert test is None
    bounds = split_documents("7,3", len(documents))
    for part, first, last in ((train, 0, bounds[1]), (valid, bounds[1], bounds[2])):
        check_samples(part, documents, length)
        assert part is not None
        laid = part.index.documents
        assert len(part) >= (count or 1)
        # Each epoch has every document once, so all epochs together have it that often.
        assert sorted(laid.tolist()) == sorted(list(range(first, last)) * part.epochs)
        if count is None:
            assert part.epochs == 1
        elif part.epochs > 1:
            tokens = sum(len(documents[i]) for i in range(first, last))
            assert ((part.epochs - 1) * tokens - 1) // length < count


def test_a_small_last_epoch_comes_last(tmp_path: Path) -> None:
    documents = make_store(tmp_path / "c", [11] * 50)
    per_epoch = (11 * 50 - 1) // 10
    train, _, _ = build_pretrain_datasets(
        tmp_path / "c", seq_length=10, split="1", num_samples=(2 * per_epoch + 5, 0, 0), seed=0
    )
    assert train is not None
    assert train.epochs == 3
    check_samples(train, documents, 10)
    before = (2 * 11 * 50 - 1) // 10
    assert sorted(train.index.documents[:100].tolist()) == sorted(list(range(50)) * 2)
    assert set(train.index.order[:before].tolist()) == set(range(before))
    full, _, _ = build_pretrain_datasets(
        tmp_path / "c", seq_length=10, split="1", num_samples=(3 * per_epoch, 0, 0), seed=0
    )
    assert full is not None
    assert set(full.index.order[:before].tolist()) != set(range(before))


@pytest.mark.parametrize(
    ("split", "documents", "bounds"),
    [
        ("949,50,1", 1000, (0, 949, 999, 1000)),
        ("949/50/1", 60, (0, 57, 60, 60)),
        ("949,50,1", 7, (0, 7, 7, 7)),
        ("1", 5, (0, 5, 5, 5)),
        ("0,1", 5, (0, 0, 5, 5)),
        ("1,1,1", 10, (0, 4, 7, 10)),
        ("0.5,0.5", 3, (0, 1, 3, 3)),
    ],
)
def test_split_rounds_as_megatron(
    split: str, documents: int, bounds: tuple[int, int, int, int]
) -> None:
    assert split_documents(split, documents) == bounds


def test_shares_add_up_to_one() -> None:
    assert parse_split("949,50,1") == pytest.approx((0.949, 0.05, 0.001))


def test_order_depends_on_the_seed_alone(tmp_path: Path, documents: list[np.ndarray]) -> None:
    del documents

    def order(seed: int, cache: str) -> list[list[int]]:
        train, _, _ = build_pretrain_datasets(
            tmp_path / "c",
            seq_length=8,
            split="1",
            num_samples=(500, 0, 0),
            seed=seed,
            cache_dir=tmp_path / cache,
        )
        assert train is not None
        return [sample["input_ids"].tolist() for sample in train]

    assert order(1, "a") == order(1, "b")
    assert order(1, "a") != order(2, "a")


def test_index_is_kept_and_found_by_everything_it_depends_on(
    tmp_path: Path, documents: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    original = np.random.RandomState
    monkeypatch.setattr(np.random, "RandomState", lambda seed: built.append(seed) or original(seed))
    options = {"seq_length": 8, "split": "8,2", "num_samples": (50, 10, 0), "seed": 1}

    def build(**changes: object) -> int:
        before = len(built)
        build_pretrain_datasets(tmp_path / "c", **{**options, **changes})
        return len(built) - before

    assert build() == 2
    assert build() == 0
    assert build(seq_length=9) == 2
    assert build(seed=2) == 2
    # The validation part has another first document, the training part another last one.
    assert build(split="7,3") == 2
    assert build(num_samples=(51, 10, 0)) == 1
    make_store(tmp_path / "c2", [len(ids) for ids in documents], seed=5)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"c2{suffix}").replace(tmp_path / f"c{suffix}")
    assert build() == 2


def test_a_damaged_index_is_built_again(
    tmp_path: Path, documents: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    def build() -> PretrainDataset | None:
        return build_pretrain_datasets(
            tmp_path / "c", seq_length=8, split="1", num_samples=(50, 0, 0), seed=1
        )[0]

    build()
    for path in (tmp_path / "index-cache").iterdir():
        content = path.read_bytes()
        for damaged in (content[:40], content[:-7], b""):
            path.write_bytes(damaged)
            with caplog.at_level(logging.WARNING):
                check_samples(build(), documents, 8)
    assert "building it again" in caplog.text


def test_an_index_that_cannot_be_kept_is_used_anyway(
    tmp_path: Path, documents: list[np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "index-cache").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        train, _, _ = build_pretrain_datasets(
            tmp_path / "c", seq_length=8, split="1", num_samples=(9, 0, 0)
        )
    check_samples(train, documents, 8)
    assert "kept in memory only" in caplog.text


def test_nothing_is_printed(
    tmp_path: Path, documents: list[np.ndarray], capfd: pytest.CaptureFixture[str]
) -> None:
    del documents
    build_pretrain_datasets(tmp_path / "c", seq_length=8, split="1", num_samples=(9, 0, 0))
    assert capfd.readouterr().out == ""


def test_datasets_work_in_forked_loaders(tmp_path: Path, documents: list[np.ndarray]) -> None:
    train, _, _ = build_pretrain_datasets(
        tmp_path / "c", seq_length=8, split="1", num_samples=(40, 0, 0)
    )
    assert train is not None
    del documents
    with multiprocessing.get_context("fork").Pool(2) as pool:
        samples = pool.map(train.__getitem__, range(40))
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["input_ids"], train[i]["input_ids"])
    with pytest.raises(IndexError):
        train[len(train)]


def test_sampler_resumes_exactly_also_with_other_ranks() -> None:
    def take(steps: int, ranks: int, batch: int, consumed: int) -> list[int]:
        samplers = [
            ResumableSampler(
                100, batch_size=batch, rank=rank, num_ranks=ranks, consumed_samples=consumed
            )
            for rank in range(ranks)
        ]
        streams = [iter(sampler) for sampler in samplers]
        return [i for _ in range(steps) for stream in streams for i in next(stream)]

    assert take(12, 1, 4, 0) == list(range(48))
    first = ResumableSampler(100, batch_size=4, rank=1, num_ranks=2)
    batches = iter(first)
    assert [next(batches), next(batches)] == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert first.state_dict() == {"consumed_samples": 16}
    assert take(2, 4, 2, 16) == list(range(16, 32))
    again = ResumableSampler(100, batch_size=8)
    again.load_state_dict(first.state_dict())
    assert next(iter(again)) == list(range(16, 24))
    assert len(list(ResumableSampler(100, batch_size=8))) == len(
        ResumableSampler(100, batch_size=8)
    )
