"""The seam that chooses kernels."""

import dataclasses
import logging

import pytest

from external_ops import (
    backend,
    block_decoder,
    cross_entropy,
    flash_attention,
    native,
    rms_norm,
    rotary,
    swiglu,
)
from external_ops.backend import Forms, Ops, select_ops
from external_ops.modes import OPS


def kernel(*_):
    """Stand in for a native form."""


@pytest.fixture
def told(monkeypatch):
    """Collect what is logged, by level."""
    lines = []
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr(backend._log, "log", lambda level, line: lines.append((level, line)))
    return lines


@pytest.fixture
def built(monkeypatch):
    """Say whether the native ops are there; rms_norm and swiglu have one, on CPU."""

    def say(on_cpu):
        why = "" if on_cpu else "the native ops are not built (how)"
        monkeypatch.setattr(native, "reason", lambda device="cpu": why)
        monkeypatch.setattr(native, "level", lambda: "avx2")
        for op, forms in backend.FORMS.items():
            own = {"cpu": kernel} if op in ("rms_norm", "swiglu") else {}
            monkeypatch.setitem(backend.FORMS, op, dataclasses.replace(forms, native=own))

    return say


def test_every_op_has_a_row_and_a_field():
    fields = {field.name for field in dataclasses.fields(Ops)} - {"choices"}
    assert set(backend.FORMS) == set(OPS) == fields


def test_auto_takes_native_kernels_and_says_so_once(told, built):
    built(True)
    for _ in range(3):
        ops = select_ops(device="cpu")
    assert ops.rms_norm is ops.swiglu is kernel
    assert ops.causal_attention is backend.FORMS["causal_attention"].plain["cpu"]
    assert [level for level, _ in told] == [logging.INFO]
    title, heading, *rows = told[0][1].splitlines()
    assert title == "ops on cpu:" and heading.split() == ["op", "form", "level", "why"]
    assert [row.split()[0] for row in rows] == list(OPS)
    assert rows[0] == "rms_norm          native     avx2   auto: the best there is"
    assert rows[1] == "add_rms_norm      reference         auto: no kernel was written for cpu"
    assert rows[4] == "causal_attention  plain             auto: no kernel was written for cpu"


def test_without_native_kernels_auto_takes_plain_ones_and_warns_once(told, built):
    built(False)
    for _ in range(3):
        ops = select_ops(device="cpu")
    assert ops.rms_norm is rms_norm.rms_norm_fused_cpu
    assert ops.swiglu is backend.FORMS["swiglu"].reference
    line = "the native ops are not built (how); ops run on plain Paddle operators"
    assert told[1:] == [(logging.WARNING, line)]
    level, rows = told[0]
    assert level == logging.INFO and rows.count("auto: library not loaded") == 2


def test_other_processes_are_silent(told, built, monkeypatch):
    built(False)
    monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
    select_ops(device="cpu")
    assert told == []


def test_fused_raises_and_says_how_to_build(told, built):
    built(False)
    why = "no fused rms_norm on cpu: the native ops are not built \\(how\\); or choose auto or ref"
    for modes in ({"rms_norm": "fused"}, {"others": "fused"}):
        with pytest.raises(ValueError, match=why):
            select_ops(modes, device="cpu")
    assert select_ops({"others": "fused", "rms_norm": "auto", "swiglu": "auto"}, device="cpu")


def test_fused_raises_where_nobody_wrote_one(told, built):
    built(True)
    with pytest.raises(ValueError, match="no fused paged_attention on cpu: no kernel was written"):
        select_ops({"paged_attention": "fused"}, device="cpu")
    ops = select_ops({"others": "fused"}, device="cpu")
    assert ops.rms_norm is kernel
    assert ops.paged_attention is backend.FORMS["paged_attention"].reference


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_reference_is_the_definition(told, device):
    ops = select_ops({"others": "reference"}, device=device)
    for op in OPS:
        assert getattr(ops, op) is backend.FORMS[op].reference
    assert [level for level, _ in told] == [logging.INFO]


