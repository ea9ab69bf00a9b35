"""A corpus that every machine with Python has: the documentation strings of its standard library.

Nothing is downloaded and nothing of others' is shipped; the text stays on the machine that made it.
"""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from common import jsonl
from common.errors import DataError

# Test suites and bundled packages differ between distributions of Python.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
_SITE = {"site-packages", "dist-packages"}
_SHORTEST = 40  # characters; shorter ones say too little to learn from


def _sources(root: Path) -> list[Path]:
    """Return the library's modules; ``root`` itself may lie below a skipped name."""
    return [
        file
        for file in sorted(root.rglob("*.py"))
        if not (_SKIPPED | _SITE).intersection(file.relative_to(root).parts)
    ]


def documentation_strings(root: Path) -> Iterator[str]:
    """Yield the docstrings of every module, class and function below ``root``, each once."""
    seen: set[str] = set()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in tqdm(_sources(root), "reading the standard library", disable=None, leave=False):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and test data with a .py name
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) >= _SHORTEST and text not in seen:
                seen.add(text)
                yield text
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return
    yield from (topics[name].strip() for name in sorted(topics))


def write_corpus(directory: str | Path, held_out_every: int = 20) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``heldout.jsonl``, one document a line.

    Args:
        directory: created when absent.
        held_out_every: one document in so many is kept from training.

    Returns:
        Both paths.

    Raises:
        DataError: this Python's standard library holds no source.
    """
    documents = list(documentation_strings(Path(sysconfig.get_paths()["stdlib"])))
    if len(documents) < held_out_every:
        raise DataError("this Python's standard library has no sources to take text from")
    # Mixed, so that a split by position leaves the same kinds of text on both sides.
    random.Random(0).shuffle(documents)
    parts: dict[str, list[str]] = {"train": [], "heldout": []}
    for number, text in enumerate(documents):
        parts["heldout" if number % held_out_every == 0 else "train"].append(text)
    train, heldout = (
        jsonl.write(Path(directory) / f"{name}.jsonl", ({"text": text} for text in texts))
        for name, texts in parts.items()
    )
    return train, heldout
