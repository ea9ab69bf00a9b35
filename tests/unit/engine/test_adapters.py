"""Adapters of single requests: the same numbers as one adapter for all, and bits in any company."""

import itertools
import os
import random

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.engine.speculation import PromptLookup
from llm.llama.adapters import per_request
from llm.llama.adapters.lora import LoRAConfig, load_lora, save_lora
from llm.llama.adapters.opening import load_adapter
from llm.llama.adapters.prefix import save_prefix
from llm.llama.fused import pack
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from tests.unit.llama.adapters.adapter_models import TINY, base, with_lora, with_prefix

CONFIGS = {
    "all": LoRAConfig(r=3, lora_alpha=6),
    "some": LoRAConfig(r=9, lora_alpha=4, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "head": LoRAConfig(r=2, target_modules=("lm_head", "v_proj", "up_proj")),
}
LENGTHS = {"short": 5, "long": 21}
NAMES = (None, *CONFIGS, *LENGTHS)
KINDS = {
    "float32": None,
    "bfloat16": None,
    "W8": ("W8",),
    "W4": ("W4", 8),
    "A8W8": ("A8W8",),
}
ALL = os.environ.get("BITS") == "all"
IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, [8, 40]).tolist()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Adapters on disk."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        save_lora(with_lora(config=config, seed=seed), root / name)
    for seed, (name, length) in enumerate(LENGTHS.items()):
        save_prefix(with_prefix(length, seed=seed), root / name)
    return {name: root / name for name in NAMES if name}


def network(kind="float32", ops=None):
    model = base(dtype=kind if kind == "bfloat16" else "float32", ops=ops, to_pack=True)
    if KINDS[kind] is not None:
        quantize_model(model, QuantConfig.of_type(*KINDS[kind]))
    return model if ops else pack(model)


def runner_with(places, model):
    runner = DygraphRunner(model, block_size=8)
    for name, place in places.items():
        runner.adapters.load(name, place)
    return runner


def request(adapter, ids, tokens=6, **more):
    params = SamplingParams(max_new_tokens=tokens, temperature=1, seed=4, ignore_eos=True)
    return Request(ids, params, adapter=adapter, **more)


def answers(engine, asked):
    """Return every token and its log-probability, exactly."""
    return [
        (one.ids, np.asarray(one.logprobs, np.float64).tobytes()) for one in engine.generate(asked)
    ]


def trace(runner, asked):
    """Return the log-probabilities of greedy answers in one batch, with the logits behind them."""
    rows = []
    run = runner.sample
    runner.sample = lambda batch, wanted: (
        rows.append(([row.sequence for row in wanted], runner.run(batch))),
        run(batch, wanted),
    )[1]
    try:
        engine = Engine(runner, max_sequences=len(asked), max_tokens=60)
        handles = [engine.add(one) for one in asked]
        while engine.has_work:
            engine.step()
    finally:
        del runner.sample
    found = {handle: [] for handle in handles}
    for sequences, logits in rows:
        for sequence, row in zip(sequences, logits, strict=False):
            found[sequence].append(row)
    return [(handle.tokens, np.stack(found[handle])) for handle in handles]


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("ops", [None, {"others": "reference"}], ids=["native", "reference"])
def test_a_mixed_batch_against_one_adapter_for_all(places, ops):
    """The oracle runs whole rows through a network that has one adapter, or none."""
    runner = runner_with(places, network(ops=ops))
    asked = [request(name, IDS[n % 8][: 3 + 5 * n]) for n, name in enumerate(NAMES)]
    for one, (tokens, found) in zip(asked, trace(runner, asked), strict=True):
        plain = base()
        alone = load_adapter(plain, places[one.adapter]) if one.adapter else plain
        with paddle.no_grad():
            logits = alone(paddle.to_tensor([tokens[:-1]]))[0].numpy()
            without = base()(paddle.to_tensor([tokens[:-1]]))[0].numpy()
        start = len(one.prompt_ids) - 1
        np.testing.assert_allclose(found, logits[start:], atol=1e-5 * np.abs(logits).max())
        if one.adapter:
            assert np.abs(found - without[start:]).max() > 0.02


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("ops", [None, {"others": "reference"}], ids=["native", "reference"])
def test_steps_lose_no_memory(places, ops, monkeypatch):
    """``paddle.to_tensor`` does (tests/unit/test_paddle_facts.py), so no kind of step calls it."""
    engine = Engine(runner_with(places, network(ops=ops)), max_sequences=12, max_tokens=60)
    more = SamplingParams(
        max_new_tokens=6, temperature=1, top_p=0.9, repetition_penalty=1.2, prompt_logprobs=1
    )
    asked = [request(name, IDS[n % 8][:9]) for n, name in enumerate(NAMES)]
    asked += [
        Request(tuple(IDS[0]), more),
        Request(tuple(IDS[1]), SamplingParams(max_new_tokens=6)),
    ]
    engine.generate(asked)  # some tensors are made once
    monkeypatch.setattr(paddle, "to_tensor", None)
    engine.generate(asked)


