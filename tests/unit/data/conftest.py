"""Small tokenizers and texts made on the spot, so that the tests need no data of others."""

import base64
from collections import Counter
from pathlib import Path

import pytest

from data.tokenization.training import train_sentencepiece
from data.tokenizer import Tokenizer, load_tokenizer

REPO = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Real text that every machine has: docstrings of the standard library."""
    import argparse
    import collections
    import decimal
    import email.message
    import subprocess

    texts = []
    for module in (argparse, collections, decimal, subprocess, email.message):
        texts.append(module.__doc__ or "")
        members = [getattr(module, name) for name in sorted(vars(module))]
        texts.extend(m.__doc__ for m in members if isinstance(getattr(m, "__doc__", None), str))
    return [text for text in dict.fromkeys(texts) if len(text) > 40]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> Path:
    """A directory with a sentencepiece model of 700 pieces."""
    directory = tmp_path_factory.mktemp("tiny")
    train_sentencepiece(prose, 700, directory / "tokenizer.model")
    return directory


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Tokenizer:
    """The tokenizer of `tiny_model`."""
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def tiny_tiktoken(tmp_path_factory: pytest.TempPathFactory, prose: list[str]) -> Path:
    """A tiktoken file of 256 bytes and the 600 most frequent short strings."""
    counts: Counter[bytes] = Counter()
    for text in prose:
        content = text.encode()
        for size in (2, 3, 4):
            counts.update(content[at : at + size] for at in range(0, len(content) - size, 3))
    tokens = [bytes([byte]) for byte in range(256)]
    # Shorter ones first, so that longer ones can be reached by merging.
    frequent = sorted((token for token, _ in counts.most_common(600)), key=lambda t: (len(t), t))
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    lines = [
        b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate([*tokens, *frequent])
    ]
    path.write_bytes(b"".join(lines))
    return path
