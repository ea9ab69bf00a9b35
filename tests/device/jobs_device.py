"""What ranks on the rehearsal device do, from the fork of a process that has imported paddle."""

import importlib
import sys
from typing import Any

from llm import runtime
from tests.device import rehearsal


def run_script(role: str, name: str, words: list[str]) -> None:
    """Run ``main`` of a script of the suite with these words on its command line."""
    rehearsal.start(role)
    # What prepare() sets has to be set before paddle is imported; the server did that.
    runtime.prepare = lambda *_: 1
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
