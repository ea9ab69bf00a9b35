"""Write the reference files that ``make test`` compares with where no peer is installed.

Run ``.venv-peers/bin/python -m tests.parity.make_reference`` at the root of the repository, in the
environment of requirements-peers.txt. The manifest records versions, the table of cases with its
seeds, and a hash of each file.
"""

import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from tests.parity.cases import cases
from tests.parity.hf_side import write_case

REFERENCE = Path(__file__).resolve().parent / "reference"
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def main() -> None:
    """Replace the reference directory."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    shutil.rmtree(REFERENCE, ignore_errors=True)
    chosen = cases("reference")
    for case in chosen:
        write_case(case, REFERENCE / case.name)
    files = sorted(path for path in REFERENCE.rglob("*") if path.is_file())
    manifest = {
        "command": "python -m tests.parity.make_reference",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "cases": [case.as_json() for case in chosen],
        "sha256": {
            path.relative_to(REFERENCE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }
    text = json.dumps(manifest, indent=1) + "\n"
    (REFERENCE / "manifest.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
