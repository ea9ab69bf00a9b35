"""From any layout to any layout and back: every byte of every tensor, and what belongs to it."""

import errno
import json
import tracemalloc

import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama.config import load_config
from llm.llama.files import copying, dtypes
from llm.llama.files.checkpoint import open_checkpoint
from llm.llama.files.conversion import convert
from llm.llama.files.rank_layout import RankLayout
from tests.unit.llama.files.models import (
    SHAPES,
    TYPES,
    as_arrays,
    read_tensors,
    write_model,
)

LAYOUTS = {
    "tp4-pp2": RankLayout(4, 2),
    "tp2": RankLayout(2),
    "pp4": RankLayout(1, 4),
    "pp3, which cuts layers unevenly": RankLayout(1, 3),
    "one file": RankLayout(),
    "tp2-pp2, fused qkv": RankLayout(2, 2, fuse_qkv=True),
    "tp4, fused ffn": RankLayout(4, 1, fuse_ffn=True),
    "tp2, all fused": RankLayout(2, 1, True, True),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Cut slabs, tiles and bands so that small matrices have several of each."""
    monkeypatch.setattr(copying, "_SLAB", 1000)
    monkeypatch.setattr(dtypes, "_TILE", 7)
    monkeypatch.setattr(dtypes, "_BAND", 100)


def converted(source, target, **options):
    assert convert(open_checkpoint(source), target, **options) == []
    return target


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_byte_identical(tmp_path, shape, dtype, files):
    source = write_model(tmp_path / "hf", SHAPES[shape], dtype, files)
    ranks = converted(source, tmp_path / "ranks", layout=RankLayout(4, 2))
    names = {f"model_state.tp0{t}_pp0{p}.pdparams" for t in range(4) for p in range(2)}
    assert {file.name for file in ranks.glob("*.pdparams")} == names
    back = converted(ranks, tmp_path / "back")
    assert read_tensors(back) == read_tensors(source)
    assert load_config(back) == load_config(source)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == dtype
    assert (back / "tokenizer_config.json").read_text() == '{"model_max_length": 7}'


@pytest.mark.parametrize("first", LAYOUTS)
def test_layouts_become_others(tmp_path, first):
    """Every layout becomes itself and three others, and is made from as many."""
    config = SHAPES["biases" if "tp4" in first else "llama-3.2-tied"]
    source = write_model(tmp_path / "hf", config, "float16")
    one = converted(source, tmp_path / "one", layout=LAYOUTS[first])
    names = list(LAYOUTS)
    for step in (0, 1, 3, 4):
        second = names[(names.index(first) + step) % len(names)]
        two = converted(one, tmp_path / second, layout=LAYOUTS[second])
        back = converted(two, tmp_path / f"{second}, back", max_shard_bytes=20_000)
        assert len(list(back.glob("*.safetensors"))) > 2
        assert read_tensors(back) == read_tensors(source), second


def rounded(values, target):
    """Return float32 in another type, without ml_dtypes; bfloat16 as Paddle rounds it."""
    if target == "bfloat16":
        return paddle.to_tensor(values).astype("bfloat16").numpy()
    with np.errstate(all="ignore"):
        return values.astype(target)


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("layout", [None, RankLayout(2, fuse_qkv=True)])
def test_types_round_as_numpy_and_paddle_do(tmp_path, source, target, layout):
    model = write_model(tmp_path / "hf", SHAPES["llama-2-gqa"], source)
    other = converted(model, tmp_path / "other", layout=layout, dtype=target)
    if layout is not None:
        assert open_checkpoint(other).dtypes == [dtypes.HEADERS[target]]
        other = converted(other, tmp_path / "back")
    assert json.loads((other / "config.json").read_text())["torch_dtype"] == target
    got, wanted = as_arrays(other), as_arrays(model)
    for name, values in wanted.items():
        expected = rounded(values.astype(np.float32), target)
        assert got[name].tobytes() == expected.tobytes(), name


def test_bfloat16_of_every_kind_of_number():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    edges = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 65504, 65520])
    ties = (np.arange(1000, dtype=np.uint32) << 16) + np.uint32(0x8000)
    values = np.concatenate([bits.view(np.float32), edges, ties.view(np.float32)])
    got = dtypes.cast(values, "F32", "BF16")
    wanted = rounded(values, "bfloat16")
    nan = np.isnan(values)
    np.testing.assert_array_equal(got[~nan], wanted[~nan])
    assert np.isnan(dtypes.widen(got[nan], "BF16")).all()


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", ["float16", "bfloat16"])
def test_every_number_of_two_bytes(source, target):
    numbers = np.arange(1 << 16, dtype=np.uint16)
    stored = [dtypes.HEADERS[name] for name in (source, target)]
    got = dtypes.cast(numbers.view(dtypes.native(stored[0])), *stored)
    if source == "bfloat16":
        wide = (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        wide = numbers.view(np.float16).astype(np.float32)
    wanted, nan = rounded(wide, target), np.isnan(wide)
    assert got[~nan].tobytes() == wanted[~nan].tobytes()
    assert np.isnan(got[nan].view(TYPES[target]).astype(np.float32)).all()


def test_a_weight_beyond_float16_is_refused_and_nothing_is_left(tmp_path):
    source = write_model(tmp_path / "hf", SHAPES["llama-2-gqa"])
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4:] = np.float32(70000).tobytes()
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=r"7e\+04, which does not fit into float16.*--dtype bfloat16"
    ):
        convert(open_checkpoint(source), tmp_path / "new", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_unequal_copies_are_named_and_rank_0_counts(tmp_path):
    source = write_model(tmp_path / "hf", SHAPES["llama-3.2-tied"])
    ranks = converted(source, tmp_path / "ranks", layout=RankLayout(2))
    file = ranks / "model_state.tp01.pdparams"
    data = file.read_bytes()
    norm = dict(read_tensors(source))["model.norm.weight"][2]
    assert data.count(norm) == 1
    file.write_bytes(data.replace(norm, norm[:-4] + bytes(4)))
    differing = convert(open_checkpoint(ranks), tmp_path / "back")
    assert differing == ["model.norm.weight"]
    assert read_tensors(tmp_path / "back") == read_tensors(source)


def test_an_older_config_is_only_changed_where_the_type_is(tmp_path):
    source = write_model(tmp_path / "hf", SHAPES["llama-2-gqa"])
    raw = json.loads((source / "config.json").read_text()) | {"unknown": [1], "dtype": "float32"}
    (source / "config.json").write_text(json.dumps(raw))
    new = converted(source, tmp_path / "new", dtype="bfloat16")
    changed = json.loads((new / "config.json").read_text())
    assert changed == raw | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_a_file_system_that_cannot_copy_from_file_to_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    source = write_model(tmp_path / "hf", SHAPES["llama-2-gqa"], "bfloat16")
    monkeypatch.setattr(copying.os, "copy_file_range", refuse)
    assert read_tensors(converted(source, tmp_path / "new")) == read_tensors(source)


@pytest.mark.parametrize("back", [False, True])
def test_memory_holds_twice_the_largest_tensor_and_slabs(tmp_path, monkeypatch, back):
    """NumPy reports what it allocates to tracemalloc."""
    monkeypatch.setattr(copying, "_SLAB", 1 << 18)
    monkeypatch.setattr(copying, "_ROOM", 0)
    monkeypatch.setattr(dtypes, "_TILE", 128)
    config = SHAPES["llama-2-gqa"].replace(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, head_dim=64
    )
    source = write_model(tmp_path / "hf", config)
    if back:
        source = converted(source, tmp_path / "ranks", layout=RankLayout(4, 2, fuse_qkv=True))
    checkpoint = open_checkpoint(source)
    largest, whole = 1536 * 512 * 4, config.num_parameters * 4
    tracemalloc.start()
    try:
        convert(checkpoint, tmp_path / "new", layout=None if back else RankLayout(4, 2), threads=4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * largest + 4 * 2 * (1 << 18) + 2_000_000 < whole / 5
