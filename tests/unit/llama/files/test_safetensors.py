"""Our reader and writer of safetensors files against the ``safetensors`` package."""

import json
import struct

import numpy as np
import paddle
import pytest
import safetensors
from safetensors.numpy import load_file, save_file
from safetensors.paddle import save_file as save_paddle

from llm.llama.files.safetensors import read_header, write_file

ODD_SHAPES = {"a": (3, 5), "b": (7,), "c": (1, 1, 2), "empty": (0, 4), "scalar": ()}


def draw(dtype):
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(s), dtype) for name, s in ODD_SHAPES.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_reads_what_the_package_wrote(tmp_path, dtype):
    arrays = draw(dtype)
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        read = found[name].read()
        assert read.dtype == dtype and read.shape == array.shape
        np.testing.assert_array_equal(read, array)


def test_reads_bfloat16_that_the_package_wrote(tmp_path):
    narrow = {
        name: paddle.to_tensor(array).astype("bfloat16")
        for name, array in draw(np.float32).items()
        if array.size
    }
    save_paddle(narrow, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {"BF16"}
    for name, tensor in narrow.items():
        np.testing.assert_array_equal(found[name].read(), tensor.astype("float32").numpy())


@pytest.mark.parametrize(("stored", "dtype"), [("F32", np.float32), ("F16", np.float16)])
def test_the_package_reads_what_we_wrote(tmp_path, stored, dtype):
    arrays = draw(dtype)
    file = tmp_path / "x.safetensors"
    write_file(file, {n: a.shape for n, a in arrays.items()}, stored, arrays.__getitem__)
    found = load_file(file)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == dtype
    with safetensors.safe_open(file, "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_package_reads_bfloat16_that_we_wrote(tmp_path):
    narrow = paddle.to_tensor(draw(np.float32)["a"]).astype("bfloat16")
    file = tmp_path / "x.safetensors"
    write_file(file, {"a": (3, 5)}, "BF16", lambda _: narrow.numpy())
    ((name, entry),) = safetensors.deserialize(file.read_bytes())
    assert (name, entry["dtype"], entry["shape"]) == ("a", "BF16", [3, 5])
    assert bytes(entry["data"]) == narrow.numpy().tobytes()
    np.testing.assert_array_equal(read_header(file)["a"].read(), narrow.astype("float32").numpy())


def test_transposed_data_is_written_in_file_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_file(tmp_path / "x.safetensors", {"t": (3, 2)}, "F32", lambda _: array.T)
    np.testing.assert_array_equal(load_file(tmp_path / "x.safetensors")["t"], array.T)


def test_data_starts_on_eight_bytes(tmp_path):
    """Readers map the data section; an odd start would make every access unaligned."""
    for length in range(1, 9):
        name = "n" * length
        file = tmp_path / name
        write_file(file, {name: (2,)}, "F32", lambda _: np.ones(2, np.float32))
        (header,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert header % 8 == 0
        json.loads(file.read_bytes()[8 : 8 + header])
