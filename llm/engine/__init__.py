"""Generation with a paged cache, over a dygraph network or an exported program alike.

``engine`` drives, ``scheduler`` decides what runs in a step, ``block_manager`` owns the cache
blocks, ``sequence`` is one request, ``sampler`` picks tokens, ``runner`` executes, ``manifest``
describes an exported program.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.engine.engine import Engine


def load_engine(
    model_dir: str | Path, prefix: str, *, device: str = "cpu", threads: int = 1, **options: Any
) -> "Engine":
    """Open an exported program and return an engine over it.

    Args:
        model_dir: directory of the export.
        prefix: its file prefix.
        device: ``cpu`` or ``gpu``.
        threads: CPU threads of the math library.
        options: those of :class:`llm.engine.engine.Engine`.

    Raises:
        UserError: a damaged or incomplete export.
    """
    from llm.engine.engine import Engine
    from llm.engine.runners import PredictorRunner

    return Engine(PredictorRunner(model_dir, prefix, device=device, threads=threads), **options)
