"""What ranks on the rehearsal device do, from the fork of a process that has imported paddle."""

import importlib
import sys
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
