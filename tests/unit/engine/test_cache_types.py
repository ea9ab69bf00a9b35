"""A cache in int8: against a network without one, under load, behind a prefix, and refused."""

import itertools

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.engine.draft_model import DraftModel
from llm.engine.engine import Engine
from llm.engine.replay import replay
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner, PredictorRunner
from llm.engine.verify import verify_program
from llm.llama.build import build_model
from llm.llama.cache import block_bytes, choose_cache_dtype
from llm.llama.config import PRESETS
from llm.llama.export import export_program
from llm.llama.fused import pack
from llm.llama.seams import CacheLayout
from tests.unit.external_ops.oracle import through_int8
from tests.unit.llama.adapters.adapter_models import with_prefix

CONFIG = PRESETS["tiny-random-llama"].replace(num_hidden_layers=2, initializer_range=0.2)
IDS = np.random.default_rng(0).integers(3, 50, 50).tolist()
STEPS = [[(0, 0, 20)], [(0, 20, 21)], [(0, 21, 50)]]


def network(ops=None):
    return build_model(CONFIG, seed=5, to_pack=True, ops=ops)


def rounding_heads(model):
    """Let whole rows attend to what a cache of int8 would hold."""
    attention = model.seams.attention

    def attend(q, k, v, segments):
        rounded = (paddle.to_tensor(through_int8(x.numpy())) for x in (k, v))
        return attention(q, *rounded, segments)

    model.seams.attention = attend
    return model


def whole_rows(model):
    """Return the logits of all positions, without a cache."""
    model.eval()
    with paddle.no_grad():
        return model(paddle.to_tensor([IDS]))[0].numpy()


@pytest.mark.parametrize("form", ["native", "reference"])
def test_logits_are_those_of_a_network_without_a_cache(form, request):
    """But for numbers so near a half that they are rounded to the other side: 1 / 127 of a head."""
    if form == "native":
        request.getfixturevalue("native_ops")
        model = pack(network())
    else:
        model = network({"others": "reference"})
    found = replay(DygraphRunner(model, cache_dtype="int8"), [IDS], STEPS)
    plain, rounded = whole_rows(network()), whole_rows(rounding_heads(network()))
    largest = np.abs(plain).max()
    assert np.abs(found - rounded).max() < 3e-3 * largest
    assert np.abs(found - plain).max() > 1e-2 * largest, "the rounding shows"


def test_answers_do_not_depend_on_the_load(native_ops, eager):
    """Few blocks, shared beginnings, cut prompts and guesses, in a crowd and alone."""
    rng = np.random.default_rng(1)
    shared = rng.integers(3, 1000, 36).tolist()
    prompts = [shared + rng.integers(3, 1000, n).tolist() for n in (1, 5, 9)]
    prompts += [shared[:20] * 2, rng.integers(3, 1000, 40).tolist()]
    ways = itertools.cycle([{"temperature": 0}, {"temperature": 0.9, "seed": 3}])
    fixed = {"max_new_tokens": 20, "ignore_eos": True}
    made = requests(prompts, [SamplingParams(**next(ways), **fixed) for _ in prompts])
    runner = DygraphRunner(pack(network()), block_size=4, cache_dtype="int8")
    alone = Engine(runner, max_sequences=1, max_tokens=72, prefix_cache=False)
    expected = [alone.generate([one])[0] for one in made]
    options = {"max_sequences": 4, "max_tokens": 72, "num_blocks": 24, "max_step_tokens": 11}
    drafter = DraftModel(DygraphRunner(pack(network()), block_size=4), 4)
    engine = Engine(runner, **options, drafter=drafter)
    for _ in range(2):  # the second time, beginnings are found
        found = engine.generate(made)
        for one, two in zip(found, expected, strict=True):
            assert (one.ids, one.logprobs) == (two.ids, two.logprobs)
    assert engine.num_preempted and engine.num_drafted
    engine.check_blocks()


def test_behind_a_tuned_prefix():
    """A prefix is rounded as if its keys and values had come of tokens."""
    model = with_prefix(8)
    exact, found = (
        replay(DygraphRunner(model, cache_dtype=dtype), [IDS], STEPS) for dtype in ("auto", "int8")
    )
    prefix = model.seams.prefix

    class Rounded:
        length = prefix.length

        def __call__(self):
            return [
                tuple(paddle.to_tensor(through_int8(x.numpy())) for x in layer)
                for layer in prefix()
            ]

    model.seams.prefix = Rounded()
    rounded = whole_rows(rounding_heads(model))
    assert np.abs(found - rounded).max() < 3e-3 * np.abs(exact).max()
    assert np.abs(found - exact).max() > 1e-4 * np.abs(exact).max()


def test_a_program_of_the_reference(tmp_path):
    """That of native ops is compared bit by bit in test_request_bits.py."""
    model, place = network({"others": "reference"}), tmp_path / "llama"
    options = {"model_name": "tiny", "block_size": 8, "max_model_len": 60}
    manifest = export_program(model, place, **options, cache_dtype="int8")
    assert (manifest.cache_dtype, manifest.dtype) == ("int8", "float32")
    verify_program(model, place, manifest, 1, "cpu")  # in a fresh process
    runner = PredictorRunner(tmp_path, "llama", device="cpu", threads=1)
    assert runner.block_bytes == block_bytes(CONFIG, 8, "int8")


def test_memory_of_a_block():
    shape = PRESETS["llama-3.2-1b"]
    sizes = [block_bytes(shape, 16, dtype) for dtype in ("float32", "bfloat16", "int8")]
    assert sizes == [16 * 2 * 16 * 8 * size for size in (4 * 64, 2 * 64, 64 + 4)]
    runner = DygraphRunner(network(), cache_dtype="int8")
    runner.allocate(3)
    taken = sum(cache.numel().item() * cache.element_size() for cache in runner._caches)
    assert taken == 3 * runner.block_bytes


def test_kernels_that_read_one_type():
    """Paddle's kernel of blocks on GPUs, whatever the network's type."""
    layout = CacheLayout(own_type=True)
    assert choose_cache_dtype(layout, "auto", "bfloat16") == "bfloat16"
    assert choose_cache_dtype(layout, "bfloat16", "bfloat16") == "bfloat16"
    with pytest.raises(UserError, match=r"cache_dtype=int8 is for CPUs.*bfloat16; leave"):
        choose_cache_dtype(layout, "int8", "bfloat16")
