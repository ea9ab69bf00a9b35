"""Needles in haystacks: where they lie, how long contexts are, tables, and going on."""

import json
import re
import runpy
import sys

import pytest

from common.errors import UserError
from data.tokenizer import load_tokenizer
from llm.evaluation import asking
from llm.evaluation.needle import CHINESE, ENGLISH, default_lengths, hide, is_found, make_trials
from llm.evaluation.question_report import NeedleResults, heat_map, needle_table
from llm.evaluation.report import Result
from llm.evaluation.text_files import documentation, library_modules
from llm.llama.build import build_model, save_model
from llm.llama.config import TINY_NAME, load_config

TEXT = " ".join(f"Sentence {number} says nothing of use; it is short." for number in range(400))
HAN = "".join(f"第{number}句没有什么用。它很短，" for number in range(400))


@pytest.mark.parametrize(
    ("depth", "place", "before", "after"),
    [
        (0, 0, "", " Aa. Bb! Cc?"),
        (20, 0, "", " Aa. Bb! Cc?"),  # the first sentence has not ended yet
        (40, 40, "Aa. ", " Bb! Cc?"),
        (70, 40, "Aa. ", " Bb! Cc?"),
        (80, 80, "Aa. Bb! ", " Cc?"),
        (100, 100, "Aa. Bb! Cc?", ""),
    ],
)
def test_a_needle_lies_where_a_sentence_ends(depth, place, before, after):
    text = "Aa. Bb! Cc?"
    place = place * 10 / len(text) if 0 < place < 100 else place
    gap = " " if depth == 100 else ""
    assert hide(text, "<needle>", depth, " ") == (
        f"{before}{gap}<needle>{after}",
        pytest.approx(place),
    )


def test_a_chinese_needle_needs_no_blanks():
    assert hide("甲乙。丙丁。", "<针>", 60, "") == ("甲乙。<针>丙丁。", 50)
    assert hide("甲乙。”丙丁。", "<针>", 60, "")[0] == "甲乙。”<针>丙丁。"


# Text without a sentence's end, without blanks, and of many tokens a character.
BARE = {
    "words": "word " * 9000,
    "code": "x = foo(bar)\n" * 3000,
    "one letter": "a" * 60000,
    "base64": "QUJD" * 9000,
    "han": "字" * 5000,
    "thai": "ภาษาไทย" * 1000,
    "emoji": "😀" * 5000,
    "long words": ("Ab cd. " * 20 + "x" * 3000) * 5,
}


@pytest.mark.parametrize("text", BARE.values(), ids=BARE)
def test_contexts_are_filled_where_no_sentence_or_word_ends(text):
    tokenizer = load_tokenizer(TINY_NAME)

    def count(whole, question):
        return len(
            asking.encode_prompt(tokenizer, asking.needle_prompt(whole, question, chat=False))
        )

    for one in make_trials(
        text, (256, 512), (0, 30, 100), 1, answer=20, context=999, chat=False, count=count
    ):
        assert one.length - 40 < count(one.text, one.question) + 20 <= one.length
        assert abs(one.place - one.depth) < 6


@pytest.mark.parametrize(("text", "wording"), [(TEXT, ENGLISH), (HAN, CHINESE)])
@pytest.mark.parametrize("chat", [False, True])
def test_contexts_are_filled_and_hold_one_needle(text, wording, chat):
    tokenizer = load_tokenizer(TINY_NAME)

    def count(whole, question):
        asked = asking.needle_prompt(whole, question, chat=chat)
        return len(asking.encode_prompt(tokenizer, asked))

    lengths, depths = (300, 512), (0, 30, 100)
    trials = list(
        make_trials(text, lengths, depths, 2, answer=20, context=999, chat=chat, count=count)
    )
    assert [(one.length, one.depth, one.index) for one in trials] == [
        (length, depth, index) for length in lengths for depth in depths for index in range(2)
    ]
    assert len({one.number for one in trials}) == len(trials)
    for one in trials:
        used = count(one.text, one.question) + 20
        assert one.length - 40 < used <= one.length
        before, needle, after = one.text.partition(one.needle)
        assert needle and one.number in needle and one.number not in before + after + text
        hay = before + after
        assert abs(one.place - one.depth) < 100 * 60 / len(hay)
        assert 100 * len(before) / len(hay) == pytest.approx(one.place, abs=1)
        left, right = before.rstrip(), after.lstrip()
        assert text.startswith(left) and (not left or re.search("[.。，,;]$", left) or not right)
        assert right in text
        (name,) = [name for name in wording.names if name in one.question]
        assert name in one.needle
    sizes = {len(one.text) - len(one.needle) for one in trials if one.length == 512}
    assert max(sizes) - min(sizes) <= 2  # one haystack for all


def test_the_same_again_and_documentation_for_long_contexts():
    asked = {
        "answer": 8,
        "context": 999,
        "chat": False,
        "count": lambda text, question: len(text + question) // 4,
    }
    one, other = (list(make_trials(TEXT, (500,), (50,), 2, **asked)) for _ in range(2))
    assert one == other
    assert default_lengths(8192) == [1024, 2048, 4096, 8192]
    assert (default_lengths(600), default_lengths(200)) == ([300, 600], [200])
    texts = [text for text, _ in zip(documentation(library_modules()), range(99), strict=False)]
    assert sum(map(len, texts)) > 10_000 and all(text.strip() == text for text in texts)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("1234567", True),
        ("It is 1,234,567.", True),
        ("是1234567。", True),
        ("12345678", False),
        ("01234567", False),
        ("1234 567", False),
        ("", False),
    ],
)
def test_answers(answer, found):
    assert is_found(answer, "1234567") is found