@pytest.mark.usefixtures("native_ops")
@pytest.mark.parametrize("packed", [True, False])
def test_a_network_of_tied_embeddings(tmp_path, packed):
    """Packing makes a head of them; no adapter has anything to say there."""
    config = TINY.replace(tie_word_embeddings=True)
    tuned = with_lora(base(config), config=CONFIGS["all"])
    save_lora(tuned, tmp_path / "one")
    model = base(config, to_pack=packed)
    runner = runner_with({"one": tmp_path / "one"}, pack(model) if packed else model)
    ((tokens, found),) = trace(runner, [request("one", IDS[0][:9])])
    with paddle.no_grad():
        logits = tuned(paddle.to_tensor([tokens[:-1]]))[0].numpy()
    np.testing.assert_allclose(found, logits[8:], atol=1e-5 * np.abs(logits).max())


# Of the largest logit. Inputs that are rounded to 8 bits differ by a step where sums differ at all.
@pytest.mark.parametrize(("kind", "limit"), [("W8", 2e-5), ("W4", 2e-5), ("A8W8", 1e-2)])
@pytest.mark.usefixtures("native_ops")
def test_quantized_bases(places, kind, limit):
    """Beside integers, as a LoRA adapter for all requests is."""
    lora = {name: places[name] for name in CONFIGS}
    runner = runner_with(lora, network(kind))
    asked = [request(name, IDS[n][:9]) for n, name in enumerate(lora)]
    for one, (tokens, found) in zip(asked, trace(runner, asked), strict=True):
        model = base()
        quantize_model(model, QuantConfig.of_type(*KINDS[kind]))
        alone = load_lora(model, places[one.adapter])
        with paddle.no_grad():
            logits = alone(paddle.to_tensor([tokens[:-1]]))[0].numpy()
        np.testing.assert_allclose(found, logits[8:], atol=limit * np.abs(logits).max())


@pytest.mark.usefixtures("native_ops")
def test_prefixes_in_a_cache_of_8_bits(places):
    """As one prefix for all: the same numbers stand before the prompt."""
    several = DygraphRunner(network(), block_size=8, cache_dtype="int8")
    for name in LENGTHS:
        several.adapters.load(name, places[name])
        alone = DygraphRunner(load_adapter(base(), places[name]), cache_dtype="int8")
        (got,) = Engine(several, max_tokens=60).generate([request(name, IDS[1][:9])])
        (wanted,) = Engine(alone, max_tokens=30).generate([request(None, IDS[1][:9])])
        assert got.ids == wanted.ids
        np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS if ALL else ("float32", "A8W8"))
def test_bits_alone_and_in_company(places, each_level, kind, eager):
    """Loads of random requests, with few blocks, cut prompts, found beginnings and guesses."""
    if not ALL and each_level not in ("avx2", "avx512_bf16"):
        pytest.skip("make bits runs every level")
    runner = runner_with(places, network(kind))
    pool = [
        request(name, IDS[0][:length], choice=choice, tokens=8)
        for (length, choice), name in itertools.product([(20, 0), (33, 1)], NAMES)
    ]
    engine = Engine(runner, max_sequences=1, max_tokens=60, prefix_cache=False)
    alone = [answers(engine, [one])[0] for one in pool]
    assert len({one for _, one in alone}) == len(alone)
    draws = random.Random(7)
    found = preempted = 0
    for _ in range(40 if ALL else 2):
        engine = Engine(
            runner,
            max_sequences=draws.choice([4, 8]),
            max_tokens=60,
            num_blocks=draws.choice([9, 14]),
            max_step_tokens=draws.choice([9, 17, 64]),
            drafter=draws.choice([None, PromptLookup(3)]),
        )
        chosen = draws.sample(range(len(pool)), draws.randint(5, 12))
        for _ in range(2):  # the second time beginnings are found
            got = answers(engine, [pool[n] for n in chosen])
            assert got == [alone[n] for n in chosen]
            engine.check_blocks()
        preempted += engine.num_preempted
        handles = [engine.add(pool[n]) for n in chosen]
        while engine.has_work:
            engine.step()
        found += sum(handle.num_cached > 0 for handle in handles)
    assert found and preempted


