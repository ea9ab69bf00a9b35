"""Packed networks against the networks that they were made of, and their exported programs."""

import dataclasses

import numpy as np
import paddle
import pytest

from common.errors import UserError
from external_ops import native
from external_ops.backend import select_ops
from llm.engine.batch import Batch
from llm.engine.engine import Engine
from llm.engine.request import SamplingParams, requests
from llm.engine.runners import DygraphRunner, PredictorRunner
from llm.engine.verify import verify_program
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import PRESETS
from llm.llama.export import export_program
from llm.llama.fused import pack, pack_where_possible, why_not
from llm.llama.merging import merge_lora
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import dequantize_model, quantize_model
from tests.unit.external_ops import oracle
from tests.unit.llama.adapters.adapter_models import base, with_lora, with_prefix

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
SIZES = {"num_hidden_layers": 2, "vocab_size": 200, "initializer_range": 0.2}
PLAIN = PRESETS["tiny-random-llama"].replace(**SIZES)
SHAPES = {
    "plain": PLAIN,
    "tied": PRESETS["tiny-llama-3.2"].replace(**SIZES),
    "dynamic": PLAIN.replace(
        rope_scaling=dataclasses.replace(PLAIN.rope_scaling, rope_type="dynamic", factor=2.0)
    ),
    "biased": PLAIN.replace(attention_bias=True, mlp_bias=True),
}
pytestmark = pytest.mark.usefixtures("native_ops")


