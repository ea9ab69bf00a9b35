"""CMRC 2018's figures against a second implementation, and numbers worked out by hand."""

import json
import runpy
import sys
import unicodedata

import pytest

from common.errors import UserError
from llm.evaluation.cmrc import CMRC, segments
from llm.evaluation.squad import score_pairs

# Prediction, acceptable answers.
PAIRS = [
    ("光荣和ω-force开发", ["光荣和ω-force", "光荣和ω-force开发"]),
    ("《战国无双3》", ["战国无双3"]),
    ("战国无双 3", ["战国无双3"]),
    ("北京大学的校长", ["北京大学", "清华大学校长"]),
    ("大学北京", ["北京大学"]),
    ("1990年，3月", ["1990年3月", "3月"]),
    ("Bob Smith 先生", ["bob smith先生", "史密斯"]),
    ("是 the Big Apple。", ["The big apple"]),
    ("", ["北京"]),
    ("，。", ["："]),
    ("……", ["…"]),
    ("50%的人", ["50%", "50% 的人"]),
    ("3.14 米", ["3.14米"]),
    ("上海上海", ["上海"]),
    ("不知道", ["没有"]),
    ("“北京”、『上海』·「广州」－（深圳）～！", ["北京上海广州深圳"]),
    ("a-b:c_d*e^f/g\\h~i`j+k=l；m’n？o", ["abcdefghijklmno"]),
]
DROPPED = set("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")


def plain(text):
    return "".join(c for c in text.lower().strip() if c not in DROPPED)


def walked(text):
    """Cut by walking over characters: Chinese ones and marks alone, the rest at blanks."""
    found, word = [], ""
    for c in plain(text) + " ":
        chinese = "CJK UNIFIED IDEOGRAPH" in unicodedata.name(c, "")
        if chinese or c.isspace() or c == "%":
            found += [word] if word else []
            word = ""
            found += [] if c.isspace() else [c]
        else:
            word += c
    return ["".join(one) for one in found]


def slow_f1(prediction, answer):
    """Try every run of the prediction, the longest first."""
    one, other = walked(prediction), walked(answer)
    runs = {tuple(other[a:b]) for a in range(len(other)) for b in range(a + 1, len(other) + 1)}
    for size in range(len(one), 0, -1):
        if any(tuple(one[at : at + size]) in runs for at in range(len(one) - size + 1)):
            return 2 * size / (len(one) + len(other))
    return 0.0


@pytest.mark.parametrize(("prediction", "answers"), PAIRS)
def test_figures_are_those_of_the_second_implementation(prediction, answers):
    assert segments(prediction) == walked(prediction)
    assert CMRC.exact_match(prediction, answers) == max(
        plain(prediction) == plain(a) for a in answers
    )
    assert CMRC.f1(prediction, answers) == pytest.approx(
        max(slow_f1(prediction, a) for a in answers)
    )


def test_figures_worked_out_by_hand():
    assert segments("Don't《中国》say 1,000.5元, ok.") == [
        *("do", "n't", "中", "国", "say", "1,000.5", "元", ",", "ok", "."),
    ]
    # Four of seven characters in one run, all four of the answer's.
    assert CMRC.f1("北京大学的校长", ["北京大学"]) == pytest.approx(8 / 11)
    # What is not in one run does not count: two of four.
    assert CMRC.f1("大学北京", ["北京大学"]) == pytest.approx(0.5)
    assert CMRC.exact_match("《北京》大学。", ["北京大学"]) == 1
    # Blanks within count where answers are compared whole, but part no characters.
    assert (CMRC.exact_match("北京 大学", ["北京大学"]), CMRC.f1("北京 大学", ["北京大学"])) == (
        0,
        1,
    )
    assert score_pairs([("北京", ["北京"]), ("大学北京", ["北京大学"])], 4, CMRC) == {
        "exact_match": 25.0,
        "f1": 37.5,
        "total": 4,
        "missing": 2,
    }
    with pytest.raises(UserError, match="a question without answers"):
        CMRC.f1("x", [])


# As NLTK 3.10.4's word_tokenize cuts them, one sentence each.
WORDS = {
    'he said "yes" ("no")': "he said `` yes '' ( `` no '' )",
    '""a': "`` `` a",
    'a."': "a . ''",
    "etc....": "etc ....",
    "3..5 .. x": "3 .. 5 .. x",
    'see u.s.  "': "see u.s. ``",
    "1,000, 5%; [a]{b}<c>": "1,000 , 5 % ; [ a ] { b } < c >",
    "it's we'll don't o'clock": "it 's we 'll do n't o'clock",
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_other_scripts_are_cut_as_the_script_cuts_them(text):
    assert segments(text) == WORDS[text].split()


def test_given_answers_are_scored_as_cmrc_does(repo, tmp_path, capsys):
    asked = [
        {"id": f"DEV_0_QUERY_{n}", "question": "？", "answers": [{"text": a, "answer_start": 0}]}
        for n, a in enumerate(("北京大学", "1990年"))
    ]
    data = {"version": "v1.0", "data": [{"paragraphs": [{"context": "文", "qas": asked}]}]}
    (tmp_path / "dev.json").write_text(json.dumps(data), "utf-8")
    said = {"DEV_0_QUERY_0": "北京大学的校长", "DEV_0_QUERY_1": "1990年。"}
    (tmp_path / "said.json").write_text(json.dumps(said), "utf-8")
    figures = {}
    for task in ("cmrc", "squad"):
        script = runpy.run_path(str(repo / "evaluate_generation.py"))
        out = tmp_path / f"{task}.json"
        words = ["x", "--task", task, "--data_file", tmp_path / "dev.json", "--output_file", out]
        old, sys.argv = (
            sys.argv,
            [str(w) for w in (*words, "--predictions_file", tmp_path / "said.json")],
        )
        try:
            script["main"]()
        finally:
            sys.argv = old
        figures[task] = json.loads(out.read_text("utf-8"))["results"][0]["figures"]
    assert figures["cmrc"]["f1"] == pytest.approx(50 * (8 / 11 + 1))
    assert figures["cmrc"]["exact_match"] == 50
    assert figures["squad"]["f1"] == 0  # whole lines are its words
    assert "cmrc" in capsys.readouterr().out
