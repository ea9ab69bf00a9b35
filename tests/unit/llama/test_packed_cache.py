"""Packed weights that a start keeps for the next: the same bits, ignored when they do not fit."""

import os
import re
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import paddle
import pytest

from external_ops import native
from llm.llama import packed_cache
from llm.llama.build import build_model, save_model
from llm.llama.files import packed as packed_files
from llm.llama.packed_cache import load_packed
from llm.llama.quant_config import QuantConfig
from llm.llama.quantization.network import quantize_model
from tests.unit.llama.test_packed_network import SHAPES, make, step_logits

pytestmark = pytest.mark.usefixtures("native_ops")

# Shape, what it is quantized to, the type it is opened in, and how it is packed.
CASES = {
    "float32": ("plain", None, "float32", {}),
    "bfloat16, tied": ("tied", None, "bfloat16", {}),
    "biases, head in 8 bits": ("biased", None, "float32", {"head_type": "int8"}),
    "W4, tied, in 8 bits": ("tied", ("W4", 16, 8), "float32", {"round_activations": True}),
    "A8W8, untied, in 8 bits": ("plain", ("A8W8", None, 8), "bfloat16", {}),
}


def write(place, shape="tied", quantization=None, seed=5):
    """Write a model directory."""
    model = make(SHAPES[shape]) if seed == 5 else build_model(SHAPES[shape], seed=seed)
    if quantization is not None:
        quantize_model(model, QuantConfig.of_type(*quantization))
    save_model(model, place)


def start(model, kept, dtype="bfloat16", **packing):
    """Open a model as a start does; return the logits' bits."""
    network = load_packed(model, dtype=dtype, place=str(kept), packing=packing)
    return step_logits(network).view(np.int32)


def refuse_to_pack(monkeypatch):
    """Let nothing but kept weights be opened."""
    monkeypatch.setattr(packed_cache, "load_model", lambda *_, **__: pytest.fail("it packed anew"))


@pytest.mark.parametrize("case", CASES)
def test_kept_weights_give_the_same_bits(case, tmp_path, monkeypatch):
    shape, quantization, dtype, packing = CASES[case]
    write(tmp_path / "model", shape, quantization)
    options = {"dtype": dtype, **packing}
    fresh = start(tmp_path / "model", "off", **options)
    first = start(tmp_path / "model", tmp_path / "kept", **options)
    refuse_to_pack(monkeypatch)
    again = start(tmp_path / "model", tmp_path / "kept", **options)
    assert np.array_equal(first, fresh)
    assert np.array_equal(again, fresh)


def change_weights(model, _, __):
    times = (model / "model.safetensors").stat()
    write(model, seed=6)
    # Not even the time tells: the contents do.
    os.utime(model / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))


def touch(model, _, __):
    (model / "model.safetensors").touch()


def cut_off(_, kept, __):
    kept.write_bytes(kept.read_bytes()[:-1])


def damage_header(_, kept, __):
    kept.write_bytes(b"\0" * 4096 + kept.read_bytes()[4096:])


def raise_layout(_, __, monkeypatch):
    monkeypatch.setattr(native, "PACKED_LAYOUT", native.PACKED_LAYOUT + 1)


@pytest.mark.parametrize("event", [change_weights, touch, cut_off, damage_header, raise_layout])
def test_what_does_not_fit_is_ignored_and_replaced(event, tmp_path, monkeypatch):
    model, kept = tmp_path / "model", tmp_path / "kept"
    write(model)
    start(model, kept)
    (file,) = kept.iterdir()
    event(model, file, monkeypatch)
    old = file.stat().st_ino
    expected = start(model, "off")
    assert np.array_equal(start(model, kept), expected)
    assert list(kept.iterdir()) == [file]
    assert file.stat().st_ino != old
    refuse_to_pack(monkeypatch)
    assert np.array_equal(start(model, kept), expected)


