"""Tensor parallel generation and evaluation, against one process."""

import shutil

import numpy as np
import pytest

from llm.llama.adapters.lora import LoRAConfig, LoRALinear, add_lora, save_lora
from llm.llama.adapters.prefix import PrefixConfig, add_prefix, save_prefix
from llm.llama.build import load_model, save_model
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from llm.llama.files.safetensors import read_header
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from tests.distributed import jobs_inference
from tests.unit.llama.files.models import SHAPES, write_model

HALVES = ["halves", "tied halves"]  # bfloat16
ALL = ["files of tp4 pp2", "tied", "W4", "W8", "plain", "lora", "prefix", *HALVES]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Models and adapters by name, as the arguments of a job."""
    root = tmp_path_factory.mktemp("inference")
    for name in ("biases", "llama-3.2-tied"):
        write_model(root / name, SHAPES[name].replace(num_hidden_layers=2))
    base = root / "biases"
    convert(open_checkpoint(base), root / "ranks", layout=RankLayout(4, 2, fuse_ffn=True))
    model = add_lora(load_model(base), LoRAConfig(r=4), seed=0)
    rng = np.random.default_rng(0)
    for layer in model.sublayers():
        if isinstance(layer, LoRALinear):
            value = rng.standard_normal(layer.lora_B.shape, dtype=np.float32)
            layer.lora_B.set_value(0.3 * value)
    save_lora(model, root / "lora")
    prefixed = add_prefix(load_model(base), PrefixConfig(8), seed=0)
    for parameter in prefixed.prefix.parameters():
        value = rng.standard_normal(parameter.shape, dtype=np.float32)
        parameter.set_value(value)
    save_prefix(prefixed, root / "prefix")
    for kind, group in (("W8", None), ("W4", 8)):
        rounded = quantize_model(load_model(base), QuantConfig.of_type(kind, group))
        save_model(rounded, root / kind)
    places = {
        "W8": (str(root / "W8"), None),
        "W4": (str(root / "W4"), None),
        "files of tp4 pp2": (str(root / "ranks"), None),
        "tied": (str(root / "llama-3.2-tied"), None),
        "plain": (str(base), None),
        "lora": (str(base), str(root / "lora")),
        "prefix": (str(base), str(root / "prefix")),
        "halves": (str(base), None),
        "tied halves": (str(root / "llama-3.2-tied"), None),
    }
    return {
        name: (*place, "bfloat16" if name in HALVES else "float32")
        for name, place in places.items()
    }


@pytest.fixture(scope="module")
def alone(cases):
    return {name: jobs_inference.alone(case) for name, case in cases.items()}


@pytest.mark.parametrize(
    "count, names", [(2, ALL), pytest.param(4, ALL[:2], marks=pytest.mark.long)]
)
def test_answers_and_scores_equal_those_of_one_process(ranks, cases, alone, count, names):
    asked = [cases[name] for name in names]
    found = ranks(count, "jobs_inference:infer", asked, count, timeout=120)
    for index, name in enumerate(names):
        expected, whole = alone[name], alone[name]["cache"]
        result = found[0][index]
        assert result["answers"] == expected["answers"], name
        rtol = 1e-3 if name in HALVES else 1e-5
        np.testing.assert_allclose(result["scores"], expected["scores"], rtol=rtol, err_msg=name)
        assert result["cache"] == [*whole[:2], whole[2] // count, whole[3]], name
        assert result["packed"] == (name != "lora") and result["alike"] >= result["packed"], name
    assert found[1:] == [None] * (count - 1), "followers know no answers"


def test_the_cases_differ(alone):
    assert alone["files of tp4 pp2"] == alone["plain"]
    distinct = [name for name in alone if name != "files of tp4 pp2"]
    # Scores, since rounded weights may answer like those that they were made of.
    assert len({str(alone[name]["scores"]) for name in distinct}) == len(distinct)
    assert len({tuple(ids) for ids in alone["plain"]["answers"]}) == 6


def spoilt(directory, target, name):
    """Copy a directory and make the last number of a tensor nan."""
    shutil.copytree(directory, target)
    (file,) = target.glob("*.safetensors")
    stored = read_header(file)[name]
    np.memmap(file, "<f4", "r+", stored.offset, stored.shape)[-1, -1] = np.nan
    return str(target)


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
@pytest.mark.parametrize("where", ["model", "adapter"])
def test_all_ranks_say_what_one_of_them_found(ranks, cases, tmp_path, layout, where):
    """The last rows of a matrix and the last layer are read by the second rank alone."""
    name = "model.layers.1.mlp.gate_proj.weight"
    model, adapter, dtype = cases["lora"]
    if where == "model":
        model = spoilt(model, tmp_path / "model", name)
    else:
        name = "base_model.model.model.layers.1.mlp.gate_proj.lora_B.weight"
        adapter = spoilt(adapter, tmp_path / "adapter", name)
    first, second = ranks(2, "jobs_inference:refusal", (model, adapter, dtype), *layout, timeout=60)
    assert first == second and f"{name} holds 1 numbers that are nan or inf" in first
