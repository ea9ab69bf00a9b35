"""Names of devices: what ``--device`` takes, and what has to be installed for each kind.

A device is a kind, such as ``gpu``, or one of its cards, ``gpu:1``. Paddle has kinds of its own,
each in a wheel of its own, and takes any number of others from plug-ins beside the CPU wheel
("custom devices"), each of which says what its type is called. :data:`KINDS` is what is known of
both before Paddle is imported; a type that is not listed is taken too, where Paddle lists it.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, near_name

CPU, GPU, DCU, XPU = "cpu", "gpu", "dcu", "xpu"
AUTO = "auto"
# Of Paddle itself; all others are custom devices.
BUILT_IN = (CPU, GPU, DCU, XPU)
# Kinds that paddle.device.cuda speaks to: Paddle's builds for ROCm have the same interface.
CUDA_LIKE = (GPU, DCU)
_INDEX = "https://www.paddlepaddle.org.cn/packages/stable"


@dataclass(frozen=True)
class Kind:
    """What has to be there for a kind of device.

    Args:
        what: the device, in words.
        wheel: package that brings it; the CPU wheel lies beside it where it is a plug-in.
        version: the newest release whose wheel is documented.
        folder: of Paddle's package index, where the wheel is; empty for PyPI.
        nodes: files that the driver makes; a machine with one of them has such a device.
        hides: the environment variable that lists the cards that a process may see.
    """

    what: str
    wheel: str
    version: str
    folder: str
    nodes: tuple[str, ...] = ()
    hides: str = ""

    @property
    def index(self) -> str:
        """The package index that has the wheel."""
        return f"{_INDEX}/{self.folder}/"

    @property
    def is_plugin(self) -> bool:
        """Whether the wheel goes beside Paddle's CPU wheel instead of taking its place."""
        return not self.wheel.startswith("paddlepaddle")

    @property
    def paddle(self) -> str:
        """The requirement that brings Paddle itself."""
        return (
            f"paddlepaddle=={self.version}" if self.is_plugin else f"{self.wheel}=={self.version}"
        )

    @property
    def install(self) -> str:
        """The command that installs it, without the CPU wheel that a plug-in needs beside it."""
        return f"pip install {self.wheel}=={self.version} -i {self.index}"


KINDS = {
    GPU: Kind(
        "a GPU of NVIDIA",
        "paddlepaddle-gpu",
        "3.3.1",
        "cu126",
        ("/dev/nvidiactl", "/dev/dxg"),  # Linux, and Linux inside Windows
        "CUDA_VISIBLE_DEVICES",
    ),
    DCU: Kind(
        "a Hygon DCU", "paddlepaddle-dcu", "3.3.0", "dcu", ("/dev/kfd",), "HIP_VISIBLE_DEVICES"
    ),
    XPU: Kind(
        "a Kunlun XPU",
        "paddlepaddle-xpu",
        "3.3.0",
        "xpu-p800",
        ("/dev/xpuctrl",),
        "XPU_VISIBLE_DEVICES",
    ),
    "npu": Kind(
        "an Ascend NPU",
        "paddle-custom-npu",
        "3.3.0",
        "npu",
        ("/dev/davinci_manager",),
        "ASCEND_RT_VISIBLE_DEVICES",
    ),
    "mlu": Kind("a Cambricon MLU", "paddle-custom-mlu", "3.3.0", "mlu"),
    "gcu": Kind("an Enflame GCU", "paddle-custom-gcu", "3.1.1", "gcu"),
    "iluvatar_gpu": Kind("a GPU of Iluvatar", "paddle-iluvatar-gpu", "3.3.0", "ixuca"),
    "metax_gpu": Kind("a GPU of MetaX", "paddle-metax-gpu", "3.3.0", "maca"),
}
# What people say elsewhere.
_OTHER_WORDS = {"cuda": GPU, "nvidia": GPU, "rocm": DCU, "ascend": "npu", "kunlun": XPU}
_WORD = re.compile(r"([a-z][a-z0-9_]*)(?::(\d+))?")


def parse(device: str) -> tuple[str, int | None]:
    """Return kind and number of a device; None where no card is named.

    Raises:
        UserError: a word that cannot be a device, or is another program's word for one.
    """
    found = _WORD.fullmatch(device)
    if found is None:
        raise UserError(
            f"device={device!r} is not a device; write a kind such as cpu, gpu or npu, or a card "
            "of it, such as gpu:1"
        )
    kind, number = found[1], None if found[2] is None else int(found[2])
    if kind in _OTHER_WORDS:
        meant = device.replace(kind, _OTHER_WORDS[kind])
        raise UserError(f"device={device!r} is called {meant!r} here; --device {meant}")
    if kind in (CPU, AUTO) and number is not None:
        raise UserError(f"device={device!r}: {kind} has no numbers; write --device {kind}")
    return kind, number


def kind_of(device: str) -> str:
    """Return the kind of a device that :func:`parse` takes: ``gpu`` of ``gpu:1``."""
    return device.partition(":")[0]


def check(device: str, processes: int) -> None:
    """Refuse words that are no device, and a card that contradicts the launcher's.

    Args:
        device: as the user said it.
        processes: how many the launcher started.

    Raises:
        UserError: names both, and what to write instead.
    """
    kind, number = parse(device)
    if number is None:
        return
    if processes > 1:
        raise UserError(
            f"device={device} names one card, but {processes} processes were launched, each with "
            f"a card of its own; write --device {kind}, and choose cards with the launcher's "
            "--devices"
        )
    selected = os.environ.get(f"FLAGS_selected_{kind}s", "").split(",")[0]
    if selected not in ("", str(number)):
        raise UserError(
            f"device={device}, but the launcher gave this process card {selected}; write --device "
            f"{kind}, or drop the launcher's --devices"
        )


def check_given(device: str, processes: int) -> None:
    """Refuse to share CPUs where the launcher was asked for cards.

    Args:
        device: what ``auto`` has become.
        processes: how many the launcher started.

    Raises:
        UserError: names the card, and what to write instead.
    """
    for kind in BUILT_IN[1:]:
        card = os.environ.get(f"FLAGS_selected_{kind}s")
        if card and processes > 1 and device == CPU:
            raise UserError(
                f"the launcher gave this process {kind} {card} (--gpus), and it would compute on "
                f"the CPU; launch with --nproc_per_node {processes} in the place of --gpus to "
                f"have {processes} processes on this machine's CPU, or install what the card needs "
                "(docs/devices.md)"
            )


def present() -> str | None:
    """Return the kind whose driver is on this machine and hides nothing, or None.

    Only kinds in :data:`KINDS` that have driver files, in that order.
    """
    for name, kind in KINDS.items():
        hidden = os.environ.get(kind.hides, "all").strip() in ("", "-1")
        if not hidden and any(Path(node).exists() for node in kind.nodes):
            return name
    return None


def how_to_get(kind: str, there: Iterable[str]) -> str:
    """Return what to do for a device of a kind that is none of those that Paddle has here."""
    if kind in KINDS:
        own = KINDS[kind]
        beside = f"{own.paddle} from PyPI and beside it " if own.is_plugin else "in its place "
        return f"for {own.what}, `make setup DEVICE={kind}`, or {beside}`{own.install}`"
    near = near_name(kind, (*there, *BUILT_IN, *KINDS))
    guess = f"did you mean {near}? Otherwise " if near else ""
    return f"{guess}install the plug-in that brings the type {kind} beside Paddle's CPU wheel"
