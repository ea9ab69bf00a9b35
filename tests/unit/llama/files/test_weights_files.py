"""Loading and saving: values, one copy in memory, and writes that fail halfway."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import LlamaConfig
from llm.llama.files import safetensors, weights
from tests.unit.llama.files.checkpoint_files import (
    CONFIG,
    INDEX,
    SINGLE,
    tensors,
    write_config,
    write_sharded,
    write_single,
)


def parameters(model):
    """Return values by name, matrices as the files hold them."""
    linears = {n for n, layer in model.named_sublayers() if type(layer).__name__ == "Linear"}
    return {
        name: p.numpy().T if name.rsplit(".", 1)[0] in linears else p.numpy()
        for name, p in model.named_parameters()
    }


def assert_equal(model, expected):
    found = parameters(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_loaded_values_are_the_files(tmp_path, write):
    assert_equal(load_model(write(tmp_path)), tensors())


def test_float16_widens_exactly(tmp_path):
    write_config(tmp_path)
    save_file(tensors(np.float16), tmp_path / SINGLE)
    widened = {name: value.astype(np.float32) for name, value in tensors(np.float16).items()}
    assert_equal(load_model(tmp_path), widened)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_saved_files_are_byte_equal_to_the_originals(tmp_path, max_shard_bytes):
    model = load_model(write_single(tmp_path))
    target = tmp_path / "saved"
    save_model(model, target, max_shard_bytes=max_shard_bytes)
    found = {}
    for file in sorted(target.glob("*.safetensors")):
        part = load_file(file)
        assert len(part) == 1 or sum(v.nbytes for v in part.values()) <= max_shard_bytes
        found |= part
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].tobytes() == value.tobytes()
    if max_shard_bytes == 4000:
        index = json.loads((target / INDEX).read_text(encoding="utf-8"))
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in found.values())


def test_saving_over_another_layout_leaves_only_the_new_one(tmp_path):
    model = load_model(write_single(tmp_path))
    for limit in (4000, 10**9, 6000, 3000):
        save_model(model, tmp_path, max_shard_bytes=limit)
        files = {p.name for p in tmp_path.iterdir()}
        assert not [name for name in files if name.endswith(".tmp")]
        if limit == 10**9:
            assert {n for n in files if "safetensors" in n} == {SINGLE}
        else:
            named = json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            assert {n for n in files if "safetensors" in n} == {INDEX, *named.values()}
        assert_equal(load_model(tmp_path), tensors())


def failing_fsync(calls_before):
    """Return an ``os.fsync`` that finds the disk full after some calls."""
    count = 0

    def fsync(_descriptor):
        nonlocal count
        count += 1
        if count > calls_before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return fsync


@pytest.mark.parametrize("old", [write_single, write_sharded])
@pytest.mark.parametrize(("limit", "calls_before"), [(10**9, 0), (4000, 0), (4000, 2)])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, old, limit, calls_before):
    old(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = build_model(LlamaConfig.from_hf(CONFIG), seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.os, "fsync", failing_fsync(calls_before))
        with pytest.raises(OSError, match="No space left on device"):
            save_model(other, tmp_path, max_shard_bytes=limit)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert_equal(load_model(tmp_path), tensors())
    save_model(other, tmp_path, max_shard_bytes=limit)
    assert_equal(load_model(tmp_path), parameters(other))


def test_a_failing_config_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """The last file to be written decides: weights do not appear without it."""
    write_single(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = build_model(LlamaConfig.from_hf(CONFIG), seed=1)
    real = Path.write_text

    def write_text(path, *args, **options):
        if "config.json" in path.name:
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="No space left"):
        save_model(other, tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# 10 layers of 10 MB: a second copy is plain to see beside the interpreter's own memory.
BIG = CONFIG | {
    "vocab_size": 4000,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
_PEAK = """
import sys
from pathlib import Path
from llm import runtime
runtime.prepare(1)
import paddle
from llm.llama.build import build_model, load_model, save_model
from llm.llama.config import LlamaConfig
import json

# Paddle's kernels take memory for themselves when first used.
small = json.loads(sys.argv[2]) | {"num_hidden_layers": 1, "vocab_size": 8}
build_model(LlamaConfig.from_hf(small))(paddle.to_tensor([[1, 2]]))
def peak():
    # getrusage would count what the parent held when it started this process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
model = load_model(sys.argv[1])
loaded = peak()
save_model(model, sys.argv[1] + "/copy", max_shard_bytes=50_000_000)
print(before, loaded, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_peak_memory_is_the_network_and_one_tensor(tmp_path, repo, stored):
    config = LlamaConfig.from_hf(BIG)
    model = build_model(config, seed=0)
    if stored == "bfloat16":
        model.to(dtype="bfloat16")
    save_model(model, tmp_path, max_shard_bytes=60_000_000)
    size = 4 * config.num_parameters
    largest = 4 * config.vocab_size * config.hidden_size
    del model
    result = subprocess.run(
        [sys.executable, "-c", _PEAK, tmp_path, json.dumps(BIG)],
        cwd=repo,
        capture_output=True,
        text=True,
        check=True,
    )
    before, loaded, saved = map(int, result.stdout.split()[-3:])
    assert size > 1e8
    # Besides the network: a few forms of one tensor (mapped, widened, transposed, Paddle's).
    assert size < loaded - before < size + 6 * largest
    assert saved - loaded < 3 * largest


def test_the_index_writer_counts_two_bytes_for_half_precision(tmp_path):
    model = load_model(write_single(tmp_path))
    model.to(dtype="bfloat16")
    save_model(model, tmp_path / "half", max_shard_bytes=3000)
    index = json.loads((tmp_path / "half" / INDEX).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == 2 * sum(v.size for v in tensors().values())
    assert {t.dtype for t in weights.find_tensors(tmp_path / "half").values()} == {"BF16"}
