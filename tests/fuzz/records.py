"""Record readers: random files beside a second reader that is as plain as can be.

The text that is learnt of a record (ids decoded where the mask is on), and the whole text before
it, have to be what `record_reading` says; or the suite refuses the record. A record made without
faults has to be taken.
"""

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError
from data.conversations.instruct import read_examples
from data.conversations.instruct_dataset import InstructDataset
from data.conversations.preference import PreferenceDataset, read_pairs
from data.corpus.readers import BOM, detect_format, make_reader
from data.tokenizer import Tokenizer, load_tokenizer
from tests.fuzz import Tally, budget
from tests.fuzz.record_cases import Case, make_case
from tests.fuzz.record_reading import Reading, Refused, kind_of, read, read_pair
from tests.unit.data.records import TOOLS

# By the names of records, what is learnt of them; None where the second reader refuses.
Said = dict[str, Any]


def expected(case: Case) -> Said:
    """What the second reader makes of every record of a file."""
    kind, found = "", {}
    for name, record in zip(case.names, case.records, strict=True):
        try:
            if not isinstance(record, dict):
                raise Refused
            if case.kind == "pair":
                found[name] = read_pair(record)
                continue
            kind = kind or kind_of(record)
            found[name] = read(record, kind)
        except (Refused, KeyError, TypeError, AttributeError, IndexError):
            found[name] = None
    return found


def ours(case: Case, tokenizer: Tokenizer) -> Said:
    """What the suite learns of the records that it takes, by name; the others are left out.

    Raises:
        DataError: the file cannot be used at all.
    """
    if case.kind == "pair":
        pairs = PreferenceDataset(read_pairs([case.path], on_bad="skip"), tokenizer, on_bad="skip")
        sides = pairs.chosen, pairs.rejected
        return {
            pair.name: tuple(reading(side, n, tokenizer) for side in sides)
            for n, pair in enumerate(pairs.pairs)
        }
    examples = read_examples([case.path], on_bad="skip")
    dataset = InstructDataset.from_examples(examples, tokenizer, bad=[])
    return {
        example.name: reading(dataset, n, tokenizer) for n, example in enumerate(dataset.examples)
    }


def reading(dataset: InstructDataset, number: int, tokenizer: Tokenizer) -> Reading:
    """The text of an example, and of its runs of labels."""
    ids, mask = dataset.document(number)
    runs = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
    texts = [tokenizer.decode(run) for run in runs]
    return Reading(tokenizer.decode(ids), tuple(texts[bool(not mask[0]) :: 2]))


def alike(one: Any, other: Any) -> bool:
    """Whether two readings are the same but for white space beside what templates write."""
    if isinstance(one, tuple):
        return all(map(alike, one, other))
    same = [text.strip() for text in one.learnt] == [text.strip() for text in other.learnt]
    return same and "".join(one.whole.split()) == "".join(other.whole.split())


def written(record: Any) -> str:
    """The text of a document; `Refused` where it is none."""
    value = record.get("text") if isinstance(record, dict) else None
    if not isinstance(value, str) or "\0" in value:
        raise Refused
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused from None
    return value


def check_texts(case: Case, seed: int, tally: Tally) -> None:
    """Compare documents for pretraining, read whole and in two pieces, with what was written."""
    good, bad = [], 0
    for record in case.records:
        try:
            good.append(written(record))
        except Refused:
            bad += 1
    good = [text for text in good if text.strip()]
    reader = make_reader(detect_format(case.path), json_key="text", txt_documents="file")
    content = case.path.read_bytes().removeprefix(BOM)
    with case.path.open("rb") as file:
        mark = case.path.stat().st_size - len(content)
        cut = max(reader.next_start(file, len(content) // 2) - mark, 0)
    for pieces in ([content], [content[:cut], content[cut:]]):
        found = [reader.read(piece) for piece in pieces if piece]
        texts = [text for one in found for text in one.texts]
        refused = sum(len(one.bad) for one in found)
        # A list that is damaged anywhere is refused as a whole.
        if (texts != good or refused != bad) and not (bad and refused and not texts):
            tally.differ(seed, f"{case.path.name}: {texts!r:.300}, expected {good!r:.300}")
            return
    tally.count("equal, bad ones named" if bad else "equal")


def check(case: Case, seed: int, tokenizer: Tokenizer, tally: Tally) -> None:
    """Compare what is learnt of the records of a case."""
    wanted = expected(case)
    try:
        got = ours(case, tokenizer)
    except DataError:
        got = {}
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        tally.differ(seed, f"{case.path.name}: {type(error).__name__}: {error}")
        return
    for name, value in got.items():
        if wanted.get(name) is None or not alike(value, wanted[name]):
            record = case.records[case.names.index(name)] if name in case.names else name
            said = f"{record!r:.600}\n    read as {value!r:.500}\n    not {wanted.get(name)!r:.500}"
            tally.differ(seed, said)
            return
    left = [name for name, value in wanted.items() if value is not None and name not in got]
    if left and all(case.clean):
        tally.differ(seed, f"good records were left out: {left}")
    elif not got:
        tally.count("refused")
    else:
        tally.count("equal" if len(got) == len(wanted) else "equal, others refused")


def main(argv: Sequence[str]) -> int:
    """Fuzz within the budget of the flags."""
    tally = Tally("records")
    logging.disable(logging.WARNING)
    tokenizer = load_tokenizer("__internal_testing__/tiny-random-llama", chat_template=TOOLS)
    with tempfile.TemporaryDirectory() as directory:
        for seed in budget(argv, __doc__ or "").seeds():
            case = make_case(seed, Path(directory))
            if case.kind == "text":
                check_texts(case, seed, tally)
            else:
                check(case, seed, tokenizer, tally)
            case.path.unlink()
    logging.disable(logging.NOTSET)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
