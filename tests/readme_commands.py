"""The commands that the READMEs show, as lists of words."""

import re
import shlex
from pathlib import Path

READMES = ("README.md", "README_zh.md")


def bash_commands(file: Path) -> list[list[str]]:
    """Return every command of a page's ``bash`` blocks, lines joined and split as a shell would."""
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S):
        lines = block.replace("\\\n", " ").splitlines()
        commands += [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [words for words in commands if words]
