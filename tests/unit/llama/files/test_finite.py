"""A model directory with one nan or inf is refused at load, whatever its type and place."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from common.errors import UserError
from llm.llama.build import build_model
from llm.llama.config import PRESETS
from llm.llama.files.dtypes import all_finite
from llm.llama.files.safetensors import read_header
from llm.llama.files.weights import load_weights, save_weights

TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": ml_dtypes.bfloat16}
NAMES = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight")


@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8"])
def test_all_finite(kind: str) -> None:
    """Against NumPy's own, over every float16 there is and over extremes of the others."""
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    if kind != "<f2":
        edges = np.array([0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, np.finfo(kind).max])
        values = np.concatenate([edges, -edges]).astype(kind)
    for value in values:
        for one in (np.array([value, 1], kind), np.array([[-1, 2], [value, 3]], kind).T):
            assert all_finite(one) == bool(np.isfinite(one).all()), value
    # A sum that overflows, though no number is inf.
    assert all_finite(np.full(9, np.finfo(kind).max, kind))
    assert all_finite(np.zeros(0, kind)) and all_finite(np.full(3, 7, np.int8))


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_weight_that_is_no_number(name: str, kind: str, value: float, tmp_path: Path) -> None:
    config = PRESETS["tiny-random-llama"]
    model = build_model(config, seed=1)
    model.to(dtype=kind)
    save_weights(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tied = config.tie_word_embeddings
    load_weights(model, tmp_path, tied=tied)
    tensor = read_header(file)[name]
    numbers = np.memmap(file, TYPES[kind], "r+", offset=tensor.offset, shape=tensor.shape)
    numbers.reshape(-1)[-2] = value
    numbers.flush()
    with pytest.raises(UserError, match=f"{name} holds 1 numbers that are nan or inf"):
        load_weights(model, tmp_path, tied=tied)


def test_a_weight_that_float16_cannot_hold(tmp_path: Path) -> None:
    config = PRESETS["tiny-random-llama"]
    model = build_model(config, seed=1)
    weight = dict(model.named_parameters())["model.norm.weight"]
    for value, fits in ((65519.0, True), (65520.0, False), (-1e9, False)):
        weight.set_value(np.full(weight.shape, value, np.float32))
        save_weights(model, tmp_path)
        half = build_model(config, seed=1)
        half.to(dtype="float16")
        if fits:
            load_weights(half, tmp_path, tied=config.tie_word_embeddings)
            continue
        with pytest.raises(
            UserError, match=r"model\.norm\.weight holds .* which does not fit into float16"
        ):
            load_weights(half, tmp_path, tied=config.tie_word_embeddings)
