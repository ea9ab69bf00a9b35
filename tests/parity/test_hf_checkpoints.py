"""Checkpoints that transformers wrote, run here: live ones, and the committed reference files."""

import numpy as np
import paddle
import pytest

from llm.llama.build import load_model, save_model
from llm.llama.config import load_config
from llm.llama.rope import inverse_frequencies
from tests.parity import ours
from tests.parity.cases import NEW_TOKENS, cases
from tests.parity.float64_llama import float64_logits

ALL = [(kind, case) for kind in ("reference", "live") for case in cases(kind)]
KERNELS = [
    {
        "use_fused_rms_norm": fused,
        "use_flash_attention": flash,
        "use_fused_head_and_loss_fn": fused == flash,
    }
    for fused in (True, False)
    for flash in (True, False)
]


@pytest.fixture(params=ALL, ids=lambda pair: f"{pair[0]}-{pair[1].name}")
def example(request, roots):
    kind, case = request.param
    directory = roots(kind) / case.name
    return f"{kind} {case.name}", case, directory, ours.expected_of(directory)


def test_logits_and_gradients(example, measured):
    name, _, directory, expected = example
    assert 1 < np.abs(expected["logits"]).max() < 10
    for kernels in KERNELS:
        model = ours.load(directory, **kernels)
        error = measured(name, "logits", ours.logit_error(model, expected))
        assert error <= ours.LOGIT_LIMIT, kernels
        loss, errors = ours.gradient_errors(model, expected)
        assert loss <= ours.LOGIT_LIMIT, kernels
        worst = max(errors, key=errors.get)
        assert measured(name, "gradients", errors[worst]) <= ours.GRADIENT_LIMIT, (worst, kernels)


def test_as_close_to_float64_as_transformers(example):
    """The 2x rule: rounding may at most double the peer's own error."""
    _, _, directory, expected = example
    for kernels in KERNELS:
        model = ours.load(directory, **kernels)
        ids, positions = expected["ids"], expected["positions"]
        scale = float(expected.get("cosine_scale", 1.0))
        exact = float64_logits(model, ids, positions, expected["inv_freq"], scale)
        with paddle.no_grad():
            logits = model(paddle.to_tensor(ids), paddle.to_tensor(positions)).numpy()
        our_error, their_error = (
            np.sqrt(np.mean((values - exact) ** 2)) for values in (logits, expected["logits"])
        )
        assert their_error < 1e-5
        assert our_error <= 2 * their_error, kernels


def test_recomputed_activations_give_the_same_gradients(example):
    _, _, directory, expected = example
    _, errors = ours.gradient_errors(load_model(directory, recompute=True), expected)
    assert max(errors.values()) <= ours.GRADIENT_LIMIT


def test_greedy_ids(example):
    _, case, directory, expected = example
    assert ours.wrong_generations(ours.load(directory), case, expected) == []
    answers = [tuple(expected[f"generated.{n}"]) for n in range(len(case.prompts))]
    assert len(set(answers)) >= 3
    ends = [len(expected[f"stopped.{n}"]) for n in range(len(case.prompts))]
    assert min(ends) < NEW_TOKENS


def test_packed_documents(example, measured):
    name, case, directory, expected = example
    error = ours.packed_error(ours.load(directory), case, expected)
    assert measured(name, "packed documents", error) <= ours.LOGIT_LIMIT


def test_rotary_frequencies_are_bit_equal(example):
    _, _, directory, expected = example
    length = int(expected["positions"].max()) + 1
    frequencies = inverse_frequencies(load_config(directory), length)
    np.testing.assert_array_equal(frequencies, expected["inv_freq"])


def test_older_config_spelling(example, tmp_path):
    _, _, directory, expected = example
    copy = ours.with_version_4_config(directory, tmp_path / "v4")
    assert load_config(copy) == load_config(directory)
    assert ours.logit_error(ours.load(copy), expected) <= ours.LOGIT_LIMIT


def test_saving_again_keeps_every_bit(example, tmp_path):
    _, _, directory, expected = example
    model = ours.load(directory)
    save_model(model, tmp_path, max_shard_bytes=20_000)
    assert load_config(tmp_path) == load_config(directory)
    again = ours.load(tmp_path)
    for (name, before), (_, after) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert paddle.equal_all(before, after), name
    assert ours.logit_error(again, expected) <= ours.LOGIT_LIMIT


@pytest.mark.parametrize("kind", ["reference", "live"])
def test_llama3_scaling_is_hit_in_all_three_bands(kind):
    """The cases would prove little if every frequency lay in the same band."""
    for case in cases(kind):
        rope = case.config["rope_parameters"]
        if rope["rope_type"] != "llama3":
            continue
        heads = case.config["num_attention_heads"]
        size = case.config.get("head_dim", case.config["hidden_size"] // heads)
        turns = rope["original_max_position_embeddings"] / (
            2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
        )
        bands = np.digitize(turns, [rope["low_freq_factor"], rope["high_freq_factor"]])
        assert set(bands) == {0, 1, 2}, case.name
        assert case.offset + case.length > rope["original_max_position_embeddings"]
