"""The suite's scripts on every rank, as the launcher would start them but without its imports."""

import importlib
import sys

from llm import runtime


def run_script(name: str, words: list[str]) -> None:
    """Run ``main`` of a script with these words on its command line."""
    # What prepare() sets has to be set before paddle is imported; the rank server did that.
    runtime.prepare = lambda *_, **__: 1
    sys.argv = [f"{name}.py", *words]
    importlib.import_module(name).main()
