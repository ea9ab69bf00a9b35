"""The seam that chooses kernels."""

import logging

import pytest

from external_ops import backend, cross_entropy, flash_attention, rms_norm, tiled_attention
from external_ops.backend import select_ops


@pytest.mark.parametrize(
    ("device", "mode", "kernel"),
    [
        ("cpu", "auto", rms_norm.rms_norm_fused_cpu),
        ("cpu", "fused", rms_norm.rms_norm_fused_cpu),
        ("cpu", "reference", rms_norm.rms_norm_ref),
        ("gpu", "auto", rms_norm.rms_norm_fused_gpu),
        ("gpu", "reference", rms_norm.rms_norm_ref),
    ],
)
def test_rms_norm_choice(device, mode, kernel):
    assert select_ops(rms_norm_mode=mode, device=device).rms_norm is kernel


@pytest.mark.parametrize(
    ("device", "mode", "kernel"),
    [
        ("cpu", "auto", tiled_attention.causal_attention_tiled),
        ("cpu", "fused", tiled_attention.causal_attention_tiled),
        ("cpu", "reference", flash_attention.causal_attention_ref),
        ("gpu", "auto", flash_attention.causal_attention_gpu),
        ("gpu", "reference", flash_attention.causal_attention_ref),
    ],
)
def test_attention_choice(device, mode, kernel):
    assert select_ops(attention_mode=mode, device=device).causal_attention is kernel


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_cross_entropy_choice(device):
    chosen = [select_ops(cross_entropy_mode=m, device=device) for m in ("fused", "reference")]
    assert chosen[0].cross_entropy is cross_entropy.cross_entropy_chunked
    assert chosen[1].cross_entropy is cross_entropy.cross_entropy_ref


def test_without_a_fused_form_auto_says_so_and_fused_raises(monkeypatch, caplog):
    monkeypatch.delitem(backend._FUSED["causal_attention"], "cpu")
    monkeypatch.setattr(backend, "_said", set())
    caplog.set_level(logging.INFO, backend._log.name)
    monkeypatch.setattr(logging.getLogger("external_ops"), "propagate", True)
    assert select_ops(device="cpu").causal_attention is flash_attention.causal_attention_ref
    assert "causal_attention on cpu: reference kernel (no fused one here" in caplog.text
    with pytest.raises(ValueError, match="no fused causal_attention on cpu; choose 'auto'"):
        select_ops(attention_mode="fused", device="cpu")


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="rms_norm: mode 'fast' is not one of auto, fused"):
        select_ops(rms_norm_mode="fast", device="cpu")


def test_choice_is_logged_once(monkeypatch):
    monkeypatch.setattr(backend, "_said", set())
    lines = []
    monkeypatch.setattr(backend._log, "info", lines.append)
    for _ in range(3):
        select_ops(device="cpu")
    assert len(lines) == len(set(lines)) == 3
    assert any("causal_attention on cpu: fused kernel" in line for line in lines)
