"""Adapters against Hugging Face PEFT: training, files both ways, merging, cached generation."""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from llm.engine.engine import Engine
from llm.engine.sequence import SamplingParams
from llm.llama.adapters import load_adapter
from llm.llama.build import load_model
from llm.llama.generation import DygraphRunner
from llm.llama.lora import merge_lora, save_lora
from llm.llama.modeling import CausalLMLoss
from llm.llama.prefix import load_prefix, save_prefix
from tests.parity.ours import GRADIENT_LIMIT, LOGIT_LIMIT

_CONFIG = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_LLAMA_3 = _CONFIG | {"tie_word_embeddings": True, "head_dim": 12}
_BIASES = _CONFIG | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6}


def case(kind, options, config=_CONFIG, steps=20, rate=2e-3, seed=0):
    return {
        "kind": kind,
        "options": options,
        "config": config,
        "steps": steps,
        "rate": rate,
        "seed": seed,
    }


LORA = {
    "all-linear": case("lora", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "rslora with biases": case(
        "lora",
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
        _BIASES,
    ),
    "patterns, tied": case(
        "lora",
        {
            "r": 4,
            "target_modules": r".*layers\.\d\.(self_attn|mlp)\..*_proj",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers.1.*up_proj": 5},
            "exclude_modules": ["o_proj"],
        },
        _LLAMA_3,
    ),
    "lm_head": case("lora", {"r": 2, "target_modules": ["lm_head", "down_proj", "k_proj"]}),
}
PREFIX = {
    f"prefix of {length}{', projected' * projection}{', ' * bool(more) + more}": case(
        "prefix",
        {
            "num_virtual_tokens": length,
            "prefix_projection": projection,
            **({"encoder_hidden_size": 20} if projection else {}),
        },
        config,
        rate=3e-3 if projection else 1e-2,
    )
    for length, projection, config, more in (
        (7, False, _CONFIG, ""),
        (16, True, _CONFIG, ""),
        (1, False, _BIASES, "all heads"),
        (20, True, _LLAMA_3, "wide heads"),
    )
}
CASES = LORA | PREFIX
KERNELS = {"plain": {}, "tiled and recomputed": {"use_flash_attention": True, "recompute": True}}


@pytest.fixture(scope="module")
def written(peer, tmp_path_factory):
    """Let PEFT make, train and store every case."""
    root = tmp_path_factory.mktemp("peft")
    (root / "cases.json").write_text(json.dumps(CASES), encoding="utf-8")
    peer("write", root, "peft_side")
    return root


@pytest.fixture(scope="module")
def read(peer, written):
    """Train every adapter here, save it, and let PEFT open the result."""
    models = {}
    for name in CASES:
        models[name] = train(written, name)[0]
        save = save_lora if name in LORA else save_prefix
        save(models[name], written / name / "ours")
    peer("read", written, "peft_side")
    return written, models


def expected_of(root, name):
    return load_file(root / name / "expected.safetensors")


def opened(root, name, adapter, trainable=False, **options):
    model = load_model(root / name / "base", **options)
    return load_adapter(model, root / name / adapter, trainable=trainable)


def train(root, name, **options):
    """Take the steps that PEFT took, from the adapter that it started with."""
    expected, settings = expected_of(root, name), CASES[name]
    model = opened(root, name, "initial", trainable=True, **options)
    model.train()
    optimizer = paddle.optimizer.AdamW(
        settings["rate"], parameters=model.parameters(), weight_decay=0.01
    )
    losses, found = [], {}
    for step in range(settings["steps"]):
        ids = expected["batches"][step % 4]
        labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
        loss = CausalLMLoss()(model(paddle.to_tensor(ids)), paddle.to_tensor(labels))
        loss.backward()
        if step == 0:
            found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    model.eval()
    return model, np.asarray(losses), found


def logits_of(model, expected):
    with paddle.no_grad():
        return model(paddle.to_tensor(expected["batches"][0])).numpy()


def peft_name(name):
    if name.startswith("prefix."):
        return "grad.prompt_encoder." + name.removeprefix("prefix.")
    return f"grad.base_model.model.{name}.weight"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_training(written, name, kernels, measured):
    """Every loss of 20 steps, the first step's gradients, and what comes out."""
    expected = expected_of(written, name)
    model, losses, found = train(written, name, **KERNELS[kernels])
    error = float(np.abs(losses - expected["losses"]).max())
    assert measured(name, "20 losses", error) <= 1e-5
    assert expected["losses"][-4:].mean() < expected["losses"][:4].mean() - 0.05
    assert {peft_name(n) for n in found} == {n for n in expected if n.startswith("grad.")}
    for parameter, gradient in found.items():
        wanted = expected[peft_name(parameter)]
        got = gradient if "embedding" in parameter else gradient.T
        if parameter.endswith("lora_A"):  # zero while B is
            assert np.abs(wanted).max() == np.abs(got).max() == 0
            continue
        relative = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        assert measured(name, "first gradients", relative) <= GRADIENT_LIMIT
    if name in LORA:
        merge_lora(model)
        error = float(np.abs(logits_of(model, expected) - expected["merged"]).max())
    else:
        error = float(np.abs(logits_of(model, expected) - expected["logits"]).max())
    assert measured(name, "trained logits", error) <= LOGIT_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_we_load_what_peft_saved(written, name, measured):
    expected = expected_of(written, name)
    model = opened(written, name, "trained")
    model.eval()
    unmerged = logits_of(model, expected)
    error = float(np.abs(unmerged - expected["logits"]).max())
    assert measured(name, "their file", error) <= LOGIT_LIMIT
    plain = load_model(written / name / "base")
    plain.eval()
    assert np.abs(logits_of(plain, expected) - unmerged).max() > 0.02
    if name in LORA:
        merge_lora(model)
        difference = np.linalg.norm(logits_of(model, expected) - unmerged)
        error = float(difference / np.linalg.norm(unmerged))
        assert measured(name, "merging", error) <= 1e-6
        theirs = expected["merged"] - expected["logits"]
        theirs = np.linalg.norm(theirs) / np.linalg.norm(unmerged)
        assert error <= 2 * theirs


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_we_saved(read, name, measured):
    root, models = read
    theirs = load_file(root / name / "read.safetensors")
    error = float(np.abs(logits_of(models[name], expected_of(root, name)) - theirs["logits"]).max())
    assert measured(name, "our file", error) <= LOGIT_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_cached_generation_gives_peft_s_ids(written, name):
    expected = expected_of(written, name)
    model = opened(written, name, "trained")
    ids = expected["batches"][0, 0].tolist()
    prompts = [ids[:length] for length in (3, 1, 9)]
    engine = Engine(DygraphRunner(model), max_sequences=2, max_step_tokens=8)
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    answers = [completion.ids for completion in engine.generate(prompts, params)]
    assert answers == [expected[f"generated.{n}"].tolist() for n in range(3)]


@pytest.mark.parametrize("name", [name for name in PREFIX if "projected" in name])
def test_a_projection_is_kept_as_peft_holds_it(written, name, tmp_path):
    theirs = load_file(written / name / "trained" / "prefix_encoder.safetensors")
    model = load_prefix(
        load_model(written / name / "base"), written / name / "trained", trainable=True
    )
    save_prefix(model, tmp_path)
    ours = load_file(tmp_path / "prefix_encoder.safetensors")
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    finished = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    wanted = load_file(written / name / "trained" / "adapter_model.safetensors")
    np.testing.assert_allclose(finished, wanted["prompt_embeddings"], atol=1e-6)
