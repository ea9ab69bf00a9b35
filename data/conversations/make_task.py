"""Make a small task with one clear rule, at which a tiny model succeeds after a minute.

    python -m data.conversations.make_task --name keyword --output_dir tasks/keyword

writes train.jsonl and dev.jsonl in the alpaca format. No sentence of dev is in train, so a score on
dev shows that the rule was learnt.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common import jsonl
from common.errors import DataError, check_integer
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
        DataError: an unknown name, or more examples than the rule has.
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
    train_path, dev_path = (jsonl.write(place / name, part) for name, part in parts.items())
    return train_path, dev_path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data.conversations.make_task",
        description="Make a small task with one clear rule, at which a tiny model succeeds.",
        allow_abbrev=False,
    )
    parser.add_argument("--name", required=True, help=", ".join(RULES))
    parser.add_argument("--output_dir", required=True, metavar="DIRECTORY")
    parser.add_argument("--train", type=int, default=2000, help="examples to train on (2000)")
    parser.add_argument("--dev", type=int, default=100, help="held-out examples (100)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        paths = make_task(
            options.name,
            options.output_dir,
            train=options.train,
            dev=options.dev,
            seed=options.seed,
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
