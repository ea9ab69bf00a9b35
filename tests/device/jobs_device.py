"""What ranks on the rehearsal device do, from the fork of a process that has imported paddle."""

import contextlib
import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm import runtime
from tests.device import rehearsal


def forget_waits() -> None:
    """Have nobody wait for a sum over ranks again."""
    import paddle.distributed as dist

    real = dist.all_reduce

    def all_reduce(tensor: Any, op: Any = dist.ReduceOp.SUM, group: Any = None, **_: Any) -> Any:
        return real(tensor, op, group, sync_op=False)

    dist.all_reduce = all_reduce


def overflow_on_one_rank() -> None:
    """Make the second rank's gradients of the second update larger than float16 can hold."""
    import paddle
    import paddle.distributed as dist

    from llm.train import objectives

    real, calls = objectives.next_token_objective, []

    def objective(*arguments: Any) -> Any:
        loss, *rest = real(*arguments)
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) == 2:
            large = loss * 1e30
            loss = loss.detach() + (large - large.detach())
        return loss, *rest

    objectives.next_token_objective = objective
    assert paddle.in_dynamic_mode()


def forget_half_precision() -> None:
    """Have Paddle know as little of the device's type as of any that its list does not name."""
    module = sys.modules["paddle.amp.auto_cast"]
    module._is_custom_device_bfloat16_supported = lambda: False


def refusal(device: str, autocast: str = "float32", known: bool = True) -> str:
    """Return what loading Paddle on a device says; nothing where that works."""
    from common.errors import UserError

    if not known:
        forget_half_precision()
    try:
        runtime.load_paddle(device, autocast=autocast)
    except UserError as error:
        return str(error)
    return ""


def place_of(device: str) -> str:
    """Return where a tensor lies once Paddle is loaded on a device."""
    import paddle

    runtime.load_paddle(device)
    return str(paddle.zeros([1]).place)


def capabilities() -> dict[str, list[Any]]:
    """Return form and types of each op on the current device."""
    from external_ops import devices
    from external_ops.capability import capabilities as found

    return {
        one.choice.op: [one.choice.form, *one.dtypes, *one.refused.values()]
        for one in found(devices.current())
    }


def served(role: str, words: list[str], port: int, request: dict[str, Any], file: str) -> None:
    """Run the server until it has answered one request, whose answer goes to a file."""

    def ask() -> None:
        import requests

        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            time.sleep(0.1)
        answer = requests.post(f"{url}/generate", json=request, timeout=60)
        Path(file).write_text(answer.text, encoding="utf-8")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    run_script(role, "server", [*words, "--flask_port", str(port), "--no_ui", "1"])


def run_script(role: str, name: str, words: list[str], before: str | None = None) -> None:
    """Run ``main`` of a script of the suite with these words on its command line.

    Args:
        role: one of :data:`rehearsal.ROLES`.
        name: of the script, without its ending.
        words: flags and values.
        before: ``module:function`` to call first, for tests that break something.
    """
    rehearsal.start(role)
    if before is not None:
        module, _, function = before.partition(":")
        getattr(importlib.import_module(module), function)()
    # What prepare() sets has to be set before paddle is imported; the server did that.
    runtime.prepare = lambda *_, **__: 1
    sys.argv = [f"{name}.py", *words]
    try:
        importlib.import_module(name).main()
    finally:
        rehearsal.finish()


def call(role: str, target: str, arguments: list[Any]) -> Any:
    """Call ``module:function`` with the device as the current one."""
    rehearsal.start(role)
    import paddle

    paddle.set_device("gpu" if role == "gpu" else rehearsal.TYPE)
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(*arguments)
    finally:
        rehearsal.finish()
