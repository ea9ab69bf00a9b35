"""Answers from Python: what comes back, in what order; best of several; beams beside all."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from llm.engine.batch import Batch, Part
from llm.engine.beam import BeamParams, beam_search
from llm.engine.engine import Engine
from llm.engine.offline import LLM
from llm.engine.request import Request, SamplingParams
from llm.llama.config import TINY_NAME
from tests.unit.engine.test_scheduler import BLOCK, VOCAB, Remembering

GREEDY = SamplingParams(6, temperature=0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def llm():
    return LLM(TINY_NAME, max_num_seqs=3, chat_template="simple")


def test_texts_ids_and_chats_in_order(llm):
    chat = [{"role": "user", "content": "Hello"}]
    ids = llm.model.tokenizer.encode("The sky", add_bos=True)
    seen, ended = [], []
    found = llm.generate(
        ["The sky", ids, chat, "On"],
        GREEDY,
        on_token=lambda number, token: seen.append((number, token.token_id)),
        on_answer=lambda number, answer: ended.append((number, answer.text)),
    )
    assert found[0].ids == found[1].ids and found[0].text == found[1].text
    for number, answer in enumerate(found):
        (alone,) = Engine(llm.model.runner, max_tokens=99).generate(
            [Request(answer.prompt_ids, GREEDY)]
        )
        assert (answer.ids, answer.logprobs) == (alone.ids, alone.logprobs)
        assert [token for place, token in seen if place == number] == alone.ids
        assert answer.finish_reason == alone.finish_reason
        assert len(answer.completion.prompt) == len(answer.prompt_ids) - 1
    assert sorted(ended) == [(number, answer.text) for number, answer in enumerate(found)]
    assert found[2].prompt_ids == llm.model.tokenizer.apply_chat_template(chat)
    assert llm.generate([]) == []


def test_stop_texts_and_several_answers(llm):
    params = SamplingParams(12, temperature=1.5, seed=3, ignore_eos=True)
    several = llm.generate(["a", "b"], params, n=5)
    assert len(several) == 10 and len({tuple(one.ids) for one in several}) == 10
    cut = several[0].text[3:5]
    (ended, *_) = llm.generate(["a"], params, stop=[cut])
    assert ended.text == several[0].text[: several[0].text.find(cut)]
    assert ended.finish_reason == "stop" and len(ended.ids) <= 12
    best = llm.generate(["a", "b"], params, n=2, best_of=5)
    for start in (0, 5):
        means = [np.mean(one.logprobs) for one in several[start : start + 5]]
        order = np.argsort(-np.array(means), kind="stable")[:2]
        kept = best[start // 5 * 2 : start // 5 * 2 + 2]
        assert [one.ids for one in kept] == [several[start + place].ids for place in order]
        assert [one.score for one in kept] == pytest.approx([means[place] for place in order])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 3, "best_of": 2}, "n=3 and best_of=2"),
        ({"params": BeamParams(), "stop": ["x"]}, "beam search knows no best_of, no stop"),
        ({"params": BeamParams(), "n": 5}, "n=5 answers of 4 beams"),
        ({"params": BeamParams(num_beams=600)}, "num_beams=600 looks at .* the model has 1024"),
        ({"params": [GREEDY]}, "2 prompts but 1 sets"),
        ({"params": [BeamParams()] * 2}, "SamplingParams for all, .* BeamParams for all"),
        ({"best_of": 0}, "n=1 and best_of=0"),
        ({"stop": "ab"}, r"stop='ab' is one text; give a list: \['ab'\]"),
        ({"prompts": "ab"}, r"prompts='ab' is one text; give a list"),
        ({"prompts": [5, 6]}, "5 is no prompt"),
        ({"prompts": [[]]}, "at least one"),
        ({"prompts": [[5, 6.5]]}, r"\[5, 6.5\] is no prompt"),
        ({"prompts": [b"ab"]}, "b'ab' is no prompt"),
        ({"prompts": [[{"role": "user", "content": "a"}, "b"]]}, "is no prompt"),
        ({"params": SamplingParams(10**6)}, "make 1000002, but the limit|exceed the model"),
    ],
)
def test_what_does_not_fit(llm, options, message):
    with pytest.raises(UserError, match=message):
        llm.generate(**{"prompts": ["a", "b"]} | options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"modle_dir": "x"}, "LLM: unknown 'modle_dir'; did you mean 'model_dir'"),
        ({"cache_dtype": "int4"}, "LLM: cache_dtype='int4' is not one of"),
        ({"threads": 0}, "threads=0 but the minimum is 1"),
        ({"num_speculative_tokens": 3}, "num_speculative_tokens is given but draft_model"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 has to be at least 1"),
    ],
)
def test_flags_are_checked_as_on_the_command_line(flags, message):
    with pytest.raises(UserError, match=message):
        LLM(TINY_NAME, **flags)


def test_an_open_model_takes_no_flags(llm):
    with pytest.raises(UserError, match="dtype has no effect on a model that is open"):
        LLM(llm.model, dtype="bfloat16")


def test_ids_of_numpy_and_scores_of_the_prompt_with_every_answer(llm):
    ids = llm.model.tokenizer.encode("The sky", add_bos=True)
    params = SamplingParams(3, seed=1, prompt_logprobs=1)
    asked = [ids, np.array(ids), [np.int32(one) for one in ids]]
    (wanted, *_), *others = (llm.generate([one], params, n=2) for one in asked)
    assert all(one[0].ids == wanted.ids for one in others)
    assert len(wanted.completion.prompt) == len(ids) - 1
    for one in llm.generate([ids], params, n=2, best_of=6):
        assert one.completion.prompt == wanted.completion.prompt


def test_beams_find_the_best_of_all_answers():
    """Every answer of two tokens, scored by the model at once; half of all first tokens live on."""
    prompt = [7, 8, 9]
    runner = Remembering()
    found = beam_search(
        Engine(runner, max_sequences=6, max_tokens=64), [prompt], BeamParams(25, 2, 0.7)
    )[0]

    def logprobs(ids):
        runner.allocate(4)
        logits = runner.run(Batch.of([Part(ids, 0, range(4), 1)], BLOCK))[0].astype(np.float64)
        return logits - np.log(np.exp(logits).sum())

    first = logprobs(prompt)
    every = {(2,): first[2]}
    for one in set(range(VOCAB)) - {2}:
        every |= {(one, two): first[one] + p for two, p in enumerate(logprobs([*prompt, one]))}
    scores = {ids: total / len(ids) ** 0.7 for ids, total in every.items()}
    best = sorted(scores, key=lambda ids: -scores[ids])
    assert [beam.ids for beam in found[:10]] == best[:10]
    assert [beam.score for beam in found[:10]] == pytest.approx([scores[ids] for ids in best[:10]])
    assert found[0].logprobs == pytest.approx(
        [first[best[0][0]], *([every[best[0]] - first[best[0][0]]] * (len(best[0]) - 1))]
    )
    assert all(a.score >= b.score for a, b in itertools.pairwise(found))


def test_the_guides_example_runs(capsys):
    page = (Path(__file__).parents[3] / "docs/export_and_infer.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?LLM\(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 10
    exec(code.replace("outputs/first/model", TINY_NAME), {})
    assert "length" in capsys.readouterr().out
