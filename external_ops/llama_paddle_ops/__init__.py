"""Native kernels of the Llama suite as Paddle custom operators.

Holds the compiled library and what is known of how it was made; ``external_ops.native`` loads it.
"""

import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
LIBRARY = _HERE / "llama_paddle_ops.so"


def build_info() -> dict[str, Any]:
    """Return the digest of the sources, compiler, Paddle version and GPU architectures."""
    return json.loads((_HERE / "build_info.json").read_text(encoding="utf-8"))
