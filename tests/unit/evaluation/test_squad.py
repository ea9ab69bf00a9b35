"""SQuAD figures against a second implementation, PaddleNLP's, and numbers worked out by hand."""

import json
import string

import pytest

from common.errors import UserError
from llm.evaluation import squad
from llm.evaluation.squad import SQUAD, normalize

# Prediction, acceptable answers.
PAIRS = [
    ("Denver Broncos", ["Denver Broncos", "The Denver Broncos"]),
    ("the  Denver\tBroncos.", ["Denver Broncos"]),
    ("Broncos of Denver", ["Denver Broncos", "Broncos"]),
    ("a", ["the"]),
    ("", ["Denver"]),
    ("", [""]),
    ("!!!", ["???"]),
    ("An apple a day", ["apple day", "apples"]),
    ("theatre an-other", ["theatre another", "atre other"]),
    ("it's Saint's", ["its Saints", "it s Saint s"]),
    ("five five five", ["five", "five five"]),
    ("to be or not to be", ["not to be", "be to"]),
    ("1,000,000", ["1000000", "1 000 000"]),
    ("$12.50 (twelve)", ["12.50", "1250 twelve"]),
    ("Ünïcödé THE Straße", ["ünïcödé straße", "unicode strasse"]),
    ("“quoted” — dash", ["quoted dash", "“quoted” — dash"]),
    ("答案 the 答案", ["答案 答案", "答案"]),
    ("a_the_an", ["athean", ""]),
    ("the\u00a0answer", ["answer"]),
    ("x a", ["a x", "x"]),
]


def plain(text):
    """Normalise by walking over characters, without regular expressions or tables."""
    kept = [c for c in text.lower() if c not in string.punctuation]
    words, word = [], []
    for c in [*kept, " "]:
        if c.isalnum():
            word.append(c)
            continue
        if word and "".join(word) not in ("a", "an", "the"):
            words += word
        elif word:
            words.append(" ")
        word = []
        words.append(c)
    return " ".join("".join(words).split())


def slow_f1(prediction, answer):
    """Count common words by crossing them off."""
    left, right = plain(prediction).split(), plain(answer).split()
    rest, common = list(right), 0
    for word in left:
        if word in rest:
            rest.remove(word)
            common += 1
    return 2 * common / (len(left) + len(right)) if common else 0.0


@pytest.mark.parametrize(("prediction", "answers"), PAIRS)
def test_figures_are_those_of_the_second_implementation(prediction, answers):
    assert normalize(prediction) == plain(prediction)
    assert SQUAD.exact_match(prediction, answers) == max(
        plain(prediction) == plain(a) for a in answers
    )
    assert SQUAD.f1(prediction, answers) == pytest.approx(
        max(slow_f1(prediction, a) for a in answers)
    )


def test_figures_worked_out_by_hand():
    assert normalize("The  (U.S.) a Navy!") == "us navy"
    assert SQUAD.exact_match("the Cat", ["cat"]) == 1
    assert SQUAD.exact_match("cats", ["cat"]) == 0
    # Two of three predicted words, two of two true ones.
    assert SQUAD.f1("Broncos of Denver", ["Denver Broncos"]) == pytest.approx(0.8)
    # Words count as often as they occur in both.
    assert SQUAD.f1("five five five", ["five five"]) == pytest.approx(0.8)
    # Official v1.1: two empty answers are equal, but share no word.
    assert (SQUAD.exact_match("a", ["the"]), SQUAD.f1("a", ["the"])) == (1, 0)


def test_figures_are_paddlenlps_on_ascii_words():
    metrics = pytest.importorskip("paddlenlp.metrics.squad")
    for prediction, answers in PAIRS:
        for answer in answers:
            # It follows v2.0 where nothing is left, and drops Chinese punctuation too.
            if prediction.isascii() and answer.isascii() and plain(prediction) and plain(answer):
                assert SQUAD.f1(prediction, [answer]) == pytest.approx(
                    metrics.compute_f1(answer, prediction)
                )
                assert SQUAD.exact_match(prediction, [answer]) == metrics.compute_exact(
                    answer, prediction
                )


def dataset(*questions):
    asked = [
        {"id": key, "question": "?", "answers": [{"text": a, "answer_start": 0} for a in answers]}
        for key, answers in questions
    ]
    return {
        "version": "1.1",
        "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": asked}]}],
    }


def test_files_are_scored_and_missing_answers_are_wrong(tmp_path):
    content = dataset(("1", ["cat"]), ("2", ["red dog", "dog"]), ("3", ["bird"]), ("4", ["x"]))
    (tmp_path / "data.json").write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "said.json").write_text(
        json.dumps({"1": "A cat.", "2": "the big red dog", "3": "fish", "9": "unasked"}), "utf-8"
    )
    got = squad.score(
        squad.read_questions(tmp_path / "data.json"),
        squad.read_predictions(tmp_path / "said.json"),
    )
    assert got["exact_match"] == pytest.approx(25)
    assert got["f1"] == pytest.approx(25 * (1 + 0.8 + 0 + 0))
    assert (got["total"], got["missing"]) == (4, 1)


def test_real_file(shared_data):
    questions = squad.read_questions(shared_data / "squad_v1.1_fixture.json")
    first = {question.id: question.answers[0] for question in questions}
    assert squad.score(questions, first) == {
        "exact_match": 100,
        "f1": 100,
        "total": len(questions),
        "missing": 0,
    }


BAD_DATA = {
    "not JSON": ("{", "is not valid JSON"),
    "another layout": ("[]", "is not in SQuAD v1.1's layout"),
    "no questions": (json.dumps({"data": []}), "has no questions"),
    "repeated id": (
        json.dumps(dataset(("1", ["x"]), ("1", ["y"]))),
        "two questions have the id '1'",
    ),
    "no text": (json.dumps(dataset(("7", [3]))), "an answer of question '7' has to be text, not 3"),
    "a key twice": ('{"data": [], "data": []}', "the key 'data' stands twice in one object"),
    "unanswerable": (json.dumps(dataset(("7", []))), "question '7' has no answers; SQuAD v2"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_datasets(tmp_path, case):
    content, message = BAD_DATA[case]
    (tmp_path / "data.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        squad.read_questions(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "has to hold one JSON object of question ids to answers"),
        ('{"1": 2}', "the answer to '1' has to be text, not 2"),
        ('{"1": "a", "1": "b"}', "the key '1' stands twice in one object"),
    ],
)
def test_bad_predictions(tmp_path, content, message):
    (tmp_path / "said.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        squad.read_predictions(tmp_path / "said.json")
    with pytest.raises(UserError, match=r"cannot read .*absent.json: No such file"):
        squad.read_predictions(tmp_path / "absent.json")


def test_unrelated_predictions():
    question = squad.Question("1", "c", "q", ("x",))
    with pytest.raises(UserError, match="none of the 1 predictions has the id of one of the 1"):
        squad.score([question], {"2": "x"})
    with pytest.raises(UserError, match="there are no questions"):
        squad.score([], {})
    with pytest.raises(UserError, match="a question without answers cannot be scored"):
        SQUAD.f1("x", [])
