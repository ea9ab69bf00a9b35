"""Guesses change no answer: with the model itself, with a second one, and in their distribution."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from test_scheduler import NearlyRight, Remembering
from test_scheduler import alone as remembered

from common.errors import UserError
from common.flags import load
from data.tokenizer import load_tokenizer
from llm.config.generation import OpenArguments
from llm.engine.batch import Batch, part_of
from llm.engine.draft_model import DraftModel
from llm.engine.engine import Engine
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.engine.request import Request, SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.engine.sequence import Sequence
from llm.engine.speculation import PromptLookup, Speculator, StepTimes
from llm.llama.build import build_model, save_model
from llm.llama.config import PRESETS, TINY_NAME
from llm.llama.fused import pack

CONFIG = PRESETS["tiny-random-llama"].replace(num_hidden_layers=2, initializer_range=0.2)


def network(seed=5):
    return build_model(CONFIG, seed=seed, to_pack=True)


def mixed():
    """Greedy and sampled requests, among them prompts that repeat themselves."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 1000, n).tolist() for n in (5, 40, 1)]
    prompts.append(prompts[1] + prompts[1][:9])
    ways = itertools.cycle([{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}])
    fixed = {"max_new_tokens": 30, "ignore_eos": True, "repetition_penalty": 1.1}
    return requests(prompts, [SamplingParams(**next(ways), **fixed) for _ in prompts])


@pytest.mark.parametrize("kind", ["lookup", "itself", "another"])
def test_answers_are_bit_equal(native_ops, eager, kind):
    made = mixed()
    runner = DygraphRunner(pack(network()))
    expected = [Engine(runner, max_sequences=1).generate([request])[0] for request in made]
    drafters = {
        "lookup": lambda: PromptLookup(6),
        "itself": lambda: DraftModel(DygraphRunner(pack(network())), 4),
        "another": lambda: DraftModel(DygraphRunner(pack(network(seed=6))), 4),
    }
    engine = Engine(runner, max_sequences=3, drafter=drafters[kind]())
    assert engine.generate(made) == expected
    engine.check_blocks()
    if kind == "itself":
        # A step may end an answer within its guesses.
        assert 0.9 * engine.num_drafted < engine.num_accepted < 30 * len(made)
    assert engine.num_accepted <= engine.num_drafted


def test_draws_have_the_models_distribution(eager):
    """Chi-square over pairs of tokens, of which the second follows a guess."""
    engine = Engine(
        Remembering(), max_sequences=64, max_tokens=64, drafter=DraftModel(NearlyRight(), 3)
    )
    count = 3000
    params = [SamplingParams(max_new_tokens=3, temperature=1.5, seed=n) for n in range(count)]
    answers = engine.generate(requests([[7, 8]] * count, params))
    assert engine.num_accepted > count / 10
    seconds = [ids[:2] for ids in (one.ids for one in answers) if len(ids) > 1]
    first = max({one for one, _ in seconds}, key=[one for one, _ in seconds].count)
    seen = [second for one, second in seconds if one == first]
    sequence = Sequence.of(Request([7, 8, first]), ())
    sequence.blocks = [0]
    plain = Engine(Remembering(), max_tokens=64).runner
    logits = plain.run(Batch.of([part_of(sequence, 3)], plain.block_size))[0] / 1.5
    shares = np.exp(logits - logits.max())
    expected = shares / shares.sum() * len(seen)
    common = expected >= 5
    observed = np.bincount(seen, minlength=len(shares))
    pairs = [*zip(observed[common], expected[common], strict=True)]
    pairs.append((observed[~common].sum(), expected[~common].sum()))
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    freedom = len(pairs) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), f"{statistic:.1f} of {freedom}"


def learnt(seconds_of, right):
    """Return the guesses a step after a hundred of which so many were right."""
    speculator = Speculator(PromptLookup(8))
    sequence = Sequence.of(Request([1]), ())
    for _ in range(100):
        (length,) = speculator.lengths([(sequence, 100)], 100)
        sequence.drafts = [0] * length
        speculator.learn_time(1 + length, seconds_of(1 + length))
        speculator.learn(sequence, min(right, length))
    return speculator.lengths([(sequence, 100)], 100)[0]


