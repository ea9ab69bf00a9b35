"""The commands and examples that the pages show, as they stand there."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

READMES = ("README.md", "README_zh.md")
# A page of commands, in the order in which a newcomer meets them.
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.M | re.S)


class Shown(NamedTuple):
    """A command line, or a whole example in Python.

    Args:
        kind: ``bash`` or ``python``.
        text: as a shell, or Python, takes it; lines of a command are joined.
    """

    kind: str
    text: str

    @property
    def words(self) -> list[str]:
        """The command's words, split as a shell would; empty where there is only a comment."""
        return shlex.split(self.text, comments=True) if self.kind == "bash" else []


def shown(file: Path) -> list[Shown]:
    """Return what a page's ``bash`` and ``python`` blocks hold, in its order."""
    found = []
    for kind, block in _BLOCK.findall(file.read_text(encoding="utf-8")):
        if kind == "python":
            found.append(Shown(kind, block))
            continue
        lines = [" ".join(line.split()) for line in block.replace("\\\n", " ").splitlines()]
        found += [Shown(kind, line) for line in lines if line and not line.startswith("#")]
    return found


def bash_commands(file: Path) -> list[list[str]]:
    """Return every command of a page's ``bash`` blocks, lines joined and split as a shell would."""
    return [one.words for one in shown(file) if one.words]


def help_examples(text: str) -> list[Shown]:
    """Return the commands that a ``--help`` shows: lines that begin with ``python``."""
    lines = text.replace("\\\n", " ").splitlines()
    lines = [" ".join(line.split()) for line in lines]
    return [Shown("bash", line) for line in lines if line.startswith("python ")]