@contextmanager
def small_disk(size):
    """Let no file grow beyond a size; writing more fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_behind(tmp_path, caplog):
    write(tmp_path / "model")
    expected = start(tmp_path / "model", "off")
    with small_disk(30_000):
        got = start(tmp_path / "model", tmp_path / "kept")
    assert np.array_equal(got, expected)
    assert not list((tmp_path / "kept").iterdir())
    (line,) = [one for one in caplog.messages if "every start packs anew" in one]
    assert "File too large" in line


def test_places(tmp_path, monkeypatch, caplog):
    """Beside the model, else in the user's cache; small networks nowhere unless asked for."""
    model, home = tmp_path / "model", tmp_path / "home"
    write(model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    before = sorted(model.iterdir())
    start(model, "auto")
    assert sorted(model.iterdir()) == before
    monkeypatch.setattr(packed_cache, "_WORTHWHILE", 0)
    expected = start(model, "auto")
    (made,) = set(model.iterdir()) - set(before)
    assert made.name == "model-bfloat16.packed"
    assert f"kept in {made} ({made.stat().st_size / 1e6:.0f} MB)" in caplog.text
    made.unlink()

    honest = packed_files.replacing

    def read_only(path: Path):
        if path.parent == model:
            raise PermissionError(13, "Permission denied", str(path))
        return honest(path)

    monkeypatch.setattr(packed_files, "replacing", read_only)
    start(model, "auto")
    assert sorted(model.iterdir()) == before
    assert [file.name for file in home.rglob("*.packed")] == ["model-bfloat16.packed"]
    with monkeypatch.context() as nobody:  # as of a container whose user has only a number
        nobody.delenv("XDG_CACHE_HOME")
        nobody.delenv("HOME", raising=False)
        nobody.setattr(os, "getuid", lambda: 1 << 30)
        assert np.array_equal(start(model, "auto"), expected)
    refuse_to_pack(monkeypatch)
    assert np.array_equal(start(model, "auto"), expected)


def test_models_in_one_place_keep_their_own(tmp_path, monkeypatch):
    """A model and its draft, say; links and other ways to write a path lead to the same file."""
    expected = {}
    for seed, name in ((5, "one/model"), (6, "two/model")):
        write(tmp_path / name, seed=seed)
        expected[name] = start(tmp_path / name, tmp_path / "kept")
    (tmp_path / "link").symlink_to(tmp_path / "two/model")
    expected["link"] = expected["one/../two/model"] = expected["two/model"]
    refuse_to_pack(monkeypatch)
    for name, logits in expected.items():
        assert np.array_equal(start(tmp_path / name, tmp_path / "kept"), logits)


def test_processes_share_the_pages(tmp_path):
    """All that a network multiplies with lies in the mapped file, and none of it was copied."""
    write(tmp_path / "model", "plain")
    start(tmp_path / "model", tmp_path)
    network = load_packed(tmp_path / "model", dtype="bfloat16", place=str(tmp_path), packing={})
    step_logits(network)
    maps = Path("/proc/self/smaps").read_text()
    (file,) = tmp_path.glob("*-bfloat16.packed")
    head = rf"^(?=\S+-.*{re.escape(str(file))}$)"
    (part,) = re.findall(rf"{head}(?:.*\n)+?VmFlags", maps, re.MULTILINE)
    low, high = (int(one, 16) for one in part.split()[0].split("-"))
    assert "Private_Dirty:         0 kB" in part
    linears = [one for layer in network.model.layers for one in (layer.qkv, layer.down)]
    tensors = [one.weight.data for one in (*linears, network.lm_head)]
    assert all(
        low <= one.data_ptr() < high for one in (*tensors, network.model.embed_tokens.weight)
    )


def test_a_tied_embedding_lies_once(tmp_path):
    write(tmp_path / "model", "tied")
    network = load_packed(tmp_path / "model", dtype="bfloat16", place="off", packing={})
    V, E = network.config.vocab_size, network.config.hidden_size
    assert not network.model.embed_tokens.state_dict()
    assert [V, E] not in [one.shape for one in network.parameters()]
    ids = paddle.to_tensor([0, 63, 64, V - 1])
    table = build_model(SHAPES["tied"], seed=5).model.embed_tokens.weight
    rows = network.model.embed_tokens.lookup(ids)
    short = table.astype("bfloat16").astype("float32").numpy()
    assert np.array_equal(rows.numpy(), short[ids.numpy()])
