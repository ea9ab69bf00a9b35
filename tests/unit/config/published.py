"""A file or command line that another program publishes, and our script that takes it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Settings = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """One file or command line.

    Args:
        script: ours that takes it.
        settings: of the file; empty for a command line.
        line: words behind the script, or behind the file.
        suffix: of the file.
        refused: what the message says of settings that have no counterpart; none where it runs.
        without: these, which are refused, are left out in its place.
    """

    script: str
    settings: Settings = field(default_factory=dict)
    line: str = ""
    suffix: str = ".json"
    refused: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def _line(self, *, mended: bool) -> list[str]:
        flags = self.line.split("--")
        left_out = tuple(f"{name} " for name in self.without if mended)
        kept = [flag for flag in flags if not f"{flag} ".startswith(left_out)]
        return "--".join(kept).split()

    def words(self, directory: Path, *, mended: bool = False) -> list[str]:
        """Write the file and return the words of the command line.

        Args:
            directory: where to.
            mended: without what is refused.
        """
        words = self._line(mended=mended)
        if not self.settings:
            return words
        kept = {k: v for k, v in self.settings.items() if not mended or k not in self.without}
        path = directory / f"config{self.suffix}"
        path.write_text(json.dumps(kept) if self.suffix == ".json" else yaml.safe_dump(kept))
        return [str(path), *words]
