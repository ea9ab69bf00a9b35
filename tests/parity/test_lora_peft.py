"""Adapters against Hugging Face PEFT: training, files both ways, merging, cached generation.

Two small cases are compared with PEFT's committed answers wherever the tests run, the others with
PEFT itself where the peers' environment is.
"""

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file

from llm.engine.batch import Batch, Part
from llm.engine.engine import Engine
from llm.engine.request import Request, SamplingParams, requests
from llm.engine.runners import DygraphRunner
from llm.llama.adapters.lora import save_lora
from llm.llama.adapters.opening import load_adapter
from llm.llama.adapters.prefix import load_prefix, save_prefix
from llm.llama.build import load_model
from llm.llama.fused import pack
from llm.llama.merging import merge_lora
from llm.train.finetune import set_rates
from tests.parity.adapter_cases import LIVE, LORA, REFERENCE
from tests.parity.ours import GRADIENT_LIMIT, LOGIT_LIMIT, mean_loss

CASES = LIVE | REFERENCE
# AdamW steps by the sign of a gradient at first, so where one is nearly zero its rounding decides.
TRAINED_LIMIT = 5e-5
# PEFT takes PiSSA's start from singular vectors in float32 and stores it nowhere: what is left of a
# weight has as few right digits as the gap between singular values allows.
START_LIMIT = {"gradients": 1e-4, "logits": 3e-4}

PROJECTED = [n for n, c in CASES.items() if c["options"].get("prefix_projection")]
KERNELS = {
    "plain": {"use_flash_attention": False},
    "fused and recomputed": {"use_flash_attention": True, "recompute": True},
}


@pytest.fixture(scope="module")
def live(peer, tmp_path_factory):
    """Let PEFT make, train and store every live case."""
    root = tmp_path_factory.mktemp("peft")
    (root / "cases.json").write_text(json.dumps(LIVE), encoding="utf-8")
    peer("write", root, "peft_side")
    return root


@pytest.fixture
def root(request, repo, name):
    """Return where PEFT's side of a case lies."""
    if name in REFERENCE:
        return repo / "tests" / "parity" / "adapter_reference"
    return request.getfixturevalue("live")


@pytest.fixture(scope="module")
def read(peer, live):
    """Train every adapter here, save it, and let PEFT open the result."""
    models = {}
    for name in LIVE:
        models[name] = train(live, name)[0]
        save = save_lora if name in LORA else save_prefix
        save(models[name], live / name / "ours")
    peer("read", live, "peft_side")
    return models


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
    set_rates(model, settings["faster"])
    losses, found = [], {}
    for step in range(settings["steps"]):
        ids = expected["batches"][step % 4]
        labels = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
        loss = mean_loss(model, ids, labels)
        loss.backward()
        if step == 0:
            found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    model.eval()
    return model, np.asarray(losses), found


def starts_in_weights(name):
    return "init_lora_weights" in CASES[name]["options"]


def logits_of(model, expected):
    with paddle.no_grad():
        return model(paddle.to_tensor(expected["batches"][0])).numpy()


def peft_name(name):
    if name.startswith("prefix."):
        return "grad.prompt_encoder." + name.removeprefix("prefix.")
    return f"grad.base_model.model.{name.removesuffix('.weight')}.weight"


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_training(root, name, kernels, measured):
    """Every loss of 20 steps, the first step's gradients, and what comes out."""
    expected = expected_of(root, name)
    model, losses, found = train(root, name, **KERNELS[kernels])
    error = float(np.abs(losses - expected["losses"]).max())
    assert measured(name, "20 losses", error) <= 1e-5
    assert expected["losses"][-4:].mean() < expected["losses"][:4].mean() - 0.05
    assert {peft_name(n) for n in found} == {n for n in expected if n.startswith("grad.")}
    for parameter, gradient in found.items():
        wanted = expected[peft_name(parameter)]
        got = gradient if "embed" in parameter else gradient.T
        if parameter.endswith("lora_A") and not starts_in_weights(name):
            # Zero while B is.
            assert np.abs(wanted).max() == np.abs(got).max() == 0
            continue
        relative = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        limit = START_LIMIT["gradients"] if starts_in_weights(name) else GRADIENT_LIMIT
        assert measured(name, "first gradients", relative) <= limit
    if CASES[name]["kind"] == "lora":
        merge_lora(model)
        error = float(np.abs(logits_of(model, expected) - expected["merged"]).max())
        limit = TRAINED_LIMIT if CASES[name]["options"].get("modules_to_save") else LOGIT_LIMIT
    else:
        error = float(np.abs(logits_of(model, expected) - expected["logits"]).max())
        limit = TRAINED_LIMIT
    limit = START_LIMIT["logits"] if starts_in_weights(name) else limit
    assert measured(name, "trained logits", error) <= limit


