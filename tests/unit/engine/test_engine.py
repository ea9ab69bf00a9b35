"""The engine against a loop that recomputes everything, over dygraph and over an export."""

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams, requests
from llm.engine.runners import DygraphRunner, PredictorRunner
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
SHAPES = ("tiny-random-llama", "tiny-llama-2", "tiny-llama-3.1", "tiny-llama-3.2")


def spread(model):
    """Make logits differ clearly, so that no greedy choice hangs on rounding."""
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.set_value(parameter * 10)
    return model


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    model = spread(build_model(PRESETS[request.param], seed=7))
    model.eval()
    return model


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 1024, size).tolist() for size in (1, 5, 16, 17, 40)]


def recompute(model, prompt, count):
    """Greedy decoding without any cache: the second algorithm."""
    ids = list(prompt)
    for _ in range(count):
        with paddle.no_grad():
            logits = model(paddle.to_tensor([ids]))[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    export_program(model, directory / "llama", model_name="tiny", block_size=4, max_model_len=128)
    return directory


@pytest.mark.parametrize("kind", ["dygraph", "exported"])
@pytest.mark.parametrize("max_step_tokens", [512, 7])
def test_greedy_ids_equal_recomputation(model, prompts, exported, kind, max_step_tokens):
    options = {"max_sequences": 3, "max_tokens": 64, "max_step_tokens": max_step_tokens}
    if kind == "dygraph":
        engine = Engine(DygraphRunner(model, block_size=4), **options)
    else:
        engine = Engine(PredictorRunner(exported, "llama", device="cpu", threads=2), **options)
    expected = [recompute(model, prompt, 12) for prompt in prompts]
    assert len({tuple(ids) for ids in expected}) == len(expected)
    batch = engine.generate(requests(prompts, GREEDY))
    assert [c.ids for c in batch] == expected
    assert {c.finish_reason for c in batch} == {"length"}
    single = [engine.generate([Request(prompt, GREEDY)])[0].ids for prompt in prompts]
    assert single == expected
    streamed = [[s.token_id for s in engine.stream(Request(prompt, GREEDY))] for prompt in prompts]
    assert streamed == expected
    assert engine.num_free_blocks == 3 * 16


def test_logprob_is_the_models_own(model, prompts):
    engine = Engine(DygraphRunner(model, block_size=4), max_tokens=64)
    params = SamplingParams(max_new_tokens=1, temperature=1.7, top_k=5, seed=1)
    step = next(engine.stream(Request(prompts[3], params)))
    with paddle.no_grad():
        logits = model(paddle.to_tensor([prompts[3]]))[0, -1]
    expected = paddle.nn.functional.log_softmax(logits)[step.token_id].item()
    assert step.logprob == pytest.approx(expected, abs=1e-4)


def test_interleaved_streams_and_abort(model, prompts):
    engine = Engine(DygraphRunner(model, block_size=4), max_sequences=2, max_tokens=64)
    first, second = (engine.stream(Request(prompts[n], GREEDY)) for n in (2, 3))
    got = [next(first).token_id, next(second).token_id, next(first).token_id]
    assert got[0] == recompute(model, prompts[2], 1)[0]
    assert got[1] == recompute(model, prompts[3], 1)[0]
    assert engine.num_free_blocks < 32
    first.close()
    rest = [step.token_id for step in second]
    assert [got[1], *rest] == recompute(model, prompts[3], 12)
    assert engine.num_free_blocks == 32


def test_stops_at_any_end_token(model, prompts):
    free = recompute(model, prompts[4], 12)
    params = SamplingParams(max_new_tokens=12, temperature=0, stop_ids=(free[3],))
    engine = Engine(DygraphRunner(model, block_size=4), max_tokens=64)
    completion = engine.generate([Request(prompts[4], params)])[0]
    assert completion.ids == free[: free.index(free[3]) + 1]
    assert completion.finish_reason == "stop"


def test_equal_seeds_equal_samples(model, prompts):
    engine = Engine(DygraphRunner(model, block_size=4), max_tokens=64)
    params = SamplingParams(max_new_tokens=12, temperature=1.5, seed=11, ignore_eos=True)
    first, second = engine.generate(requests([prompts[1]] * 2, params))
    assert first.ids == second.ids
    other = SamplingParams(max_new_tokens=12, temperature=1.5, seed=12, ignore_eos=True)
    assert engine.generate([Request(prompts[1], other)])[0].ids != first.ids


BAD_REQUESTS = [
    ([], {}, "no tokens"),
    ([1024], {}, "token id 1024 is outside the vocabulary of 1024"),
    ([-1], {}, "token id -1 is outside"),
    ([1] * 60, {}, "60 tokens and max_new_tokens=12 make 72, but the limit is 64"),
]


@pytest.mark.parametrize(("prompt", "changes", "message"), BAD_REQUESTS)
def test_bad_requests_are_refused(prompt, changes, message):
    engine = Engine(DygraphRunner(build_model(PRESETS["tiny-random-llama"])), max_tokens=64)
    with pytest.raises(UserError, match=message):
        engine.generate([Request(prompt, GREEDY)])
    with pytest.raises(UserError, match=message):
        engine.stream(Request(prompt, GREEDY))
    assert engine.num_free_blocks == 32


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("top_k", 1.5),
        ("logprobs", -1),
        ("seed", 1.5),
        ("temperature", False),
    ],
)
def test_bad_sampling_parameters_are_named(field, value):
    with pytest.raises(UserError, match=f"{field}={value}"):
        SamplingParams(**{field: value})
