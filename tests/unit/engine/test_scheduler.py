"""Random loads over a cache that remembers: nobody notices who else runs, and no block is lost."""

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest

from common.errors import UserError
from llm.engine.batch import Batch, Part
from llm.engine.blocks import BlockManager, block_key
from llm.engine.draft_model import DraftModel
from llm.engine.engine import Engine
from llm.engine.request import BrokenLogitsError, Request, SamplingParams, requests
from llm.engine.speculation import PromptLookup
from tests.fuzz.load_cases import differing, draw, drive, room

VOCAB, BLOCK = 50, 4
POISON = 49  # a token whose logits, and all that follow, are nan


class Remembering:
    """A model whose state hangs on every token before it, read from the cache and nowhere else."""

    block_size, vocab_size, max_model_len = BLOCK, VOCAB, 64
    eos_ids = (2,)
    empty = -1.0

    def __init__(self):
        self.steps = []
        self.fails_at = None

    def allocate(self, num_blocks):
        self.cache = np.full([num_blocks, BLOCK], self.empty)

    def clear(self, blocks):
        self.cache[list(blocks)] = 0

    def run(self, batch):
        self.steps.append(batch)
        if len(self.steps) == self.fails_at:
            raise MemoryError("the device is full")
        states = []
        for token, sequence, position in zip(
            batch.ids_T, batch.sequence_T, batch.position_T, strict=True
        ):
            table = batch.block_table_NM[sequence]
            before = 0.5
            if position:
                before = self.cache[table[(position - 1) // BLOCK], (position - 1) % BLOCK]
                assert before != -1.0, "read before it was written"
            state = (before * 997 + token * 31 + 7) % 1009 if token != POISON else np.nan
            self.cache[table[position // BLOCK], position % BLOCK] = state
            states.append(state)
        rows = np.array(states)[batch.rows_n]
        logits = np.sin(np.outer(rows, np.arange(1, VOCAB + 1))).astype(np.float32) * 3
        logits[:, POISON] -= 50
        return logits


def alone(request):
    """Scores and tokens of a request by itself; nothing of one that holds the poison."""
    engine = Engine(Remembering(), max_sequences=1, max_tokens=64, prefix_cache=False)
    handle = engine.add(request)
    while engine.has_work:
        engine.step()
    return [*handle.scores, *handle.produced] if handle.produced else []


class NearlyRight(Remembering):
    """A small model that answers as the large one but for some states."""

    empty = 0.0  # what the prefix cache finds may lack tokens of a small model

    def run(self, batch):
        logits = super().run(batch)
        odd = np.nan_to_num(logits).sum(1) % 1 < 0.3
        logits[odd] = np.roll(logits[odd], 1, axis=1)
        return logits


def drafter(rng):
    """None, or one of each kind."""
    most = rng.choice([1, 3, 6])
    return rng.choice(
        [lambda: None, lambda: PromptLookup(most), lambda: DraftModel(NearlyRight(), most)]
    )()


@pytest.mark.parametrize("tens", range(30))
def test_answers_do_not_depend_on_the_load(eager, tens):
    for seed in range(10 * tens, 10 * tens + 10):
        rng = random.Random(seed)
        made = draw(rng, rng.randrange(2, 14), range(3, POISON), POISON)
        engine = Engine(
            Remembering(), num_blocks=rng.choice([16, 20, 60]), drafter=drafter(rng), **room(rng)
        )
        free = engine.num_free_blocks
        got, leavers = drive(engine, made, rng)
        assert not differing(got, leavers, [alone(request) for request in made]), seed
        assert engine.num_free_blocks == free


def greedy(count):
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


def test_blocks_grow_and_the_last_gives_way():
    """Four answers of 40 tokens in room for two: all are given, with preemption."""
    engine = Engine(Remembering(), max_sequences=4, max_tokens=64, num_blocks=24)
    made = requests([[n + 3] for n in range(4)], greedy(40))
    handles = [engine.add(request) for request in made]
    engine.step()
    assert engine.num_running == 4, "admission by the prompt, not by the longest answer"
    order = []
    while engine.has_work:
        engine.step()
        engine.check_blocks()
        order += [n for n, one in enumerate(handles) if len(one.tokens) == 41 and n not in order]
    assert engine.num_preempted > 0
    assert order[0] == 0, "the first that came is never the one to give way"
    assert [list(one.produced) for one in handles] == [alone(request) for request in made]


def test_priority_and_turns_of_clients():
    engine = Engine(Remembering(), max_sequences=2, max_tokens=64)
    many = [engine.add(Request([5, n], greedy(30), n, client="a")) for n in range(10)]
    engine.step()
    late = engine.add(Request([7], greedy(9), client="b"))
    urgent = engine.add(Request([8], greedy(2), priority=-1, client="a"))
    ended = []
    while engine.has_work:
        engine.step()
        for name, one in (*enumerate(many), ("late", late), ("urgent", urgent)):
            if one.produced and one.produced[-1].finish_reason and name not in ended:
                ended.append(name)
    assert ended.index("urgent") < ended.index("late") < ended.index(2)


def test_no_client_waits_behind_anothers_many_answers():
    """One asks for 64 long answers; each of three that come later begins in the very next step."""
    engine = Engine(Remembering(), max_sequences=4, max_tokens=64)
    many = [engine.add(Request([5, 6, 7], greedy(50), n, client="many")) for n in range(64)]
    engine.step()
    engine.step()
    for client in "abc":
        late = engine.add(Request([ord(client) % 40 + 3], greedy(9), client=client))
        engine.step()
        engine.check_blocks()
        assert late.is_running and late.produced
    running = Counter(one.request.client for one in engine._scheduler.running)
    assert running == {"many": 1, "a": 1, "b": 1, "c": 1}
    equal = engine.add(Request([9], greedy(9), client="d"))
    engine.step()
    assert not equal.is_running, "where each client has one place, the first that came has it"
    while engine.has_work:
        engine.step()
        engine.check_blocks()
    assert engine.num_preempted == 3
    expected = alone(Request([5, 6, 7], greedy(50)))
    assert all(list(one.produced) == expected for one in many)


def test_equal_beginnings_are_computed_once():
    runner = Remembering()
    engine = Engine(runner, max_sequences=8, max_tokens=64, num_blocks=80)
    prompt = tuple(range(3, 33))
    handles = [engine.add(Request((*prompt, n), greedy(4))) for n in range(5)]
    while engine.has_work:
        engine.step()
        engine.check_blocks()
    computed = Counter()
    for batch in runner.steps:
        computed.update(batch.position_T.tolist())
    assert all(computed[position] == 1 for position in range(28)), "even of those that came at once"
    assert [one.num_cached for one in handles] == [0, 28, 28, 28, 28]
    later = engine.add(Request((*prompt, 9), greedy(4)))
    assert len(list(engine.stream(Request((*prompt, 9), greedy(4))))) == 4
    assert later.num_cached == 28


def test_a_whole_prompt_in_the_cache_still_gives_logits():
    engine = Engine(Remembering(), max_sequences=2, max_tokens=64)
    request = Request(tuple(range(3, 11)), greedy(3))
    assert list(engine.stream(request)) == list(engine.stream(request)) == alone(request)


def test_contents_make_room_in_the_order_of_their_use():
    blocks = BlockManager(3, 2)
    keys = [block_key(b"", [n, n]) for n in range(4)]
    for key in keys[:3]:
        held = blocks.allocate(1)
        blocks.publish(held[0], key)
        blocks.free(held)
    blocks.hold(blocks.cached([keys[0]]))
    assert blocks.num_free == 2 and len(blocks.cached(keys[:3])) == 3
    taken = blocks.allocate(1)
    assert not blocks.cached([keys[1]]) and blocks.cached([keys[2]]) and blocks.cached([keys[0]])
    blocks.check([taken, blocks.cached([keys[0]])])


def test_nan_ends_its_own_and_is_not_found_again():
    runner = Remembering()
    engine = Engine(runner, max_sequences=4, max_tokens=64, num_blocks=40)
    prompts = [[3, 4, 5, 6, 7], [3, 4, 5, POISON, 8, 9], [10, 11]]
    got = {n: [] for n in range(3)}
    with pytest.raises(BrokenLogitsError, match="prompt 2 of 3"):
        engine.generate(requests(prompts, greedy(9)), lambda n, token: got[n].append(token))
    engine.check_blocks()
    assert not np.isnan(runner.cache).any()
    assert got[0] == alone(Request(prompts[0], greedy(9))) and not got[1]
    assert got[2] == alone(Request(prompts[2], greedy(9)))


def test_a_failed_step_ends_its_requests_and_no_others():
    runner = Remembering()
    engine = Engine(runner, max_sequences=2, max_tokens=64)
    first, second, third = (engine.add(Request([n], greedy(5))) for n in (3, 4, 5))
    runner.fails_at = 2
    engine.step()
    with pytest.raises(MemoryError):
        engine.step()
    engine.check_blocks()
    assert isinstance(first.error, MemoryError) and isinstance(second.error, MemoryError)
    while engine.has_work:
        engine.step()
    assert list(third.produced) == alone(third.request)


def test_a_samplers_fault_ends_one_sequence(monkeypatch):
    from llm.engine import sampler

    honest = sampler._edited

    def faulty(logits, row):
        if row.sequence.request.prompt_ids == [4]:
            raise ZeroDivisionError("a bug of the sampler")
        return honest(logits, row)

    monkeypatch.setattr(sampler, "_edited", faulty)
    edited = SamplingParams(5, temperature=0, repetition_penalty=1.1, ignore_eos=True)
    engine = Engine(Remembering(), max_sequences=3, max_tokens=64)
    got = {n: [] for n in range(3)}
    with pytest.raises(ZeroDivisionError):
        engine.generate(requests([[3], [4], [5]], edited), lambda n, t: got[n].append(t))
    assert [len(got[n]) for n in range(3)] == [5, 0, 5]
    engine.check_blocks()


def test_planted_faults_of_the_books_are_found():
    engine = Engine(Remembering(), max_sequences=2, max_tokens=64)
    handle = engine.add(Request(list(range(3, 20)), greedy(5)))
    engine.step()
    engine.check_blocks()
    lost = handle.blocks.pop()
    with pytest.raises(AssertionError, match="held"):
        engine.check_blocks()
    handle.blocks.append(lost)
    engine.check_blocks()
    blocks = engine._scheduler.blocks
    blocks._empty.append(lost)
    with pytest.raises(AssertionError, match="lost or in two places"):
        engine.check_blocks()
    blocks._empty.pop()
    with pytest.raises(AssertionError, match="nobody holds it"):
        blocks.free([lost, lost])


def test_ids_of_bias_and_bad_words_are_the_models():
    engine = Engine(Remembering(), max_tokens=64)
    for params, message in (
        (SamplingParams(logit_bias=((50, 1.0),)), "logit_bias has the token id 50"),
        (SamplingParams(bad_words=((3, -1),)), "bad_words has the token id -1"),
    ):
        with pytest.raises(UserError, match=message):
            engine.add(Request([3], params))


def test_prompts_are_scored_whole_in_steps_of_few_rows(monkeypatch):
    """Beside logits of the whole prompt at once, in float64; the cache knows its beginning."""
    monkeypatch.setattr("llm.engine.engine._SCORED_BYTES", 7 * 4 * VOCAB)
    runner = Remembering()
    engine = Engine(runner, max_sequences=4, max_tokens=64, max_step_tokens=64)
    prompt = [3 + n * n % 40 for n in range(40)]
    list(engine.stream(Request(prompt, greedy(2))))
    before = len(runner.steps)
    asked = [
        Request(prompt, dataclasses.replace(greedy(2), prompt_logprobs=count))
        for count in (0, 2, None)
    ]
    scored, listed, plain = engine.generate(asked)
    assert max(len(batch.rows_n) for batch in runner.steps[before:]) <= 7 + 3
    whole = Remembering()
    whole.allocate(10)
    part = Part(prompt, 0, list(range(10)), len(prompt))
    logits = whole.run(Batch.of([part], BLOCK)).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert [one.token_id for one in scored.prompt] == prompt[1:]
    wanted = expected[np.arange(39), prompt[1:]]
    np.testing.assert_allclose([one.logprob for one in scored.prompt], wanted, atol=1e-6)
    assert [one[:2] for one in listed.prompt] == [one[:2] for one in scored.prompt]
    for row, one in zip(expected, listed.prompt, strict=False):
        assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:2].tolist()
        np.testing.assert_allclose([p for _, p in one.top], np.sort(row)[::-1][:2], atol=1e-6)
    assert not plain.prompt and plain.ids == scored.ids == listed.ids


def test_stats_are_what_the_sequences_say():
    """Queries and hits of the prefix cache, added up over requests by hand, gave way or not."""
    engine = Engine(Remembering(), max_sequences=3, max_tokens=64, num_blocks=20)
    rng = random.Random(4)
    beginnings = [[rng.randrange(3, 40) for _ in range(16)] for _ in range(3)]
    prompts = [[*rng.choice(beginnings), rng.randrange(3, 40)] for _ in range(12)]
    handles = [engine.add(Request(prompt, greedy(20))) for prompt in prompts]
    assert (engine.stats.num_running, engine.stats.num_waiting) == (0, 12)
    assert all(one.started is None for one in handles)
    started = {}
    while engine.has_work:
        engine.step()
        stats = engine.stats
        assert stats.num_step_tokens == len(engine.runner.steps[-1].ids_T)
        running = [one for one in handles if one.is_running]
        held = {block for one in running for block in one.blocks}
        for one in running:
            started.setdefault(one, one.started)
        assert stats.num_running == len(running)
        assert stats.num_blocks - stats.num_free_blocks == len(held)
    assert stats.num_preempted == engine.num_preempted > 0
    assert stats.prefix_queries == sum(map(len, prompts))
    assert stats.prefix_hits == sum(one.num_cached for one in handles) > 0
    assert started == {one: one.started for one in handles}, "the first time counts"
    assert stats[-4:-1] == (0, 0, 0), "nothing is guessed without a drafter"
    engine.step()
    assert engine.stats.num_step_tokens == 0, "there was nothing to do"
