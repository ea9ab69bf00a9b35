"""Prefix tuning: what it computes, what is trained, what is on disk, and cached generation."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from common.errors import UserError
from llm.engine.batch import Batch
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.llama.adapters.lora import LoRAConfig, add_lora, trainable_parameters
from llm.llama.adapters.prefix import (
    PROJECTION_NAME,
    PrefixConfig,
    add_prefix,
    load_prefix,
    save_prefix,
)
from llm.llama.config import RopeScaling
from llm.llama.export import export_program
from tests.unit.llama.adapters.adapter_models import (
    TINY,
    base,
    draw_ids,
    gradients,
    logits,
    with_lora,
    with_prefix,
)

IDS = draw_ids(2, 11)
LENGTHS = [1, 7, 16, 20]
GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)


def context_as_prefix(model, ids_1P):
    """Return prompt embeddings that hold what the network itself keeps of a text."""
    length = ids_1P.shape[1]
    runner = DygraphRunner(model, block_size=length)
    runner.allocate(1)
    arrays = (ids_1P.numpy()[0], np.zeros(length, np.int32), np.arange(length, dtype=np.int32))
    runner.run(Batch(*arrays, np.zeros([1, 1], np.int32), np.zeros([1], np.int64)))
    kept = np.stack([cache.numpy()[0] for cache in runner._caches], axis=1)  # [P, 2L, G, D]
    return kept.reshape([length, -1])


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_prefix_can_be_any_context(length, flash):
    """Keys and values of real tokens, put into the prefix, act like those tokens."""
    model = base(use_flash_attention=flash)
    text = draw_ids(1, length + 9, seed=4)
    whole = logits(model, text)[:, length:]
    kept = context_as_prefix(model, text[:, :length])
    add_prefix(model, PrefixConfig(length))
    model.prefix.embedding.weight.set_value(kept)
    rest = text[:, length:]
    np.testing.assert_allclose(logits(model, rest), whole, atol=2e-5)
    both = paddle.concat([rest, rest])
    np.testing.assert_allclose(logits(model, both)[1:], whole, atol=2e-5)
    positions = paddle.arange(9).unsqueeze(0)
    np.testing.assert_array_equal(logits(model, rest, positions), logits(model, rest))


@pytest.mark.parametrize("flash", [False, True])
def test_packed_documents_each_see_the_prefix_and_start_behind_it(flash):
    model = with_prefix(5, model=base(use_flash_attention=flash))
    documents = [draw_ids(1, n, seed=n) for n in (4, 1, 9)]
    alone = np.concatenate([logits(model, ids)[0] for ids in documents])
    positions = np.concatenate([np.arange(n) for n in (4, 1, 9)])
    segments = np.repeat([0, 1, 2], [4, 1, 9])
    packed = logits(
        model,
        paddle.concat(documents, 1),
        *(paddle.to_tensor(a[None]) for a in (positions, segments)),
    )
    np.testing.assert_allclose(packed[0], alone, atol=2e-5)


def uncached(model, prompt):
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(logits(model, paddle.to_tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_cached_generation_is_uncached_generation(length, projection):
    model = with_prefix(length, projection)
    prompts = [[1, 2, 3], [4], list(range(5, 38)), [7, 8, 9, 10], [2, 2]]
    runner = DygraphRunner(model)
    assert length % runner.block_size == 0 and runner.max_model_len == 128 - length
    engine = Engine(runner, max_sequences=3, max_step_tokens=16)
    free = engine.num_free_blocks
    answers = [completion.ids for completion in engine.generate(requests(prompts, GREEDY))]
    assert answers == [uncached(model, prompt) for prompt in prompts]
    assert engine.num_free_blocks == free
    assert len({token for ids in answers for token in ids}) > 5
    plain = Engine(DygraphRunner(base()), max_sequences=3)
    assert [completion.ids for completion in plain.generate(requests(prompts, GREEDY))] != answers


def test_cached_generation_under_dynamic_scaling_assumes_the_whole_context():
    config = TINY.replace(
        max_position_embeddings=24, rope_scaling=RopeScaling(rope_type="dynamic", factor=2.0)
    )
    model = with_prefix(20, model=base(config))
    runner = DygraphRunner(model, max_model_len=60)
    assert runner.max_model_len == 40
    engine = Engine(runner, max_sequences=1)
    prompt = list(range(28))  # with the answer it fills the context to the last position
    answer = engine.generate([Request(prompt, GREEDY)])[0].ids
    last = paddle.to_tensor([prompt + answer[:-1]])
    # Positions up to 59 make the whole pass assume a context of 60, as the cache did.
    row = paddle.concat([last, last[:, :1]], 1)
    best = logits(model, row)[0, 27:39].argmax(-1)
    assert best.tolist() == answer


@pytest.mark.parametrize(
    ("length", "wanted", "block"),
    [(64, 16, 16), (20, 16, 20), (7, 16, 7), (1, 16, 1), (37, 16, 37), (48, 32, 24), (16, 4, 4)],
)
def test_block_size_divides_the_prefix(length, wanted, block):
    assert DygraphRunner(with_prefix(length), block_size=wanted).block_size == block


def test_the_prefix_counts_as_context():
    runner = DygraphRunner(with_prefix(100))
    engine = Engine(runner, max_sequences=1)
    with pytest.raises(UserError, match="make 29, but the limit is 28"):
        engine.check(Request([1] * 17, GREEDY))
    with pytest.raises(UserError, match="a prefix of 100 tokens fills the context of 100"):
        DygraphRunner(with_prefix(100), max_model_len=100)


def test_a_new_cache_holds_the_prefix_as_it_is_now():
    model = with_prefix(8)
    runner = DygraphRunner(model)
    Engine(runner, max_sequences=1).generate([Request([1, 2], GREEDY)])
    weight = model.prefix.embedding.weight
    weight.set_value(-weight.numpy())
    answer = Engine(runner, max_sequences=1).generate([Request([1, 2], GREEDY)])[0].ids
    assert answer == uncached(model, [1, 2])


@pytest.mark.parametrize("projection", [False, True])
def test_gradients_are_numeric_derivatives(projection):
    model = with_prefix(3, projection)
    found = gradients(model, IDS)
    trained = {"prefix.embedding.weight"}
    if projection:
        layers = ("transform.0", "transform.2")
        trained |= {f"prefix.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert found.keys() == trained
    weights = np.random.default_rng(9).standard_normal([2, 11, 50]).astype(np.float32)
    rng = np.random.default_rng(0)
    parameters = dict(model.named_parameters())
    for name, gradient in found.items():
        value = parameters[name].numpy()
        direction = rng.standard_normal(value.shape).astype(np.float32)
        ends = []
        for step in (1e-3, -1e-3):
            parameters[name].set_value(value + np.float32(step) * direction)
            ends.append((logits(model, IDS).astype(np.float64) * weights).sum())
        parameters[name].set_value(value)
        slope = (ends[0] - ends[1]) / 2e-3
        assert (gradient * direction).sum() == pytest.approx(slope, rel=2e-2, abs=0.05), name


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("projection", [False, True])
def test_recomputed_layers_give_the_prefix_the_same_gradients(projection, flash):
    found = [
        gradients(with_prefix(7, projection, base(recompute=r, use_flash_attention=flash)), IDS)
        for r in (False, True)
    ]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert np.abs(value).max() > 0
        np.testing.assert_array_equal(found[1][name], value)


def test_frozen_weights_have_no_optimizer_state_and_do_not_move():
    model = with_prefix(3)
    frozen = {n: p.numpy() for n, p in model.named_parameters() if p.stop_gradient}
    assert frozen.keys() == {name for name, _ in base().named_parameters()}
    assert [p.name for p in model.parameters()] == [name for name, _ in model.named_parameters()]
    assert trainable_parameters(model) == (3 * 64, TINY.num_parameters + 3 * 64)
    optimizer = paddle.optimizer.AdamW(0.1, parameters=model.parameters())
    model(IDS).square().mean().backward()
    optimizer.step()
    state = [key for key in optimizer.state_dict() if key != "LR_Scheduler"]
    assert state and all(key.startswith("prefix.embedding.weight") for key in state)
    for name, value in frozen.items():
        np.testing.assert_array_equal(dict(model.named_parameters())[name].numpy(), value)


def test_equal_seeds_give_equal_starts():
    starts = []
    for seed in (5, 5, 6):
        paddle.rand([seed])
        model = with_prefix(4, True, seed=seed)
        starts.append(np.concatenate([p.numpy().ravel() for p in model.prefix.parameters()]))
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).all()
    transform = with_prefix(4, True).prefix.transform
    assert np.abs(transform[0].weight.numpy()).max() <= 1 / 4  # 16 inputs
    assert 1 / 4 < np.abs(transform[2].weight.numpy()).max() <= 1 / np.sqrt(12)
    wide = with_prefix(100).prefix.embedding.weight.numpy()
    assert wide.std() == pytest.approx(1, rel=0.02) and abs(wide.mean()) < 0.05


@pytest.mark.parametrize("projection", [False, True])
def test_files_are_peft_s(tmp_path, projection):
    model = with_prefix(7, projection)
    save_prefix(model, tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {"prompt_embeddings": (7, 64)}
    raw = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 7,
        "token_dim": 16,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_transformer_submodules": 1,
        "prefix_projection": projection,
        "encoder_hidden_size": 12 if projection else 16,
    }
    assert expected.items() <= raw.items()
    assert (tmp_path / "new" / PROJECTION_NAME).is_file() == projection
    if projection:
        kept = load_file(tmp_path / "new" / PROJECTION_NAME)
        made = np.tanh(
            kept["embedding.weight"] @ kept["transform.0.weight"].T + kept["transform.0.bias"]
        )
        made = made @ kept["transform.2.weight"].T + kept["transform.2.bias"]
        np.testing.assert_allclose(made, tensors["prompt_embeddings"], atol=1e-6)


@pytest.mark.parametrize("projection", [False, True])
def test_round_trip(tmp_path, projection):
    model = with_prefix(7, projection)
    save_prefix(model, tmp_path)
    frozen = load_prefix(base(), tmp_path)
    np.testing.assert_array_equal(logits(frozen, IDS), logits(model, IDS))
    assert trainable_parameters(frozen)[0] == 0
    again = load_prefix(base(), tmp_path, trainable=True)
    np.testing.assert_array_equal(logits(again, IDS), logits(model, IDS))
    wanted, got = gradients(model, IDS), gradients(again, IDS)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)
    # A frozen copy saves what it holds, and takes the stale projection away.
    save_prefix(frozen, tmp_path)
    assert not (tmp_path / PROJECTION_NAME).exists()
    np.testing.assert_array_equal(logits(load_prefix(base(), tmp_path), IDS), logits(model, IDS))


def test_files_are_float32_whatever_mixed_precision_made_of_the_prefix(tmp_path):
    model = with_prefix(3)
    model.to(dtype="bfloat16")
    save_prefix(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert stored.dtype == np.float32
    load_prefix(model, tmp_path)
    value = model.prefix.embedding.weight
    assert value.dtype == paddle.bfloat16
    np.testing.assert_array_equal(value.astype("float32").numpy(), stored)


@pytest.mark.parametrize("projection", [False, True])
def test_loading_fills_a_prefix_that_is_there(tmp_path, projection):
    model = with_prefix(7, projection, seed=1)
    save_prefix(model, tmp_path)
    other = with_prefix(7, projection, seed=2)
    parameters = [id(p) for p in other.parameters()]
    load_prefix(other, tmp_path, trainable=True)
    np.testing.assert_array_equal(logits(other, IDS), logits(model, IDS))
    assert [id(p) for p in other.parameters()] == parameters  # an optimizer still holds them
    load_prefix(with_prefix(3), tmp_path)


def test_one_adapter_at_a_time():
    with pytest.raises(UserError, match="the model has a prefix; one adapter at a time"):
        add_lora(with_prefix(3), LoRAConfig())
    with pytest.raises(UserError, match="has a LoRA adapter; merge it before adding a prefix"):
        add_prefix(with_lora(), PrefixConfig(3))
    with pytest.raises(UserError, match="the model has a prefix already"):
        add_prefix(with_prefix(3), PrefixConfig(3))


def test_export_refuses_a_prefix(tmp_path):
    with pytest.raises(UserError, match="with a prefix cannot be exported"):
        export_program(with_prefix(3), tmp_path / "llama", model_name="x", block_size=16)
    assert not any(tmp_path.iterdir())