def test_lengths_without_room_or_text_and_their_cures():
    def trials(*lengths):
        count = lambda text, question: len((text + question).split())  # noqa: E731
        return list(
            make_trials(TEXT, lengths, (0, 50), 3, answer=10, context=9999, chat=False, count=count)
        )

    with pytest.raises(
        UserError, match=r"context_lengths=60 holds no text: .* at least (\d+)"
    ) as e:
        trials(60)
    least = int(re.search(r"at least (\d+)", str(e.value))[1])
    assert trials(least)
    with pytest.raises(UserError, match=r"context_lengths=5000 exceeds the text, which .*") as e:
        trials(5000)
    most = int(re.search(r"comes to (\d+) tokens", str(e.value))[1])
    assert trials(most) and most > 3000


def results():
    """Two lengths and two depths; one cell was not tried."""
    cells = [(128, 50, 0), (64, 50, 1), (64, 0, 1), (64, 0, 0), (128, 50, 0)]
    return [
        Result("needle", "f", {"context_length": a, "depth": b, "trial": 0}, {"found": float(c)})
        for a, b, c in cells
    ]


def test_a_table_by_hand(tmp_path):
    rows = [line.split() for line in needle_table(results()).splitlines()]
    assert [row for row in rows[1:] if not row[0].startswith("--")] == [
        ["depth,", "%", "64", "128", "all", "lengths"],
        ["0", "0.50", "-", "0.50"],
        ["50", "1.00", "0.00", "0.33"],
        ["all", "depths", "0.67", "0.00", "0.40"],
    ]
    means = NeedleResults.averages(results())
    assert means["all"]["found"] == 0.4 and means["all"]["total"] == 5
    assert means["context_length"][0] == {
        "context_length": 64,
        "found": pytest.approx(2 / 3),
        "total": 3,
        "found_stderr": pytest.approx(1 / 3),
    }
    assert [(one["context_length"], one["depth"]) for one in means["cells"]] == [
        *((64, 0), (64, 50), (128, 50)),
    ]
    figure = heat_map(results())
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == [[0.5, None], [1.0, 0.0]]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0%", "100%", "50%"]
    figure.savefig(tmp_path / "map.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("needles")
    config = load_config(TINY_NAME).replace(max_position_embeddings=256)
    save_model(build_model(config, seed=4), root / "model")
    load_tokenizer(TINY_NAME).save(root / "model")
    (root / "hay.txt").write_text(TEXT, "utf-8")
    return root


def run_main(repo, *words):
    script = runpy.run_path(str(repo / "evaluate_generation.py"))
    old, sys.argv = sys.argv, ["x", *map(str, words)]
    try:
        script["main"]()
    finally:
        sys.argv = old


ANSWER = ("--max_answer_tokens", "5")


def words(place, *more):
    return (
        *("--model_name_or_path", place / "model", "--task", "needle", "--data_file"),
        *(place / "hay.txt", *(() if "--max_answer_tokens" in more else ANSWER), *more),
    )


def test_a_run_that_ended_early_goes_on(place, repo, tmp_path, monkeypatch, capsys):
    file, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    asked = []

    def score(self, answer):
        """Find what lies in the middle or deeper; end with the third question."""
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(self.trial.length)
        return {"found": float(self.trial.depth >= 50)}

    monkeypatch.setattr(asking.NeedleTask, "score", score)
    line = words(place, "--context_lengths", 250, 150, "--depths", 100, 0, "--output_file", file)
    with pytest.raises(KeyboardInterrupt):
        run_main(repo, *line)
    assert asked == [150, 150]
    assert len(partial.read_text("utf-8").splitlines()) == 2
    asked.clear()
    run_main(repo, *line)
    assert asked == [250, 250] and not partial.exists()
    content = json.loads(file.read_text("utf-8"))
    assert content["averages"]["all"] == {
        "found": 0.5,
        "found_stderr": pytest.approx((0.25 / 3) ** 0.5),
        "total": 4,
    }
    assert content["settings"]["stop"] == ["\n"]
    said = capsys.readouterr().out
    assert "needles found, of 4" in said and "chart: " in said
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for one in content["results"]:
        length, tokens = one["settings"]["context_length"], one["settings"]["tokens"]
        assert length - 40 < tokens + 5 <= length


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--context_lengths", "257"), "context_lengths=257 exceeds the model's context of 256"),
        (("--context_lengths", "40"), "context_lengths=40 holds no text: .*; give at least 1"),
        (
            ("--context_lengths", "250", "--max_answer_tokens", "240"),
            r"the answer 240; \d+ tokens are needed, but the model's context has 256; a smaller",
        ),
        (("--context_lengths", "200", "200"), "context_lengths=200 is given twice"),
        (("--depths", "101"), "depths=101.0 but the maximum is 100"),
        (("--depths", "-1"), "depths=-1.0 but the minimum is 0"),
        (("--num_trials", "0"), "num_trials=0 but the minimum is 1"),
        (("--limit", "3"), "limit has no effect beside task=needle"),
        (("--output_file", "map.png"), r"name it \.json"),
        (("--batch_size", "3"), "batch_size has no effect beside task=needle"),
        (("--data_file", "nowhere.txt"), "there is no file nowhere.txt"),
        (
            ("--apply_chat_template", "--add_bos_token", "false"),
            "add_bos_token has no effect beside",
        ),
        (("--chat_template", "plain"), "add --apply_chat_template, or drop chat_template"),
    ],
)
def test_bad_input_is_refused_before_any_model(place, repo, more, message, monkeypatch):
    monkeypatch.setattr("llm.engine.opening.open_model", pytest.fail)
    with pytest.raises(UserError, match=message):
        run_main(repo, *words(place, *more))
