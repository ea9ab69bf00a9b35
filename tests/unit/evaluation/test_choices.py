"""Multiple choice: files, prompts, splitting into tokens, and accuracy by hand."""

import json
import math

import numpy as np
import pytest

from common.errors import UserError
from data.tokenizer import load_tokenizer
from llm.evaluation import choices
from llm.evaluation.choices import Item, read_items, with_shots
from llm.evaluation.encoding import encode_pair, prefix_id
from llm.evaluation.scorer import NetworkScorer, Score
from llm.llama.build import load_model
from llm.llama.config import TINY_NAME

CHINESE = "id,question,A,B,C,D,answer\n0, 一周有几天？ ,五天,六天,七天,八天,C\n"
ENGLISH = ',Question,A,B,C,D,Answer\n0,"Two, and two?",3,4,5,22,B\n1,Up or down?,up,down,,,a\n'


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_NAME)


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_prompts_are_those_of_the_harness(tmp_path):
    (item,) = read_items(write(tmp_path, "ceval.csv", CHINESE))
    assert item.prompt == "一周有几天？\nA. 五天\nB. 六天\nC. 七天\nD. 八天\n答案："
    assert (item.choices, item.gold) == (("A", "B", "C", "D"), 2)
    first, second = read_items(write(tmp_path, "cmmlu.csv", "\ufeff" + ENGLISH))
    assert first.prompt == "Two, and two?\nA. 3\nB. 4\nC. 5\nD. 22\nAnswer:"
    assert (second.choices, second.gold) == (("A", "B"), 0)
    # A letter behind a gap is the name of another column, and an empty choice is none.
    other = "question,A,B,C,E,answer\nq,1,,3,5,C\n"
    (item,) = read_items(write(tmp_path, "gap.csv", other))
    assert (item.choices, item.gold) == (("A", "C"), 1)
    (said,) = read_items(write(tmp_path, "ceval.csv", CHINESE), answer_prompt="选：")
    assert said.prompt.endswith("\n选：")


def test_jsonl_answers_may_be_numbers_letters_or_texts(tmp_path):
    base = {"question": "The sky is", "choices": ["red", "blue"]}
    lines = [
        base | {"answer": 1},
        base | {"answer": "blue"},
        base | {"answer": "B"},
        {"query": "The sky is", "choices": ["red", "blue"], "gold": 1},
        {"query": "The sky is", "choices": ["B", "A"], "gold": "A"},  # the text of a choice
    ]
    text = "\n\n".join(map(json.dumps, lines))
    items = read_items(write(tmp_path, "x.jsonl", text))
    assert [item.gold for item in items] == [1] * 5
    many = {"question": "q", "choices": list("mnopqrstuvwxyz"), "answer": "L"}
    (item,) = read_items(write(tmp_path, "many.jsonl", json.dumps(many)))
    assert item.choices[item.gold] == "x"
    assert items[0].solved == "The sky is blue"


def test_examples_come_before_each_question():
    item, shot = Item("Q:", ("x", "y"), 0), Item("P:", ("u", "v"), 1)
    (made,) = with_shots([item], [shot, shot], "About.\n\n")
    assert made.prompt == "About.\n\nP: v\n\nP: v\n\nQ:"


def test_pairs_split_where_the_context_ends(tokenizer):
    context, continuation = encode_pair(tokenizer, "The sky is", " blue")
    assert context == tokenizer.encode("The sky is", add_bos=True)
    assert context + continuation == tokenizer.encode("The sky is blue", add_bos=True)
    # A blank at the end of the context belongs to what follows.
    assert encode_pair(tokenizer, "The sky is ", "blue") == (context, continuation)
    assert encode_pair(tokenizer, "", "blue") == ([prefix_id(tokenizer)], tokenizer.encode("blue"))
    bare = encode_pair(tokenizer, "The", " sky", add_bos=False)
    assert bare[0][0] != tokenizer.bos_id


class Known:
    """A scorer whose log-likelihoods are given."""

    def __init__(self, logprobs):
        self.logprobs = logprobs

    def loglikelihood(self, requests):
        self.requests = requests
        return [Score(value, False) for value in self.logprobs]