@pytest.mark.parametrize("name", CASES)
def test_we_load_what_peft_saved(root, name, measured):
    expected = expected_of(root, name)
    model = opened(root, name, "trained")
    model.eval()
    unmerged = logits_of(model, expected)
    error = float(np.abs(unmerged - expected["logits"]).max())
    limit = START_LIMIT["logits"] if starts_in_weights(name) else LOGIT_LIMIT
    assert measured(name, "their file", error) <= limit
    plain = load_model(root / name / "base")
    plain.eval()
    assert np.abs(logits_of(plain, expected) - unmerged).max() > 0.02
    if CASES[name]["kind"] == "lora":
        merge_lora(model)
        difference = np.linalg.norm(logits_of(model, expected) - unmerged)
        error = float(difference / np.linalg.norm(unmerged))
        assert measured(name, "merging", error) <= 1e-6
        theirs = expected["merged"] - expected["logits"]
        theirs = np.linalg.norm(theirs) / np.linalg.norm(unmerged)
        assert error <= 2 * theirs


@pytest.mark.parametrize("name", LIVE)
def test_peft_loads_what_we_saved(live, read, name, measured):
    theirs = load_file(live / name / "read.safetensors")
    error = float(np.abs(logits_of(read[name], expected_of(live, name)) - theirs["logits"]).max())
    assert measured(name, "our file", error) <= LOGIT_LIMIT


@pytest.mark.parametrize("name", CASES)
def test_cached_generation_gives_peft_s_ids(root, name):
    expected = expected_of(root, name)
    model = opened(root, name, "trained")
    ids = expected["batches"][0, 0].tolist()
    prompts = [ids[:length] for length in (3, 1, 9)]
    engine = Engine(DygraphRunner(model), max_sequences=2, max_step_tokens=8)
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    answers = [completion.ids for completion in engine.generate(requests(prompts, params))]
    assert answers == [expected[f"generated.{n}"].tolist() for n in range(3)]


# Cases over one base: LoRA in a third of it, in the output matrix too, and two lengths of prefixes.
MIXED = ("all-linear", "lm_head", "prefix of 7", "prefix of 16, projected")


@pytest.fixture(scope="module")
def mixed(live):
    """Return a runner over the base of those cases that has all their adapters, and their names."""
    weights = {(live / name / "base" / "model.safetensors").read_bytes() for name in MIXED}
    assert len(weights) == 1, "the cases have one base"
    runner = DygraphRunner(pack(load_model(live / MIXED[0] / "base", to_pack=True)), block_size=8)
    loaded = [
        runner.adapters.load(name.replace(" ", "-").replace(",", ""), live / name / "trained")
        for name in MIXED
    ]
    return runner, loaded


def test_every_adapter_of_a_mixed_batch(live, mixed, measured):
    """Logits of every row, in steps that cut all sequences, beside one without an adapter."""
    runner, loaded = mixed
    expected = [expected_of(live, name) for name in MIXED]
    ids = expected[0]["batches"][0]
    plain = load_model(live / MIXED[0] / "base")
    plain.eval()
    wanted = [one["logits"] for one in expected] + [logits_of(plain, expected[0])]
    rows = [
        (ids[n], *which, wanted[number][n])
        for n in range(len(ids))
        for number, which in enumerate([*((one.number, one.length) for one in loaded), (0, 0)])
    ]
    runner.allocate(5 * len(rows))
    for start, end in ((0, 10), (10, 11), (11, 24)):
        parts = [
            Part(
                text[start:end].tolist(),
                length + start,
                list(range(5 * n, 5 * n + 5)),
                end - start,
                number,
            )
            for n, (text, number, length, _) in enumerate(rows)
        ]
        found = runner.run(Batch.of(parts, runner.block_size)).reshape([len(rows), end - start, -1])
        for (_, number, _, logits), ours in zip(rows, found, strict=True):
            error = float(np.abs(ours - logits[start:end]).max())
            name = MIXED[number - 1] if number else "none"
            assert measured(name, "mixed batch", error) <= LOGIT_LIMIT


def test_a_mixed_engine_gives_peft_s_ids(live, mixed):
    runner, loaded = mixed
    engine = Engine(runner, max_sequences=5, max_step_tokens=16)
    params = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    asked, wanted = [], []
    for name, adapter in zip(MIXED, loaded, strict=True):
        expected = expected_of(live, name)
        for number, length in enumerate((3, 1, 9)):
            prompt = expected["batches"][0, 0, :length].tolist()
            asked.append(Request(prompt, params, adapter=adapter.name))
            wanted.append(expected[f"generated.{number}"].tolist())
    assert [one.ids for one in engine.generate(asked)] == wanted


@pytest.mark.parametrize("name", PROJECTED)
def test_a_projection_is_kept_as_peft_holds_it(root, name, tmp_path):
    theirs = load_file(root / name / "trained" / "prefix_encoder.safetensors")
    model = load_prefix(load_model(root / name / "base"), root / name / "trained", trainable=True)
    save_prefix(model, tmp_path)
    ours = load_file(tmp_path / "prefix_encoder.safetensors")
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    finished = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    wanted = load_file(root / name / "trained" / "adapter_model.safetensors")
    np.testing.assert_allclose(finished, wanted["prompt_embeddings"], atol=1e-6)


def test_the_reference_is_that_of_the_table(repo):
    """Made by ``python -m tests.parity.peft_side reference tests/parity/adapter_reference``."""
    root = repo / "tests" / "parity" / "adapter_reference"
    assert json.loads((root / "cases.json").read_text(encoding="utf-8")) == REFERENCE
    assert sum(path.stat().st_size for path in root.rglob("*")) < 250_000