def test_choices_say_which_form_was_taken_and_why(told, built):
    built(True)
    modes = {"others": "fused", "swiglu": "auto", "rms_norm": "reference", "rotary": "auto"}
    found = {choice.op: choice for choice in select_ops(modes, device="cpu").choices}
    assert list(found) == list(OPS)
    assert dataclasses.astuple(found["swiglu"])[1:] == ("native", "avx2", "auto: the best there is")
    assert dataclasses.astuple(found["rms_norm"])[1:] == (
        "reference",
        "",
        "reference: as the flags say",
    )
    found = {choice.op: choice for choice in select_ops(device="gpu").choices}
    assert found["rms_norm"].form == found["causal_attention"].form == "paddle"
    assert found["cross_entropy"].form == "plain" and found["paged_attention"].form == "reference"
    assert found["paged_attention"].why == "auto: no kernel was written for gpu"
    assert len(told) == 2


def test_gpus_take_paddle_s_own_kernels(told):
    ops = select_ops({"rms_norm": "fused", "causal_attention": "auto"}, device="gpu")
    assert ops.rms_norm is rms_norm.rms_norm_fused_gpu
    assert ops.add_rms_norm is rms_norm.add_rms_norm_fused_gpu
    assert ops.causal_attention is flash_attention.causal_attention_gpu
    assert ops.cross_entropy is cross_entropy.cross_entropy_chunked
    assert ops.decoder is block_decoder.decoder_blocks
    assert ops.rotary is rotary.rotary_gpu and ops.swiglu is swiglu.swiglu_gpu


@pytest.fixture
def gpu(monkeypatch):
    """Say which GPU the machine has."""

    def have(*capability):
        device = backend.paddle.device
        monkeypatch.setattr(device, "is_compiled_with_cuda", lambda: True)
        monkeypatch.setattr(device.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(device.cuda, "get_device_capability", lambda: capability)

    return have


@pytest.mark.parametrize("modes", [{}, {"others": "fused"}], ids=str)
def test_old_gpus_have_no_flash_attention(told, gpu, modes):
    """Volta and Turing: Paddle's FlashAttention is for Ampere and newer."""
    gpu(7, 5)
    ops = select_ops(modes, device="gpu")
    assert ops.causal_attention is flash_attention.causal_attention_ref and ops.decoder is None
    assert ops.rms_norm is rms_norm.rms_norm_fused_gpu
    (row,) = [choice for choice in ops.choices if choice.op == "causal_attention"]
    why = "auto: FlashAttention needs compute capability 8.0, this GPU has 7.5"
    assert (row.form, row.why) == ("reference", why)
    with pytest.raises(ValueError, match=f"no fused causal_attention on gpu: {why[6:]}; or"):
        select_ops({"causal_attention": "fused"}, device="gpu")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_new_gpus_have_it_for_half_precision(told, gpu, capability):
    gpu(*capability)
    ops = select_ops(device="gpu")
    assert ops.causal_attention is flash_attention.causal_attention_gpu
    (row,) = [choice for choice in ops.choices if choice.op == "causal_attention"]
    assert row.form == "paddle" and "float32 takes the reference" in row.why


def test_named_ops_go_before_the_others(told):
    ops = select_ops({"others": "reference", "rms_norm": "auto"}, device="gpu")
    assert ops.rms_norm is rms_norm.rms_norm_fused_gpu
    assert ops.causal_attention is flash_attention.causal_attention_ref


def test_preference(told, built, monkeypatch):
    built(True)
    forms = Forms(1, plain={"cpu": 2}, native={"cpu": 3}, paddle={"cpu": 4})
    for expected, gone in ((4, "paddle"), (3, "native"), (2, "plain"), (1, "")):
        monkeypatch.setitem(backend.FORMS, "swiglu", forms)
        assert select_ops(device="cpu").swiglu == expected
        forms = dataclasses.replace(forms, **({gone: {}} if gone else {}))


def test_unknown_names():
    with pytest.raises(ValueError, match="rms_norm: mode 'fast' is not one of auto, fused"):
        select_ops({"rms_norm": "fast"}, device="cpu")
    with pytest.raises(ValueError, match="'norm' is not an op; there are rms_norm, "):
        select_ops({"norm": "auto"}, device="cpu")
