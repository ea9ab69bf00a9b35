"""Blends against exact shares, Megatron's greedy rule, and a plain list of samples."""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from data.corpus.blend import BLOCK, Blend, Extended, Later, Mixture
from data.corpus.sources import open_sources, read_entries
from data.corpus.token_store_writer import TokenStoreWriter
from data.order import ResumableSampler

WEIGHTS = [
    (1,),
    (3, 7),
    (1, 1, 1),
    (181, 1, 26, 1),  # the greedy rule strays 1.56 samples here
    (214, 1, 1, 1, 5),  # and 1.64 here
    (2, 280, 1, 1, 1, 84, 8, 67, 28, 2, 3, 6),
    (123_456_789_012, 98_765_432_109, 55_555),
    tuple(range(1, 60)),
]


def greedy(weights, length):
    """Megatron's blend: each sample is from the source that lags most behind its share."""
    total, given, order = sum(weights), [0] * len(weights), []
    for at in range(length):
        lags = [
            weight * max(at, 1) - have * total for weight, have in zip(weights, given, strict=True)
        ]
        order.append(lags.index(max(lags)))
        given[order[-1]] += 1
    return order


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda one: f"{len(one)} of {sum(one)}")
def test_counts_are_within_one_of_the_shares_at_every_step(weights):
    length = 3000
    mixture = Mixture(weights, length)
    total, given, worst = sum(weights), [0] * len(weights), Fraction(0)
    apart = 0
    other = greedy(weights, length)
    theirs = [0] * len(weights)
    for at in range(length):
        source, index = mixture.place(at)
        assert index == given[source], "a source gives its samples in turn"
        given[source] += 1
        theirs[other[at]] += 1
        errors = [
            abs(n - Fraction(w * (at + 1), total)) for n, w in zip(given, weights, strict=True)
        ]
        worst = max(worst, *errors)
        apart = max(apart, *(abs(a - b) for a, b in zip(given, theirs, strict=True)))
        assert sum(given) == at + 1
        if at % 997 == 0 or at % BLOCK == BLOCK - 1:
            assert mixture.counts(at + 1) == given
    assert worst < 1
    assert apart <= 2, "the other rule mixes alike, though not as evenly"


def test_the_greedy_rule_is_not_as_even():
    weights = WEIGHTS[4]
    given, worst = [0] * len(weights), Fraction(0)
    for at, source in enumerate(greedy(weights, 222), 1):
        given[source] += 1
        worst = max(
            worst, *(abs(n - Fraction(w * at, 222)) for n, w in zip(given, weights, strict=True))
        )
    assert worst > Fraction(3, 2)


def test_a_longer_mixture_begins_with_a_shorter_one():
    for weights in WEIGHTS:
        short, long = Mixture(weights, 500), Mixture(weights, 2777)
        assert [short.place(n) for n in range(500)] == [long.place(n) for n in range(500)]


def test_only_ratios_count():
    pairs = zip(*[map(Mixture(w, 99).place, range(99)) for w in ((3, 7), (300, 700))], strict=True)
    assert all(one == other for one, other in pairs)


class Numbers:
    def __init__(self, first, length):
        self.first, self.length = first, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return {"input_ids": np.array([self.first + index])}


