"""Where a run reports: the terminal, ``train_log.jsonl``, and the loss curve drawn from it."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import jsonl
from common.files import replacing
from llm import runtime

LOG_FILE = "train_log.jsonl"
CURVE_FILE = "loss_curve.png"
logger = logging.getLogger("llm.train")
_SOURCES = ("llm", "external_ops", "data")


class _TqdmHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def configure() -> None:
    """Send the suite's messages to stderr, one line each; safe to call twice.

    Of the processes of a parallel job only the first one says what all of them would.
    """
    if logging.getLogger(_SOURCES[0]).handlers:
        return
    level = logging.INFO if os.environ.get("PADDLE_TRAINER_ID", "0") == "0" else logging.WARNING
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    for name in _SOURCES:
        source = logging.getLogger(name)
        source.addHandler(handler)
        source.setLevel(level)
        source.propagate = False
    logging.getLogger("matplotlib").setLevel(logging.WARNING)


def say(messages: Iterable[str]) -> None:
    """Log one line for each message."""
    for message in messages:
        logger.info("%s", message)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Import fast, without the deprecation warnings of paddlenlp's pinned dependencies."""
    with runtime.fast_imports(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class RunLog:
    """Appends one JSON object per line, and forgets steps that a resumed run will repeat."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / LOG_FILE

    def rewind(self, step: int) -> None:
        """Drop records after ``step``, and a line that a killed process left half-written."""
        kept = [record for record in read_log(self.path) if record["step"] <= step]
        jsonl.write(self.path, kept)

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; flushed, so that a killed run keeps what it logged."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, without a last line that was cut off."""
    if not path.is_file():
        return []
    records = []
    for _, record in jsonl.scan(path):
        if not isinstance(record, dict):
            break
        records.append(record)
    return records


def draw_loss_curve(log: Path, target: Path, unit: str = "nats per token") -> bool:
    """Draw training and evaluation loss over steps as a PNG; False when nothing was logged yet."""
    with quiet_import():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    records = read_log(log)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    series = (("loss", "training", "-"), ("eval_loss", "validation", "o-"))
    drawn = False
    for key, label, style in series:
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            shown = style if len(points) > 1 else "o"  # a line through one point is invisible
            axes.plot(*zip(*points, strict=True), shown, label=label, markersize=4)
            drawn = True
    if not drawn:
        return False
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(target) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))  # type: ignore[no-untyped-call]
    return True
