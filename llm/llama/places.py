"""What a place is that holds no model: an error that says which place does."""

import re
from pathlib import Path

from common.errors import UserError

# Endings of files that are a part of a model.
_PARTS = (".safetensors", ".bin", ".pdparams", ".pth", ".pt", ".json")
_RANK = re.compile(r"mp_rank_\d\d(_\d{3})?")


def check_place(place: Path) -> None:
    """Refuse a place that cannot hold a model's files.

    Raises:
        UserError: nothing is there, or a file; one of a model names the directory to give.
    """
    if place.is_dir():
        return
    said = f"{str(place)!r} is not a model directory"
    if place.is_file() and place.suffix in _PARTS:
        said += f" but a file of one; give its directory, {place.parent}{rank_of(place.parent)}"
    elif place.is_file():
        said += " and no GGUF file"
    raise UserError(said)


def rank_of(directory: Path) -> str:
    """Return a hint where a directory is that of one rank of Megatron's, else nothing."""
    above = directory.absolute().parent
    return f" (one rank's; that of all ranks is {above})" if _RANK.fullmatch(directory.name) else ""