def ids(dataset, places):
    return [int(dataset[place]["input_ids"][0]) for place in places]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_takes_the_same_samples(ranks):
    blend = Blend([Numbers(0, 40), Numbers(1000, 60)], Mixture((2, 3), 96))
    steps = []
    samplers = [
        iter(ResumableSampler(96, batch_size=8 // ranks, rank=rank, num_ranks=ranks))
        for rank in range(ranks)
    ]
    for batches in zip(*samplers, strict=True):
        steps.append([n for batch in batches for n in ids(blend, batch)])
    assert steps == [ids(blend, range(at, at + 8)) for at in range(0, 96, 8)]
    assert len(steps) == 12


def test_what_lies_outside_is_no_sample():
    blend = Blend([Numbers(0, 3), Numbers(9, 3)], Mixture((1, 1), 5))
    later = Later(blend, 10)
    extended = Extended([blend, Numbers(50, 9)], [5, 2])
    assert len(later) == 15 and ids(later, [10, 14]) == ids(blend, [0, 4])
    assert ids(extended, range(7)) == [*ids(blend, range(5)), 50, 51]
    for dataset, place in ((blend, 5), (blend, -1), (later, 9), (later, 15), (extended, 7)):
        with pytest.raises(IndexError, match=f"sample {place} "):
            dataset[place]


# Words of the flag, and stores.


def store(prefix: Path, tokens: int) -> Path:
    with TokenStoreWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(tokens))
    return prefix


@pytest.mark.parametrize(
    ("words", "entries"),
    [
        (["a"], [(None, "a")]),
        (["2024"], [(None, "2024")]),
        (["a", "b"], [(None, "a"), (None, "b")]),
        (["0.3", "a", "0.7", "b"], [("3/10", "a"), ("7/10", "b")]),
        (["0.3 a 0.7 b"], [("3/10", "a"), ("7/10", "b")]),
        (["2e9 a", "1e9 b"], [(2 * 10**9, "a"), (10**9, "b")]),
        (["1 my data/web", "1. b"], [(1, "my data/web"), (1, "b")]),
        (["my data/web"], [(None, "my data/web")]),
        (["1", "./2024", ".5", "b"], [(1, "./2024"), ("1/2", "b")]),
    ],
)
def test_words_of_a_blend(words, entries):
    wanted = [(None if w is None else Fraction(w), path) for w, path in entries]
    assert read_entries(words, "input_dir") == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "0.7", "b"], "input_dir: a has no weight, and others have: give each store one"),
        (["0.3", "a", "b"], "b has no weight"),
        (["0.3", "a", "0.7"], "after the weight 0.7 has to come a store, and there is nothing"),
        (["0.3", "0.7", "a", "b"], "after the weight 0.3 has to come a store, and there is 0.7"),
        (["0", "a", "1", "b"], "the weight 0 takes nothing of a: leave both out"),
        (["-1", "a", "1", "b"], "the weight of a is -1; it has to be between"),
        (["1e999", "a", "1", "b"], "the weight of a is 1e999; it has to be between"),
        (["1e-99", "a", "1", "b"], "the weight of a is 1e-99; it has to be between 1e-18"),
    ],
)
def test_words_that_are_no_blend(words, message):
    with pytest.raises(DataError, match=message):
        read_entries(words, "input_dir")


def test_stores_and_their_weights(tmp_path):
    for name, tokens in (("a", 30), ("b", 10), ("d/x", 6), ("d/y", 2)):
        store(tmp_path / name, tokens)
    a, b, d = (str(tmp_path / name) for name in "abd")
    for words, weights, by_size in (
        ([a], (1,), False),
        ([a, b], (3, 1), True),
        (["0.25", a, "0.75", b], (1, 3), False),
        ([d], (3, 1), True),
        (["0.5", a, "0.5", d], (4, 3, 1), False),
        ([f"3e9 {a}", f"1e9 {b}"], (3, 1), False),
    ):
        found = open_sources(words, "input_dir")
        assert (found.weights, found.by_size) == (weights, by_size)
        assert found.num_tokens == sum(one.num_tokens for one in found.stores)
    one, other = (open_sources(words, "f") for words in (["1", a, "1", b], ["1", a, "2", b]))
    assert one.fingerprint() != other.fingerprint()
    assert open_sources([a], "f").fingerprint() == open_sources([a], "f").stores[0].fingerprint()


def test_stores_that_are_none_or_named_twice(tmp_path):
    store(tmp_path / "d" / "x", 5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"input_dir=.*empty has no token store in it"):
        open_sources([str(tmp_path / "empty")], "input_dir")
    with pytest.raises(DataError, match=r"input_dir names .*x twice"):
        open_sources([str(tmp_path / "d"), str(tmp_path / "d" / "x")], "input_dir")
    for number, name in enumerate(("x-00001-of-00002", "z-00001-of-00001"), 5):
        store(tmp_path / "s" / name, number)
    assert len(open_sources([str(tmp_path / "s")], "input_dir").stores) == 2
    store(tmp_path / "s" / "x", 10)
    with pytest.raises(DataError, match="has the store x and its shard x-00001-of-00002"):
        open_sources([str(tmp_path / "s")], "input_dir")
    with pytest.raises(DataError, match="no token store at"):
        open_sources(["0.5", str(tmp_path / "no"), "0.5", str(tmp_path / "d")], "input_dir")


@pytest.mark.parametrize("make", [shutil.copy, os.symlink, os.link], ids=lambda make: make.__name__)
def test_one_store_under_two_names_is_refused(make, tmp_path):
    store(tmp_path / "a", 30)
    store(tmp_path / "b", 30)
    with TokenStoreWriter(tmp_path / "c", np.uint16) as writer:
        writer.add_document(np.arange(1, 31))  # as long, and other ids
    open_sources([str(tmp_path / name) for name in "ac"], "f")
    with pytest.raises(DataError, match=r"f: \S+b is a copy of \S+a, which would give the same"):
        open_sources([str(tmp_path / name) for name in "acb"], "f")
    for ending in (".bin", ".idx", ".meta.json"):
        make(tmp_path / f"c{ending}", tmp_path / f"d{ending}")
    with pytest.raises(DataError, match=r"d is a copy of \S+c"):
        open_sources(["1", str(tmp_path / "c"), "2", str(tmp_path / "d")], "f")
