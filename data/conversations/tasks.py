"""Where the data of a finetuning task lies: the small samples that ship, or files of one's own."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import DataError
from data.conversations.instruct_formats import nearest
from data.conversations.instruct_store import is_store
from data.conversations.record_files import SUFFIXES

SAMPLES = Path(__file__).parents[1] / "assets" / "samples"
# Task name to the format of its files; each has a directory of that name in SAMPLES.
TASKS = {"squad": "squad", "alpaca": "alpaca", "preference": "preference"}
# Names of the part to evaluate on; the first that is there is taken.
DEV_NAMES = ("dev", "validation", "valid", "eval", "test")


@dataclass(frozen=True)
class TaskFiles:
    """The data of a task.

    Attributes:
        train: files of examples, or the prefix of one prepared store.
        dev: the same for evaluation; empty where there is none.
        built_in: whether it is a sample that ships: enough to try a command, not to learn.
        format: for `read_examples`, or "preference" (`data.conversations.preference.read_pairs`).
    """

    train: list[Path]
    dev: list[Path] = field(default_factory=list)
    built_in: bool = False
    format: str = "auto"


def find_task(
    task_name: str | None,
    data_name: str | None = None,
    dataset_path: str | Path | None = None,
    dev_path: str | Path | None = None,
) -> TaskFiles:
    """The files of a task.

    Args:
        task_name: one of `TASKS`; with `dataset_path` any name will do.
        data_name: a directory inside `dataset_path`, where that holds several data sets.
        dataset_path: a file (then there is no dev part), a directory with train.* and dev.*,
            validation.*, valid.*, eval.* or test.* (also train-v1.1.json or
            train-00000-of-00002.parquet, or directories train and dev of such files), or the
            prefix of a prepared store, or a directory with the stores train and dev.
        dev_path: what to evaluate on, a file or the prefix of a store, instead of what lies there.

    Raises:
        DataError: an unknown task, nothing there, or files of which it is not clear what they are.
    """
    if dataset_path is None:
        return _sample(task_name, data_name)
    place = Path(dataset_path)
    format = "preference" if TASKS.get(task_name or "") == "preference" else "auto"
    if data_name is not None:
        place = _inside(place, data_name)
    dev = [] if dev_path is None else [_exists(Path(dev_path), "dev_dataset_path")]
    if place.is_dir() and not is_store(place):
        found = _directory(place, format)
        return replace(found, dev=dev or found.dev)
    return TaskFiles([_exists(place, "dataset_path")], dev, format=format)


def _exists(place: Path, flag: str) -> Path:
    """`place`, unless neither a file nor a store is there."""
    if place.is_file() or is_store(place):
        return place
    if place.is_dir():
        raise DataError(f"{flag} {place} is a directory; give a file or a prepared store")
    raise DataError(
        f"nothing is at {flag} {place}: neither a file, a directory nor a prepared store"
    )


def calibration_files(dataset_path: str | Path) -> list[Path]:
    """The files of examples that quantization looks at: a directory's quant.*, else its train.*.

    Raises:
        DataError: as `find_task`.
    """
    place = Path(dataset_path)
    own = _part(place, "quant") if place.is_dir() else []
    return own or find_task(None, dataset_path=place).train


def _sample(task_name: str | None, data_name: str | None) -> TaskFiles:
    known = ", ".join(TASKS)
    if task_name is None:
        raise DataError(f"say what to train on: a task_name ({known}) or a dataset_path")
    if task_name not in TASKS:
        raise DataError(
            f"unknown task_name {task_name!r}{nearest(task_name, TASKS)}: samples ship of {known}; "
            "for data of your own give dataset_path"
        )
    if data_name is not None:
        raise DataError(
            f"the sample of {task_name} has no part named {data_name!r}: leave data_name out, or "
            "give the dataset_path that it lies in"
        )
    found = _directory(SAMPLES / task_name, TASKS[task_name])
    return TaskFiles(found.train, found.dev, built_in=True, format=TASKS[task_name])


def _inside(place: Path, data_name: str) -> Path:
    if not place.is_dir():
        raise DataError(
            f"data_name {data_name!r} names a directory inside dataset_path, but {place} is no "
            "directory"
        )
    inside = place / data_name
    if not inside.is_dir():
        names = sorted(path.name for path in place.iterdir() if path.is_dir())
        raise DataError(
            f"{place} has no directory {data_name!r}{nearest(data_name, names)}; it has "
            f"{', '.join(names) or 'none'}"
        )
    return inside


def _directory(place: Path, format: str) -> TaskFiles:
    train = _part(place, "train")
    dev = next((files for name in DEV_NAMES if (files := _part(place, name))), [])
    if train:
        return TaskFiles(train, dev, format=format)
    names = sorted(path.name for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if len(names) == 1 and not dev:
        return TaskFiles([place / names[0]], format=format)
    raise DataError(
        f"{place} has no file train.* ({', '.join(SUFFIXES)}) and no prepared store train; it has "
        f"{', '.join(names[:8]) or 'no data file'}"
    )


def _part(place: Path, name: str) -> list[Path]:
    """The files of a part, or the prefix of its store; [] for neither.

    Raises:
        DataError: several that could each be the whole part.
    """
    files = sorted(
        path
        for path in place.glob(f"{name}*")
        if path.suffix.lower() in SUFFIXES
        and path.name[len(name)] in ".-_"
        and not path.name.endswith((".examples.jsonl", ".meta.json"))  # parts of a store
    )
    inside = sorted(path for path in place.glob(f"{name}/*") if path.suffix.lower() in SUFFIXES)
    if inside and files:
        raise DataError(
            f"{place} has its part {name!r} twice, as {files[0].name} and as the directory "
            f"{name}: name one of them with dataset_path, or move the other away"
        )
    files = files or inside
    whole = [path for path in files if path.stem == name]
    if is_store(place / name):
        whole.insert(0, place / name)
    if len(whole) > 1 or (whole and len(files) > len(whole)):
        names = ", ".join(path.name for path in dict.fromkeys([*whole, *files]))
        raise DataError(
            f"{place} has several things that may be its part {name!r} ({names}): name one of them "
            "with dataset_path, or move the others away"
        )
    return whole or files
