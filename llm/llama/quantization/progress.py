"""Layers that are quantized already, on disk: a run that was ended goes on behind them."""

import hashlib
import json
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files import replacing, write_whole, writing
from llm.llama.files.packed import fingerprint

ENDING = "-progress"  # of the directory beside the output directory
_SETTINGS = "settings.json"
_WEIGHTS = (".safetensors", ".pdparams", ".bin")
Arrays = dict[str, NDArray[Any]]


class Progress:
    """What a run has finished, by name.

    Args:
        directory: made at the first :meth:`store`, removed by :meth:`remove`.
        settings: what the results depend on.

    Raises:
        UserError: the directory holds results of other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory, self.settings = directory, json.dumps(settings, indent=1)
        file = directory / _SETTINGS
        if file.exists() and file.read_text(encoding="utf-8") != self.settings:
            raise UserError(
                f"{directory} holds the layers of a run with another model, text or settings; "
                "remove it, or give the flags of that run to go on with it"
            )

    def load(self, name: str) -> Arrays | None:
        """Return what was stored under a name, None where nothing was.

        Raises:
            UserError: a damaged file, as a machine that lost power may leave it.
        """
        file = self.directory / f"{name}.npz"
        if not file.exists():
            return None
        try:
            with np.load(file) as arrays:
                return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{file} is damaged; remove it, and it is made again") from error

    def store(self, name: str, arrays: Arrays) -> None:
        """Keep results; a file is there whole or not at all.

        Raises:
            DataError: a disk that is full or may not be written.
        """
        with writing(self.directory):
            write_whole(self.directory / _SETTINGS, self.settings)
            with (
                replacing(self.directory / f"{name}.npz") as temporary,
                temporary.open("wb") as stream,
            ):
                np.savez(stream, **arrays)

    def __len__(self) -> int:
        """Return how many results are there."""
        return len(list(self.directory.glob("*.npz")))

    def remove(self) -> None:
        """Remove everything, once the results are elsewhere."""
        shutil.rmtree(self.directory, ignore_errors=True)


def described(model: Path, rows: NDArray[np.int64], **others: Any) -> dict[str, Any]:
    """Return what the results of a run depend on.

    Args:
        model: directory of the network that is quantized.
        rows: calibration rows.
        others: further settings.
    """
    files = {file for file in model.iterdir() if file.suffix in _WEIGHTS}
    text = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
    return {"model": fingerprint(model, files), "rows": [*rows.shape, text], **others}
