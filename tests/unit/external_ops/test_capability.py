"""What each op can do on a device is tried out: wrong numbers and refusals are noticed."""

import dataclasses

import pytest

from external_ops import backend
from external_ops.capability import CASES, capabilities, table
from external_ops.modes import OPS
from external_ops.swiglu import swiglu_ref


def refusing(gate, up):
    raise RuntimeError("C++ stack\n\n(NotFound) no kernel here (at /a/file.cc:1)\n  [Hint: x]")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda gate, up: swiglu_ref(gate, up * 1.1), "from the reference in float32"),
        (lambda gate, up: swiglu_ref(gate, up.detach()) + 0 * up, "from the reference in float32"),
        (refusing, "(NotFound) no kernel here"),
    ],
    ids=["wrong", "wrong gradient", "refusing"],
)
def test_what_a_form_does_not_do_is_said(monkeypatch, kernel, said):
    own = dataclasses.replace(backend.FORMS["swiglu"], native={}, plain={"cpu": kernel})
    monkeypatch.setitem(backend.FORMS, "swiglu", own)
    found = {one.choice.op: one for one in capabilities("cpu")}
    assert list(found) == list(OPS) and found["swiglu"].choice.form == "plain"
    assert "float32" not in found["swiglu"].dtypes
    assert found["swiglu"].refused["float32"].endswith(said)
    assert "float32" in found["rms_norm"].dtypes
    assert f"swiglu not in float32: {found['swiglu'].refused['float32']}" in table("cpu")


def test_every_op_that_a_network_calls_has_a_case():
    assert set(CASES) == set(OPS) - {"decoder"}