def make(config=PLAIN, quantization=None, **options):
    """Return a network with biases that are not zero."""
    model = build_model(config, seed=5, to_pack=True, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.set_value(paddle.randn(parameter.shape) * 0.2)
    if quantization is not None:
        quantize_model(model, QuantConfig.of_type(*quantization))
    return model


def answers(model):
    """Return greedy ids of prompts in one batch."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, n).tolist() for n in (1, 7, 40)]
    engine = Engine(DygraphRunner(model), max_sequences=3, max_tokens=64, max_step_tokens=24)
    return [one.ids for one in engine.generate(requests(prompts, GREEDY))]


def step_logits(model):
    """Return logits of a prompt and of the token after it."""
    runner = DygraphRunner(model)
    runner.allocate(4)
    ids = np.random.default_rng(1).integers(0, PLAIN.vocab_size, 30)
    table = np.array([[2, 0]], np.int32)
    places = (np.zeros(29, np.int32), np.arange(29, dtype=np.int32), table)
    first = runner.run(Batch(ids[:29], *places, np.arange(29)))
    places = (np.zeros(1, np.int32), np.array([29], np.int32), table)
    return np.concatenate([first, runner.run(Batch(ids[29:], *places, np.zeros(1, np.int64)))])


def whole_logits(model):
    """Return the same from the network in whole rows."""
    ids = np.random.default_rng(1).integers(0, PLAIN.vocab_size, 30)
    with paddle.no_grad():
        return model(paddle.to_tensor(ids[None])).numpy()[0]


@pytest.mark.parametrize("name", SHAPES)
def test_float32_gives_the_ids_and_logits_of_the_network(name):
    model = make(SHAPES[name])
    expected, whole = answers(model), whole_logits(model)
    pack(model)
    assert answers(model) == expected
    np.testing.assert_allclose(whole_logits(model), whole, atol=1e-5)
    if name != "dynamic":  # a paged cache is rotated for the longest context throughout
        np.testing.assert_allclose(step_logits(model), whole, atol=1e-5)


def in_float64(model):
    """Return the logits of a network in float64, weights as they are."""
    names = {name: one.astype("float64") for name, one in model.named_parameters()}
    default = paddle.get_default_dtype()
    paddle.set_default_dtype("float64")
    try:
        wide = LlamaForCausalLM(model.config, select_ops({"others": "reference"}))
    finally:
        paddle.set_default_dtype(default)
    wide.eval()
    for name, parameter in wide.named_parameters():
        parameter.set_value(names[name])
    ids = np.random.default_rng(1).integers(0, PLAIN.vocab_size, 30)
    with paddle.no_grad():
        return wide(paddle.to_tensor(ids[None])).numpy()[0]


@pytest.mark.parametrize("quantization", [("W8",), ("A8W8",), ("W4", 16), ("A8W4", 8)], ids=str)
def test_integers_give_the_logits_of_the_reference(quantization):
    model = make(quantization=quantization)
    plain = whole_logits(model)
    exact = in_float64(dequantize_model(make(quantization=quantization)))
    pack(model)
    assert {layer.qkv.weight.kind[:4] for layer in model.model.layers} == {
        f"int{quantization[0][-1]}"
    }
    assert oracle.within_twice(step_logits(model), plain, exact)


def rounding_inputs(model):
    """Make every linear of a network round its input to bfloat16."""
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, inputs: (inputs[0].astype("bfloat16").astype("float32"),)
            )
    return model


def test_bfloat16_rounds_weights_and_cache(each_level):
    wide = make()
    for parameter in wide.parameters():
        parameter.set_value(parameter.astype("bfloat16").astype("float32"))
    exact = in_float64(wide)
    model = pack(make(dtype="bfloat16"))
    found = step_logits(model)
    error = np.abs(found - exact).max()
    if each_level in ("avx512_bf16", "emulated"):  # these round what they multiply
        assert oracle.within_twice(found, whole_logits(rounding_inputs(wide)), exact)
    else:  # weights and cache alone are rounded
        assert error < 0.01 * np.abs(exact).max()
    assert error > 1e-5
    assert str(DygraphRunner(model).model.model.embed_tokens.weight.dtype).endswith("bfloat16")


def test_what_may_be_traded_for_speed():
    exact = whole_logits(make(quantization=("W4", 16)))
    model = pack(make(quantization=("W4", 16)), round_activations=True, head_type="int8")
    assert model.lm_head.weight.kind == "int8" and model.model.layers[0].o.weight.kind == "int4"
    error = np.abs(step_logits(model) - exact).max() / np.abs(exact).max()
    assert 1e-4 < error < 0.1


def test_adapters():
    lora = with_lora(base())
    assert "LoRALinear; merge the adapter first" in why_not(lora)
    assert not pack_where_possible(lora)
    with pytest.raises(UserError, match="round_activations=True needs packed layers"):
        pack_where_possible(lora, round_activations=True)
    expected = answers(lora)
    assert pack_where_possible(merge_lora(lora)) and answers(lora) == expected
    prefixed = with_prefix(6)
    expected = answers(prefixed)
    assert pack_where_possible(prefixed) and answers(prefixed) == expected


def test_reference_ops_are_not_packed():
    model = build_model(PLAIN, seed=1, ops={"others": "reference"})
    with pytest.raises(UserError, match="not built, or --ops reference"):
        pack(model)
    with pytest.raises(UserError, match="--ops asks for the reference; or use float32"):
        build_model(PLAIN, dtype="bfloat16", ops={"decoder": "reference"}, to_pack=True)
    with pytest.raises(UserError, match="dtype=bfloat16 needs a GPU"):
        build_model(PLAIN, dtype="bfloat16")


def test_bfloat16_checkpoint_is_read(tmp_path):
    save_model(make(), tmp_path)
    loaded = pack(load_model(tmp_path, dtype="bfloat16", to_pack=True))
    np.testing.assert_array_equal(step_logits(loaded), step_logits(pack(make(dtype="bfloat16"))))


@pytest.fixture(scope="module")
def exported(native_ops, tmp_path_factory):
    place = tmp_path_factory.mktemp("packed") / "llama"
    model = make(quantization=("W4", 16))
    pack(model, round_activations=True, head_type="int8")
    return model, place, export_program(model, place, model_name="tiny", block_size=8)


def test_exports_run_in_a_fresh_process(exported):
    model, place, manifest = exported
    assert "llama_ops_decoder" in manifest.ops
    assert manifest.packed_layout == native.PACKED_LAYOUT
    assert verify_program(model, place, manifest, 2, "cpu").tolerance == 0


def test_exports_name_what_they_need(exported, monkeypatch):
    _, place, _ = exported
    with monkeypatch.context() as patch:
        patch.setattr(native, "reason", lambda: "the native ops are not built")
        with pytest.raises(UserError, match=r"native ops .*not built; or export again with --ops"):
            PredictorRunner(place.parent, place.name, device="cpu", threads=1)
    monkeypatch.setattr(native, "PACKED_LAYOUT", native.PACKED_LAYOUT + 1)
    with pytest.raises(UserError, match="in layout 1, but the native ops read 2; export again"):
        PredictorRunner(place.parent, place.name, device="cpu", threads=1)


def test_weights_of_another_export_are_refused(tmp_path):
    for seed in (1, 2):
        model = pack(build_model(PLAIN, seed=seed, to_pack=True))
        export_program(model, tmp_path / str(seed) / "llama", model_name="tiny", block_size=8)
    one, other = (tmp_path / name / "llama.packed" for name in "12")
    assert one.stat().st_size == other.stat().st_size
    other.replace(one)
    with pytest.raises(UserError, match=r"llama\.packed is damaged, or of another export"):
        PredictorRunner(one.parent, "llama", device="cpu", threads=1)