def test_accuracies_by_hand(tokenizer):
    items = [
        Item("p", ("long answer", "x"), 0),  # -12 of 11 characters, -2 of one
        Item("p", ("ab", "答"), 1),  # two characters, one; two bytes, three
        Item("p", ("u", "v"), 1),
    ]
    scorer = Known([-12, -2, -4, -3, -1, -2])
    got = choices.score(scorer, tokenizer, items)
    prompt = tokenizer.encode("p", add_bos=True)
    choice = tokenizer.encode("p long answer")[len(prompt) - 1 :]
    assert scorer.requests[0] == (prompt, choice)  # behind a blank
    assert len(scorer.requests) == 6
    # Sums pick x, 答, u; per character long answer, ab, u; per byte long answer, 答, u.
    assert got["acc"] == pytest.approx(1 / 3)
    assert got["acc_norm"] == pytest.approx(1 / 3)
    assert got["acc_bytes"] == pytest.approx(2 / 3)
    assert got["acc_stderr"] == pytest.approx(np.std([0, 1, 0], ddof=1) / math.sqrt(3))
    assert got["acc_bytes_stderr"] == pytest.approx(np.std([1, 1, 0], ddof=1) / math.sqrt(3))
    assert got["total"] == 3


def test_a_network_chooses_what_it_finds_likeliest(tokenizer):
    model = load_model(TINY_NAME)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 8)
    scorer = NetworkScorer(model)
    texts = ("up", "down", "left", "right")
    totals = [
        scorer.loglikelihood([encode_pair(tokenizer, "Go", f" {text}")])[0].logprob
        for text in texts
    ]
    items = [Item("Go", texts, gold) for gold in range(4)]
    assert choices.score(scorer, tokenizer, items)["acc"] == 0.25
    best = int(np.argmax(totals))
    assert choices.score(scorer, tokenizer, [items[best]])["acc"] == 1


BAD = {
    "suffix": ("x.txt", "x", "multiple choice is read from .jsonl or .csv files"),
    "empty": ("x.jsonl", "\n", "has no questions"),
    "broken": ("x.jsonl", '{"question"', "x.jsonl:1: not JSON: Expecting"),
    "no object": ("x.jsonl", "[]\n[]", r"x.jsonl:1: a question has to be an object, not \[\]"),
    "no choices": ("x.jsonl", '{"question": "q"}', "x.jsonl:1: choices is missing among question"),
    "one choice": (
        "x.jsonl",
        '{"question": "q", "choices": ["a"], "answer": 0}',
        "a list of two or more",
    ),
    "empty question": (
        "x.jsonl",
        '{"question": " ", "choices": ["a", "b"], "answer": 0}',
        "the question has to be non-empty text",
    ),
    "answer number": (
        "x.jsonl",
        '{"question": "q", "choices": ["a", "b"], "answer": 2}',
        "answer 2 is none of the 2 choices; give a number from 0 to 1, a letter from A to B",
    ),
    "answer truth": (
        "x.jsonl",
        '{"question": "q", "choices": ["a", "b"], "answer": true}',
        "answer True is none of the 2 choices",
    ),
    "answer number of many": (
        "x.jsonl",
        json.dumps({"question": "q", "choices": [str(n) for n in range(40)], "answer": 40}),
        "none of the 40 choices; give a number from 0 to 39, or the choice's text",
    ),
    "answer twice": (
        "x.jsonl",
        '{"question": "q", "choices": ["a", "a"], "answer": "a"}',
        "x.jsonl:1: answer 'a' is the text of two choices; give its number",
    ),
    "two questions": (
        "x.jsonl",
        '{"question": "q", "query": "p", "choices": ["a", "b"], "answer": 1}',
        "x.jsonl:1: question and query mean the same; leave one of them",
    ),
    "two answers": (
        "x.jsonl",
        '{"question": "q", "choices": ["a", "b"], "answer": 1, "gold": 0}',
        "x.jsonl:1: answer and gold mean the same; leave one of them",
    ),
    "no text": (
        "x.jsonl",
        '{"question": "q", "choices": ["a", "b\\ud800"], "answer": 1}',
        r"x.jsonl:1: the text holds the lone surrogate \\ud800",
    ),
    "header": ("x.csv", "q,a\n1,2\n", "x.csv:1: the header has no 'question' among 'q', 'a'; the"),
    "letter": ("x.csv", "question,A,B,answer\nq,1,2,C\n", "x.csv:2: answer 'C' is not one of the"),
    "letter of no choice": (
        "x.csv",
        "question,A,B,C,answer\nq,1,,3,B\n",
        "x.csv:2: answer 'B' is not one of the choices A, C",
    ),
    "blank": ("x.csv", "question,A,B,answer\nq,1,,A\n", "x.csv:2: a question and at least two"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    name, text, message = BAD[case]
    with pytest.raises(UserError, match=message):
        read_items(write(tmp_path, name, text))


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*absent.csv: No such file"):
        read_items(tmp_path / "absent.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"x\.csv:1: not UTF-8 at byte 0"):
        read_items(tmp_path / "x.csv")
