"""Runs on several stores: what they take from each, and how they go on."""

import json
import re

import numpy as np
import pytest

from common.errors import UserError
from data.corpus.pretrain_dataset import build_pretrain_datasets
from data.corpus.token_store_writer import TokenStoreWriter
from llm.train import checkpoints, checks
from llm.train.pretrain_data import passes
from llm.train.schedules import rate_of
from tests.unit.train.test_pretrain_plan import groups, make_checkpoint, plan

LENGTH = 16


def write(prefix, first, documents=60):
    """Write a store of documents of 50 tokens, all of which lie in [first, first + 100)."""
    with TokenStoreWriter(prefix, np.uint16) as writer:
        for number in range(documents):
            writer.add_document(first + (np.arange(50) * 7 + number) % 100)
    return prefix


@pytest.fixture
def place(tmp_path):
    """Three stores, whose tokens tell them apart by their hundreds."""
    for number, name in enumerate(("a", "b", "c")):
        write(tmp_path / "data" / name, 100 * number, 60 if name != "c" else 20)
    return tmp_path


def words(place, *pairs):
    return " ".join(f"{weight} {place / 'data' / name}" for weight, name in pairs)


def origins(dataset, start, stop):
    return [int(dataset[n]["input_ids"][0]) // 100 for n in range(start, stop)]


def test_a_run_takes_its_shares_of_each_store_in_the_stores_own_order(place):
    mix = words(place, (0.3, "a"), (0.6, "b"), (0.1, "c"))
    planned = plan(place, input_dir=mix, max_steps=20)
    train = planned.datasets["train"]
    assert len(train) == 40
    sources = origins(train, 0, 40)
    assert [sources.count(n) for n in range(3)] == [12, 24, 4]
    for number, (name, share) in enumerate((("a", 0.3), ("b", 0.6), ("c", 0.1))):
        counts = np.cumsum(np.array(sources) == number)
        assert (np.abs(counts - share * np.arange(1, 41)) < 1).all()
        alone, _, _ = build_pretrain_datasets(
            place / "data" / name, seq_length=LENGTH, num_samples=(int(counts[-1]), 0, 0)
        )
        own = [train[n]["input_ids"].tolist() for n in range(40) if sources[n] == number]
        assert own == [alone[n]["input_ids"].tolist() for n in range(len(own))]
    assert planned.data_state["weights"] == [3, 6, 1]
    said = "; ".join(planned.messages)
    assert "blend of 3 stores: 30.00% " in said and "(24 samples, 384 tokens of 3,000)" in said
    assert "PaddleNLP" not in said


def test_a_directory_is_all_of_its_stores_by_their_tokens(place):
    planned = plan(place, max_steps=35)
    sources = origins(planned.datasets["train"], 0, 70)
    assert [sources.count(n) for n in range(3)] == [30, 30, 10]
    said = "; ".join(planned.messages)
    assert "stores without weights count by their tokens" in said
    assert f"one weight: 1 {place / 'data' / 'a'} 1 {place / 'data' / 'b'}" in said
    assert "140 documents, 7,000 tokens" in said
    plain = ["--data_path", *map(str, (place / "data" / name for name in "abc"))]
    again = plan(place, *plain, input_dir=None, max_steps=35)
    assert origins(again.datasets["train"], 0, 70) == sources


def test_a_long_layout_is_announced(place, monkeypatch, caplog):
    monkeypatch.setattr("llm.train.pretrain_data._MANY", 9)
    with caplog.at_level("INFO"):
        plan(place, input_dir=words(place, (0.3, "a"), (0.7, "b")), max_steps=20)
        assert "laying out 10 samples of a blend" in caplog.text
        caplog.clear()
        plan(place, input_dir=words(place, (1, "a"), (2, "b")), max_steps=20)
    assert "laying out" not in caplog.text


def test_a_part_of_a_blend_is_measured_without_a_sample_twice(place):
    mix = words(place, (1, "a"), (3, "b"))
    planned = plan(place, input_dir=mix, do_eval="true", split="50,50")
    valid = planned.datasets["eval"]
    found = [tuple(valid[n]["input_ids"]) for n in range(len(valid))]
    assert len(valid) == 124 == 93 * 4 // 3, "all 93 samples of b, and a third of that of a"
    assert origins(valid, 0, 124).count(0) == 31
    assert len(set(found)) > 60


def test_stores_of_their_own_leave_all_of_input_dir_to_training(place):
    own = {
        "input_dir": place / "data" / "a",
        "valid_data_path": words(place, (1, "b"), (1, "c")),
        "test_data_path": place / "data" / "c",
    }
    planned = plan(place, do_eval="true", do_predict="true", **own)
    assert origins(planned.datasets["eval"], 0, 10).count(1) == 5
    assert set(origins(planned.datasets["test"], 0, 20)) == {2}
    assert planned.data_state["split"] == "1"
    train = plan(place, max_steps=93, **own).datasets["train"]
    assert len(train) == (3000 - 1) // LENGTH and passes(train) == 1
    assert plan(place, **{**own, "valid_data_path": None}).datasets["eval"] is None
    assert not any("is trained on" in message for message in planned.messages)
    own["valid_data_path"] = words(place, (1, "b"), (1, "a"))
    said = plan(place, do_eval="true", do_predict="true", **own).messages
    assert any(re.match(r"valid_data_path: \S+a is trained on, too", message) for message in said)


@pytest.mark.parametrize("flag", ["input_dir", "valid_data_path"])
def test_stores_of_two_tokenizers_are_refused_where_the_model_has_none(place, flag):
    for name, meta in (("x", "f"), ("y", "e")):
        with TokenStoreWriter(
            place / "data" / name,
            np.uint16,
            meta={"tokenizer_fingerprint": meta, "tokenizer": name},
        ) as writer:
            writer.add_document(np.arange(2000) % 90)
    both = words(place, (1, "x"), (1, "y"))
    data = {"input_dir": both, "split": "1"}
    if flag == "valid_data_path":
        data = {"input_dir": place / "data" / "x", flag: place / "data" / "y", "do_eval": "true"}
    plan(place, input_dir=words(place, (1, "x"), (1, "a")), split="1")  # of a nothing is known
    with pytest.raises(UserError, match=r"y was made with another tokenizer \(y\) than \S+x \(x\)"):
        plan(place, **data)


RESUMED_WITH = {
    "other weights": ((2, "a"), (1, "b")),
    "another store": ((1, "a"), (1, "c")),
    "another order": ((1, "b"), (1, "a")),
    "one store": ((1, "a"),),
}


@pytest.mark.parametrize("case", RESUMED_WITH)
def test_a_run_under_way_goes_on_with_its_blend_only(case, place):
    same = {"input_dir": words(place, (1, "a"), (1, "b")), "resume_from_checkpoint": "true"}
    make_checkpoint(place, 2, input_dir=same["input_dir"])
    planned = plan(place, **same)
    assert planned.start.sample == 4 and not planned.new_data
    with pytest.raises(
        UserError, match=r"was .*, now it is .* a run that has ended may go on with"
    ):
        plan(place, **{**same, "input_dir": words(place, *RESUMED_WITH[case])})


def test_a_blend_that_is_made_longer_keeps_its_shares(place):
    mix = {"input_dir": words(place, (1, "a"), (2, "b"))}
    first = plan(place, **mix).datasets["train"]
    make_checkpoint(place, 4, **mix)
    longer = plan(place, resume_from_checkpoint="true", max_steps=200, **mix)
    train = longer.datasets["train"]
    assert longer.data_state[checks.LAID_OUT] == [8, 392] and len(train) == 400
    assert [first[n]["input_ids"].tolist() for n in range(8)] == [
        train[n]["input_ids"].tolist() for n in range(8)
    ]
    counts = np.cumsum(np.array(origins(train, 0, 400)) == 0)
    assert (np.abs(counts - np.arange(1, 401) / 3) < 1).all()


def test_a_run_that_has_ended_goes_on_with_other_data(place):
    make_checkpoint(place, 4, input_dir=place / "data" / "a")
    mix = words(place, (1, "b"), (3, "c"))
    flags = {"resume_from_checkpoint": "true", "input_dir": mix}
    longer = plan(place, max_steps=20, **flags)
    train, said = longer.datasets["train"], "; ".join(longer.messages)
    assert "the run had ended and goes on with other data: from sample 8 on it takes 25.0" in said
    assert "the learning rate changes here: update 5 takes 4e-05, on a linear schedule" in said
    assert "jump up" in said and "a lower --learning_rate makes it smaller" in said
    assert longer.start.sample == 8 and len(train) == 40
    assert origins(train, 8, 40).count(1) == 8 and origins(train, 8, 40).count(0) == 0
    with pytest.raises(UserError, match="num_documents was 60, now it is 80"):
        plan(place, max_steps=4, **flags)
    with pytest.raises(UserError, match="seed was 42, now it is 7"):
        plan(place, max_steps=20, seed=7, **flags)

    newest = make_checkpoint(place, 9, max_steps=20, **flags)
    state = json.loads((newest / checkpoints.LOADER_STATE).read_text())
    assert state[checks.BEGINS] == {"sample": 8, "layouts": 1}
    again = plan(place, max_steps=20, **flags)
    assert again.start.sample == 18 and not again.new_data
    seen = [train[n]["input_ids"].tolist() for n in range(8, 40)]
    assert [again.datasets["train"][n]["input_ids"].tolist() for n in range(8, 40)] == seen
    more = plan(place, max_steps=25, **flags)
    assert more.data_state[checks.LAID_OUT] == [32, 10] and len(more.datasets["train"]) == 50


def test_the_jump_of_a_cosine_is_named_and_what_is_named_goes_on_without(place):
    cosine = {"lr_scheduler_type": "cosine", "learning_rate": 0.01, "min_learning_rate": 0.001}
    make_checkpoint(place, 4, **cosine)
    more = {"resume_from_checkpoint": "true", "max_steps": 40}
    said = "; ".join(plan(place, **more, **cosine).messages)
    assert "update 5 takes 0.00978, on a cosine schedule over 40 updates" in said
    assert "cosine over 4, had 0.001: a jump up" in said
    cure = re.search(r"(--lr_scheduler_type constant) (--learning_rate \S+) goes on without", said)
    flags = dict(words.lstrip("-").split() for words in cure.groups())
    again = plan(place, **more, **flags)
    assert not any("the learning rate changes" in message for message in again.messages)


def test_warm_up_and_decay_in_tokens(place):
    """An update takes 2 samples of 16 tokens."""
    base = {"max_steps": 20, "learning_rate": 1, "lr_scheduler_type": "wsd"}
    pairs = (
        ({"warmup_tokens": 150}, {"warmup_steps": 5}),
        ({"decay_tokens": 320}, {"decay_steps": 10}),
        ({"decay_tokens": 321, "warmup_tokens": 1}, {"decay_steps": 11, "warmup_steps": 1}),
        (
            {"decay_tokens": 480, "lr_scheduler_type": "cosine"},
            {"decay_steps": 15, "lr_scheduler_type": "cosine"},
        ),
    )
    for tokens, steps in pairs:
        rates = []
        for flags in (tokens, steps):
            arguments = groups(place, **base | flags)
            checks_plan = plan_of(arguments)
            rates.append([rate_of(arguments[-1], checks_plan.max_steps)(n) for n in range(20)])
        assert rates[0] == rates[1] and len(set(rates[0])) > 4


def plan_of(arguments):
    from llm.train.pretrain_plan import plan_run

    return plan_run(*arguments)


def test_tokens_are_counted_from_where_the_batch_changed(place):
    """After 4 updates of 32 tokens an update takes 64: a warm-up of 256 ends after 6."""
    flags = {"warmup_tokens": 256, "train_tokens": 2560, "max_steps": None, "learning_rate": 1}
    make_checkpoint(place, 4, **flags)
    arguments = groups(place, resume_from_checkpoint="true", per_device_train_batch_size=4, **flags)
    planned = plan_of(arguments)
    assert planned.max_steps == 4 + (2560 - 128) // 64
    assert arguments[-1].total_warmup_steps(planned.max_steps) == 6
    rate = rate_of(arguments[-1], planned.max_steps)
    assert rate(6) == 1 and rate(5) < 1
