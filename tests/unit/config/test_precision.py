"""Which types each kind of work takes on each device, and how types are spelled."""

from dataclasses import dataclass
from itertools import product

import pytest

from common.errors import UserError
from common.flags import load
from llm.config.precision import DTYPES, check_precision, dtype_arg, refusal

NOT_BUILT = "the native ops are not built"
# What may run; all that is not listed is refused.
ALLOWED = {
    *product(("inference", "training"), DTYPES, ("gpu",), ("", NOT_BUILT)),
    *product(("inference", "training"), ("float32",), ("cpu",), ("", NOT_BUILT)),
    ("inference", "bfloat16", "cpu", ""),
}
MESSAGES = {
    ("inference", "bfloat16"): f"dtype=bfloat16 needs the native ops, or a GPU: {NOT_BUILT}; or use"
    " float32",
    ("inference", "float16"): "dtype=float16 needs a GPU: a CPU computes in float32 or bfloat16; or"
    " use float32",
    ("training", "bfloat16"): "dtype=bfloat16 needs a GPU: Paddle has no bf16 kernels on CPU; or "
    "use float32",
    ("training", "float16"): "dtype=float16 needs a GPU: Paddle has no fp16 kernels on CPU; or use "
    "float32",
}


@dataclass
class Group:
    """A group with such a flag."""

    dtype: str = dtype_arg("float32", "type to compute in")
    stored: str | None = dtype_arg(None, "type to store")


@pytest.mark.parametrize("work", ["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("missing", ["", NOT_BUILT])
def test_the_rule(work, dtype, device, missing):
    if (work, dtype, device, missing) in ALLOWED:
        assert refusal(work, dtype, device, missing=missing) == ""
        check_precision(work, dtype, device, missing=missing)
        return
    with pytest.raises(UserError) as refused:
        check_precision(work, dtype, device, missing=missing)
    assert str(refused.value) == MESSAGES[work, dtype]


def test_the_flag_that_asked_is_named():
    with pytest.raises(UserError, match=r"^bf16 needs a GPU: Paddle has .*; or drop --bf16$"):
        check_precision("training", "bfloat16", "cpu", flag="bf16")
    with pytest.raises(UserError, match="dtype='int8' is not one of float32, bfloat16, float16"):
        check_precision("inference", "int8", "gpu")


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"), ("bfloat16", "bfloat16")],
)
def test_short_names(word, dtype, tmp_path):
    (found,) = load([Group], ["--dtype", word, "--stored", word], prog="test")
    assert found.dtype == found.stored == dtype
    file = tmp_path / "run.yaml"
    file.write_text(f"dtype: {word}\n", "utf-8")
    (found,) = load([Group], [str(file), "--dtype", dtype], prog="test")
    assert (found.dtype, found.stored) == (dtype, None)


def test_other_names_are_refused():
    with pytest.raises(UserError, match="'half' is not one of float32, bfloat16, float16"):
        load([Group], ["--dtype", "half"], prog="test")
