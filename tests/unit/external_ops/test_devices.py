"""What Paddle's builds for other devices would answer, put in its place."""

import paddle
import pytest

from common.devices import KINDS
from common.errors import UserError
from external_ops import devices
from llm import runtime
from llm.train import processes


@pytest.fixture
def build(monkeypatch):
    """``build(cuda=0, rocm=False, xpu=None, custom={})``: how many of what this Paddle has."""

    def say(cuda=None, rocm=False, xpu=None, custom=None):
        device, core = paddle.device, paddle.base.core
        custom = custom or {}
        monkeypatch.setattr(device, "is_compiled_with_cuda", lambda: cuda is not None)
        monkeypatch.setattr(device, "is_compiled_with_rocm", lambda: rocm)
        monkeypatch.setattr(device, "is_compiled_with_xpu", lambda: xpu is not None)
        monkeypatch.setattr(device.cuda, "device_count", lambda: cuda or 0)
        monkeypatch.setattr(core, "get_xpu_device_count", lambda: xpu or 0, raising=False)
        monkeypatch.setattr(device, "get_all_custom_device_type", lambda: list(custom))
        monkeypatch.setattr(core, "get_custom_device_count", custom.__getitem__, raising=False)

    return say


BUILDS = {
    "gpu": ({"cuda": 2}, ["cpu", "gpu:0", "gpu:1"]),
    "dcu": ({"cuda": 1, "rocm": True}, ["cpu", "dcu:0"]),
    "xpu": ({"xpu": 2}, ["cpu", "xpu:0", "xpu:1"]),
    "npu": ({"custom": {"npu": 1, "other": 0}}, ["cpu", "npu:0"]),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_each_build_has_its_own_devices(build, kind):
    answers, expected = BUILDS[kind]
    build(**answers)
    assert devices.here() == expected
    for other in KINDS:
        assert devices.cards(other) == (len(expected) - 1 if other == kind else 0)
        runtime._check_device(paddle, kind)
    for other in BUILDS.keys() - {kind}:
        with pytest.raises(UserError, match=rf"has {', '.join(expected)} here; for an? .*{other}"):
            runtime._check_device(paddle, other)
    with pytest.raises(UserError, match=rf"device={kind}:2, but .*; choose one of these"):
        runtime._check_device(paddle, f"{kind}:2")


def test_a_build_without_its_device_says_so(build):
    build(cuda=0)
    with pytest.raises(UserError, match="this build is for a GPU of NVIDIA, and sees none; check"):
        runtime._check_device(paddle, "gpu")


@pytest.mark.parametrize(
    ("place", "rocm", "kind"),
    [
        ("cpu", False, "cpu"),
        ("gpu:1", False, "gpu"),
        ("gpu:0", True, "dcu"),
        ("npu:3", False, "npu"),
    ],
)
def test_the_kind_of_the_current_device(monkeypatch, place, rocm, kind):
    monkeypatch.setattr(paddle.device, "get_device", lambda: place)
    monkeypatch.setattr(paddle.device, "is_compiled_with_rocm", lambda: rocm)
    assert devices.current() == kind


def test_a_device_that_does_not_tell_its_memory(monkeypatch):
    """Plug-ins need not; then nobody guesses whether the optimizer's state fits."""
    monkeypatch.setattr(paddle.device, "get_device", lambda: "npu:0")
    assert devices.memory() is None
    with pytest.raises(UserError, match="npu does not tell how much memory it has; choose off or"):
        processes.device_bytes("npu")


def test_one_product_shows_whether_autocast_computes_in_a_type(monkeypatch):
    assert "Paddle goes on in float32 (amp_guard can only" in runtime._no_autocast(
        paddle, "float16"
    )
    monkeypatch.setattr(paddle, "float16", paddle.float32)
    assert runtime._no_autocast(paddle, "float16") == ""
