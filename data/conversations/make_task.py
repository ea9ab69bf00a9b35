"""Make a small task with one clear rule, at which a tiny model succeeds after a minute.

    python -m data.conversations.make_task --name keyword --output_dir tasks/keyword

writes train.jsonl and dev.jsonl in the alpaca format. No sentence of dev is in train, so a score on
dev shows that the rule was learnt.
"""

from common.ending import run_script  # isort: split

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import jsonl
from common.errors import DataError, check_integer
from common.flags import arg, load
from data.conversations.instruct_formats import nearest
from data.conversations.record_files import Record

# Draws in a row that gave nothing new, after which a task counts as used up.
MOST_REPEATED = 100

KINDS = {
    "animal": ("horse", "goat", "otter", "crow", "trout", "beetle", "hare", "swan"),
    "plant": ("birch", "fern", "nettle", "clover", "willow", "reed", "moss", "thistle"),
    "tool": ("hammer", "chisel", "wrench", "drill", "spade", "pliers", "rasp", "awl"),
    "food": ("soup", "bread", "cheese", "noodles", "porridge", "pickles", "butter", "cake"),
}
NAMES = ("Mara", "Piet", "Ines", "Olav", "Rosa", "Tomek", "Yara", "Hugo", "Lena", "Idris")
VERBS = ("saw", "found", "drew", "bought", "described", "forgot", "wanted", "remembered")
PLACES = (
    "by the river",
    "at the market",
    "behind the house",
    "on the hill",
    "in the yard",
    "near the bridge",
    "after work",
    "on Sunday",
)
WORDS = (
    *("stone", "lamp", "river", "green", "seven", "paper", "window", "quiet", "north", "apple"),
    *("copper", "morning", "letter", "garden", "silver", "bridge", "winter", "yellow", "ladder"),
    *("button", "harbour", "pencil", "mirror", "candle"),
)


def _keyword(choice: random.Random) -> tuple[str, str]:
    kind = choice.choice(sorted(KINDS))
    word = choice.choice(KINDS[kind])
    sentence = f"{choice.choice(NAMES)} {choice.choice(VERBS)} the {word} {choice.choice(PLACES)}."
    return sentence, kind


def _kinds(choice: random.Random) -> tuple[str, str]:
    kind = choice.choice(sorted(KINDS))
    return " ".join(choice.sample(KINDS[kind], choice.randint(3, 5))), kind


def _words(choice: random.Random) -> list[str]:
    return choice.sample(WORDS, choice.randint(3, 5))


def _last_word(choice: random.Random) -> tuple[str, str]:
    words = _words(choice)
    return " ".join(words), words[-1]


def _copy(choice: random.Random) -> tuple[str, str]:
    text = " ".join(_words(choice))
    return text, text


def _reverse(choice: random.Random) -> tuple[str, str]:
    words = _words(choice)
    return " ".join(words), " ".join(reversed(words))


# Name to what is asked, and what makes a question's text and its answer.
RULES: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "keyword": ("Is this about an animal, a plant, a tool or food?", _keyword),
    "kinds": ("What kind of things are these?", _kinds),
    "last-word": ("Repeat the last word.", _last_word),
    "copy": ("Repeat the words.", _copy),
    "reverse": ("Repeat the words from the last to the first.", _reverse),
}


def make_task(
    name: str, output_dir: str | Path, *, train: int = 2000, dev: int = 100, seed: int = 0
) -> tuple[Path, Path]:
    """Write a task; returns train.jsonl and dev.jsonl. The same arguments give the same bytes.

    Args:
        name: keyword (what kind of thing a sentence names), kinds (what several words have in
            common), last-word, copy or reverse.
        output_dir: created when absent.
        train, dev: examples of each part, all of them different.
        seed: of the choice of examples.

    Raises:
        DataError: an unknown name, more examples than the rule has, or files with other contents.
    """
    if name not in RULES:
        raise DataError(f"unknown task {name!r}{nearest(name, RULES)}: choose {', '.join(RULES)}")
    check_integer("train", train, least=1)
    check_integer("dev", dev, least=1)
    check_integer("seed", seed, least=0)
    instruction, rule = RULES[name]
    choice = random.Random(f"{name} {seed}")
    found: dict[str, Record] = {}
    repeated = 0
    while len(found) < train + dev:
        text, answer = rule(choice)
        repeated = repeated + 1 if text in found else 0
        if repeated > MOST_REPEATED:
            raise DataError(
                f"the task {name} has hardly more than {len(found)} different examples, "
                f"{train + dev} were asked for: lower train or dev"
            )
        found[text] = {"instruction": instruction, "input": text, "output": answer}
    rows = list(found.values())
    place = Path(output_dir)
    parts = {"train.jsonl": rows[:train], "dev.jsonl": rows[train:]}
    for file, part in parts.items():
        _check_same(place / file, part)
    train_path, dev_path = (jsonl.write(place / name, part) for name, part in parts.items())
    return train_path, dev_path


def _check_same(path: Path, rows: Sequence[Record]) -> None:
    """Refuse to replace what this task would not write again."""
    if not path.exists():
        return
    try:
        same = [row for _, row in jsonl.read(path)] == list(rows)
    except DataError:
        same = False
    if not same:
        raise DataError(f"{path} holds something else already: choose another output_dir")


@dataclass
class TaskArguments:
    """Which task, of how many examples, and where it goes."""

    name: str = arg("", "the rule", choices=tuple(RULES), required=True)
    output_dir: str = arg("", "where train.jsonl and dev.jsonl go", required=True)
    train: int = arg(2000, "examples to train on", minimum=1)
    dev: int = arg(100, "held-out examples", minimum=1)
    seed: int = arg(0, "of the choice of examples", minimum=0)


def main(words: Sequence[str] | None = None) -> None:
    """Read flags, make the task, and say where it lies."""
    (args,) = load(
        (TaskArguments,),
        words,
        prog="python -m data.conversations.make_task",
        description="Make a small task with one clear rule, at which a tiny model succeeds.",
    )
    paths = make_task(args.name, args.output_dir, train=args.train, dev=args.dev, seed=args.seed)
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    run_script(main)