@pytest.mark.usefixtures("native_ops")
def test_an_adapter_s_blocks_are_its_own(places, tmp_path):
    """Neither another adapter nor another one of the same name is answered from them."""
    runner = runner_with(places, network())
    engine = Engine(runner, max_sequences=4, max_tokens=60)
    ids = IDS[0][:32]

    def cached(name):
        handle = engine.add(request(name, ids))
        while engine.has_work:
            engine.step()
        return handle.num_cached, tuple(handle.tokens)

    first = {name: cached(name) for name in NAMES}
    assert {name: count for name, (count, _) in first.items()} == dict.fromkeys(NAMES, 0)
    again = {name: cached(name) for name in NAMES}
    assert again["all"] == (24, first["all"][1]) and again[None] == (24, first[None][1])
    # 5 virtual tokens, 8 to a block: the fourth block ends behind the 27th token of the prompt.
    assert again["short"] == (27, first["short"][1])
    assert again["long"] == (27, first["long"][1])
    runner.adapters.unload("all")
    save_lora(with_lora(config=CONFIGS["all"], seed=9), tmp_path)
    runner.adapters.load("all", tmp_path)
    assert cached("all")[0] == 0


@pytest.mark.usefixtures("native_ops")
def test_unloading_one_that_runs(places):
    """Its requests go on to the same end, new ones are refused, and its memory goes with them."""
    runner = runner_with(places, network())
    engine = Engine(runner, max_sequences=4, max_tokens=60)
    alone = {name: answers(engine, [request(name, IDS[2][:9])])[0] for name in NAMES}
    handles = {name: engine.add(request(name, IDS[2][:9])) for name in ("all", None, "short")}
    engine.step()
    for name in ("all", "short"):
        runner.adapters.unload(name)
        with pytest.raises(UserError, match=f"no adapter '{name}' is loaded; loaded: .*head"):
            engine.add(request(name, IDS[2][:9]))
    assert len(runner.adapters._by_number) == 5
    runner.adapters.load("all", places["some"])
    other = engine.add(request("all", IDS[2][:9]))
    while engine.has_work:
        engine.step()
    for name, handle in handles.items():
        assert [token.token_id for token in handle.produced] == alone[name][0]
    assert [token.token_id for token in other.produced] == alone["some"][0]
    handles.clear()
    del handle
    assert len(runner.adapters._by_number) == 4


@pytest.mark.usefixtures("native_ops")
def test_the_wrong_adapter_s_rows_are_found(places, monkeypatch):
    """A planted fault: rows of the step's first two adapters are exchanged."""
    real = per_request._step
    runner = runner_with(places, network())
    asked = [request(name, IDS[3][:9]) for name in ("all", "some")]
    right = [found for _, found in trace(runner, asked)]

    def exchanged(used, adapter_T):
        return real(used, np.where(adapter_T >= 0, 1 - adapter_T, -1).astype(np.int32))

    monkeypatch.setattr(per_request, "_step", exchanged)
    wrong = [found for _, found in trace(runner, asked)]
    assert all(np.abs(a[0] - b[0]).max() > 0.02 for a, b in zip(right, wrong, strict=True))


def test_refused(places, tmp_path):
    runner = DygraphRunner(base(), block_size=8)
    load, engine = runner.adapters.load, Engine(runner, max_sequences=1, max_tokens=30)
    with pytest.raises(UserError, match="no adapter 'de' is loaded; loaded: none"):
        engine.add(request("de", [1]))
    load("de", places["long"])
    with pytest.raises(UserError, match=r"'de' is loaded already; unload it first"):
        load("de", places["all"])
    with pytest.raises(UserError, match="no adapter 'fr' is loaded; loaded: de"):
        runner.adapters.unload("fr")
    for name in ("", "-x", "a b", "x" * 129, "ä="):
        with pytest.raises(UserError, match="has to be up to 128 letters"):
            load(name, places["all"])
    with pytest.raises(
        UserError, match=r"prefix 'de' of 21 tokens, prompt and answer make 33, .* 32"
    ):
        engine.add(request("de", IDS[0][:6]))
    small = base(TINY.replace(intermediate_size=48))
    with pytest.raises(UserError, match=r"this model needs \[48, 3\]; it is another model's"):
        DygraphRunner(small).adapters.load("x", places["all"])
    tied = base(TINY.replace(tie_word_embeddings=True))
    with pytest.raises(UserError, match=r"adapts lm_head, which this model shares"):
        DygraphRunner(tied).adapters.load("x", places["head"])
    for model in (with_lora(), with_prefix(8)):
        with pytest.raises(UserError, match=r"for all requests .* open the model without it"):
            DygraphRunner(model).adapters.load("x", places["all"])
    with pytest.raises(UserError, match="is not a directory with an adapter"):
        load("x", tmp_path / "nothing")


def test_bytes_are_stated(places):
    runner = runner_with(places, base())
    sizes = {name: runner.adapters.get(name).nbytes for name in runner.adapters.names}
    hidden, heads, groups, ffn = 32, 32, 16, 40
    layer = (hidden + heads) + 2 * (hidden + groups) + (heads + hidden) + 3 * (hidden + ffn)
    assert 0 <= sizes["all"] - 2 * 3 * 4 * layer <= 2 * 7 * (2 * 15 * 4 + 60)
    assert sizes["long"] == 21 * 2 * 2 * groups * 4
