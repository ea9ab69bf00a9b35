"""Complete model directories: all or nothing, and what the disk got wrong is found."""

import json

import numpy as np
import pytest

from common.errors import UserError
from llm.llama import saving
from llm.llama.build import build_model, load_model
from llm.llama.config import PRESETS
from llm.llama.files.checkpoint import find_tensors

TINY = PRESETS["tiny-random-llama"]


class Tokenizer:
    def save(self, directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text("{}")


def test_a_directory_holds_model_tokenizer_and_documents(tmp_path):
    model = build_model(TINY, seed=3)
    documents = {"report.json": {"linears": 14}}
    saving.save_directory(model, Tokenizer(), tmp_path / "out", documents=documents, compare=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "report.json"),
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == documents["report.json"]
    again = dict(load_model(tmp_path / "out").named_parameters())
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(again[name].numpy(), parameter.numpy())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_flipped_bit_leaves_no_directory(tmp_path, monkeypatch, name):
    right = saving.save_model

    def flipped(model, directory):
        right(model, directory)
        tensor = find_tensors(directory)[name]
        with tensor.file.open("r+b") as file:
            file.seek(tensor.offset)
            byte = file.read(1)[0]
            file.seek(tensor.offset)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(saving, "save_model", flipped)
    model = build_model(TINY, seed=3)
    with pytest.raises(UserError, match="does not read back as the model; is the disk"):
        saving.save_directory(model, Tokenizer(), tmp_path / "out", compare=True)
    assert not list(tmp_path.iterdir())
