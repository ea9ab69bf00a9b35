"""``.pdparams`` files: paddle opens what is written, its own are read, and code is not run."""

import collections
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import paddle
import pytest

from common.errors import UserError
from llm.llama.files.pdparams import frame, read_pdparams

ARRAYS = {
    "matrix": np.arange(70_000, dtype=np.float32).reshape(200, 350),
    "half": np.linspace(-2, 2, 35, dtype=np.float16).reshape(5, 7),
    "brain": np.linspace(-2, 2, 600).astype(ml_dtypes.bfloat16),
    "a name of 300 letters " + "x" * 280: np.ones([1], np.float32),
}
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write(file):
    """Write the arrays as conversion does."""
    shapes = {n: (a.shape, KINDS[a.dtype.name]) for n, a in ARRAYS.items()}
    pieces, offsets = frame(shapes)
    parts = [
        p for before, a in zip(pieces, ARRAYS.values(), strict=False) for p in (before, a.tobytes())
    ]
    file.write_bytes(b"".join([*parts, pieces[-1]]))
    data = file.read_bytes()
    for name, array in ARRAYS.items():
        assert data[offsets[name] :].startswith(array.tobytes())
    return file


def test_paddle_opens_what_is_written(tmp_path):
    loaded = paddle.load(str(write(tmp_path / "w.pdparams")))
    assert list(loaded) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert str(loaded[name].dtype) == f"paddle.{array.dtype.name}"
        got = loaded[name].astype("float32").numpy()
        np.testing.assert_array_equal(got, array.astype(np.float32))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("protocol", [3, 4])
def test_what_paddle_writes_is_read(tmp_path, named, protocol):
    file = tmp_path / "p.pdparams"
    tensors = {n: paddle.to_tensor(a.astype(np.float32)) for n, a in ARRAYS.items()}
    tensors |= {n: tensors[n].astype(a.dtype.name) for n, a in ARRAYS.items()}
    if named:
        paddle.save(tensors, str(file), protocol=protocol)
    else:
        # A list in it makes paddle.save write (name, array) pairs without its table of names.
        with file.open("wb") as stream:
            pairs = {n: ("param", t.numpy()) for n, t in tensors.items()}
            pickle.dump(collections.OrderedDict(pairs), stream, protocol=protocol)
    found = read_pdparams(file)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, KINDS[array.dtype.name])
        np.testing.assert_array_equal(
            np.asarray(found[name].read(), np.float32), array.astype(np.float32)
        )


class Evil:
    """Runs code wherever it is unpickled by the standard library."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda e: {"w": e}, lambda e: {"w": ("n", e)}, lambda e: e])
def test_code_is_refused_and_not_run(tmp_path, protocol, wrap):
    file = tmp_path / "e.pdparams"
    mark = tmp_path / "ran"
    file.write_bytes(pickle.dumps(wrap(Evil(str(mark))), protocol))
    with pytest.raises(UserError, match=r"would run code|no pickle of arrays: opcode"):
        read_pdparams(file)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()


def hidden(module, name):
    """Return a pickle that calls a function by its name, below an array's name."""
    call = pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.EMPTY_TUPLE + pickle.REDUCE
    return pickle.PROTO + b"\4" + pickle.EMPTY_DICT + b"\x8c\1w" + call + pickle.SETITEM + b"."


@pytest.mark.parametrize(
    "path",
    [("builtins", "eval"), ("numpy", "load"), ("builtins", "getattr"), ("numpy", "dtype.type.mro")],
)
def test_functions_beyond_the_four_are_refused(tmp_path, path):
    file = tmp_path / "h.pdparams"
    file.write_bytes(hidden(*path))
    with pytest.raises(UserError, match=rf"asks to load {path[0]}\.{path[1]}"):
        read_pdparams(file)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "w.pdparams").read_bytes()
    file = tmp_path / "cut.pdparams"
    for end in [*range(0, 400, 7), *range(len(whole) // 2, len(whole), len(whole) // 40)]:
        file.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"cut off|would run code|no pickle"):
            read_pdparams(file)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "no pickle of arrays: opcode"),
        ({"step": 3}, "step is not an array of numbers"),
        ({"w": {"deeper": np.ones(3, np.float32)}}, "w is not an array"),
        ({"w": np.ones(3, np.int64)}, "w has type 'i8'"),
        ({"w": np.ones(3, ">f4")}, "w is big-endian; save it again"),
        ({"w": np.asfortranarray(np.ones([3, 4], np.float32))}, "column by column"),
        ({"w": np.array([{}, []], object)}, "opcode|not an array|type 'O8'"),
    ],
)
def test_other_contents_are_named(tmp_path, content, message):
    file = tmp_path / "o.pdparams"
    file.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(UserError, match=message):
        read_pdparams(file)


def test_protocol_2_says_what_to_do(tmp_path):
    file = tmp_path / "old.pdparams"
    paddle.save({"w": paddle.ones([3])}, str(file), protocol=2)
    with pytest.raises(UserError, match=r"protocol 2; save it again"):
        read_pdparams(file)


def test_nothing_is_read_into_memory(tmp_path):
    """A file of 40 GB, all but its frame a hole, is examined in no time."""
    pieces, offsets = frame({"big": ((100_000, 100_000), "F32")})
    file = Path(tmp_path / "big.pdparams")
    with file.open("wb") as stream:
        stream.write(pieces[0])
        stream.seek(offsets["big"] + 4 * 10**10)
        stream.write(pieces[1])
    assert read_pdparams(file)["big"].shape == (100_000, 100_000)