def test_as_many_guesses_as_pay():
    assert learnt(lambda rows: 1 + 0.01 * rows, right=8) == 8, "all right and nearly free"
    assert learnt(lambda rows: 1 + 0.01 * rows, right=2) in (2, 3, 4, 5)
    assert learnt(lambda rows: rows, right=1) == 0, "a row costs as much as it may bring"
    assert learnt(lambda rows: 1 + 0.2 * rows, right=0) == 0, "never right"
    speculator = Speculator(PromptLookup(8))
    speculator.learn_time(3, 1.0)
    waiting = [(Sequence.of(Request([n]), ()), limit) for n, limit in enumerate((0, 3, 9))]
    assert speculator.lengths(waiting, 100)[0] == 0
    assert sum(speculator.lengths(waiting, 2)) == 2, "no more than there is room for"


def test_times_of_steps():
    times = StepTimes()
    for rows, seconds in ((2, 1.0), (6, 3.0), (8, 2.0)):
        times.learn(rows, seconds)
    np.testing.assert_allclose(times.of(np.array([1, 2, 4, 6, 8, 9])), [1, 1, 2, 3, 3, 3.09])
    for _ in range(300):
        times.learn(2, 1.0)
    np.testing.assert_allclose(times.of(np.array([3])), [1.03]), "old times are forgotten"


def test_lookup_goes_on_with_what_came_before():
    drafter = PromptLookup(9)
    sequence = Sequence.of(Request([5, 6, 7, 8, 9, 5, 6]), ())
    assert drafter.propose([(sequence, 3)]) == [[7, 8, 9]]
    assert drafter.propose([(sequence, 7)]) == [[7, 8, 9, 5, 6, 7, 8]], "and repeats itself"
    sequence.tokens += [1, 2, 3]
    assert drafter.propose([(sequence, 3)]) == [[]]
    sequence.tokens += [8, 9]
    assert drafter.propose([(sequence, 3)]) == [[5, 6, 1]]


def test_a_small_model_with_a_short_context_or_with_nan_guesses_nothing(eager):
    request = Request([3, 4, 5], SamplingParams(max_new_tokens=20, temperature=0))

    class Short(Remembering):
        max_model_len = 8

    class Broken(Remembering):
        def run(self, batch):
            return super().run(batch) * np.nan

    for small, most in ((Short(), 10), (Broken(), 0)):
        engine = Engine(Remembering(), max_tokens=64, drafter=DraftModel(small, 4))
        assert list(engine.stream(request)) == remembered(request)
        assert engine.num_drafted <= most


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("draft")
    for name, config in (("model", CONFIG), ("other", CONFIG.replace(vocab_size=1032))):
        save_model(build_model(config, seed=1), root / name)
        load_tokenizer(TINY_NAME).save(root / name)
    return root


def test_the_flags_open_it(places, eager):
    def opened(*words):
        place = load(
            (OpenArguments,), ["--model_name_or_path", f"{places}/model", *words], prog="x"
        )[0]
        return open_model(place, find_model(place))

    request = [Request([5, 9, 5, 9], SamplingParams(max_new_tokens=20, temperature=0))]
    expected = opened().open_engine(2, 64).generate(request)[0].ids
    small = ["--draft_model_name_or_path", f"{places}/model", "--num_speculative_tokens", "3"]
    for words, kind, most in (
        (small, DraftModel, 3),
        (["--prompt_lookup_num_tokens", "4"], PromptLookup, 4),
    ):
        model = opened(*words)
        assert isinstance(model.drafter, kind) and model.drafter.most == most
        engine = model.open_engine(2, 64)
        assert engine.generate(request)[0].ids == expected
        assert (engine.num_drafted > 0) == (kind is DraftModel)
    with pytest.raises(UserError, match=r"another vocabulary .*1032.*--prompt_lookup_num_tokens"):
        opened("--draft_model_name_or_path", f"{places}/other")
