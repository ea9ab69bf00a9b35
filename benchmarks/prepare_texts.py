"""Texts that benchmarks of tokenizing encode: English, code, Chinese, and all of them mixed."""

import inspect
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from data.corpus.readers import WikiText

DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
SHORTEST = 200
_TAG = re.compile(r"<[^>]*>")
_CHINESE = re.compile(r"[\u3400-\u9fff]")


def python_files() -> Iterator[str]:
    """Sources of the standard library and of the packages installed here, in a fixed order."""
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            yield path.read_text(encoding="utf-8", errors="ignore").replace("\0", "")


def docstrings() -> Iterator[str]:
    """Documentation strings in them: English."""
    for source in python_files():
        for match in DOCSTRING.finditer(source):
            yield inspect.cleandoc(match.group(1))


def web(data: Path) -> Iterator[str]:
    """Web pages and WikiText, 1.9 MB, where most words are met for the first time."""
    yield from WikiText().read((data / "wikitext2.valid.txt").read_bytes()).texts
    for line in (data / "c4_300docs.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]


def chinese(directory: Path) -> Iterator[str]:
    """Chinese lines of each file below a directory, without tags: a document a file."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            text = _TAG.sub("", path.read_bytes().decode("utf-8", "ignore")).replace("\0", "")
            lines = (line.strip() for line in text.splitlines())
            yield "\n".join(line for line in lines if len(_CHINESE.findall(line)) * 2 > len(line))


def limited(texts: Iterable[str], size: int) -> list[str]:
    """Different texts that are not short, about `size` bytes in all."""
    seen: dict[str, None] = {}
    held = 0
    for text in texts:
        if held >= size:
            break
        if len(text) >= SHORTEST and text not in seen:
            seen[text] = None
            held += len(text.encode("utf-8", "ignore"))
    return [text.encode("utf-8", "ignore").decode() for text in seen]


def corpora(data: Path, chinese_at: Path | None, size: int) -> dict[str, list[str]]:
    """Corpora by name, of about `size` bytes, Chinese of half of it; those that there are.

    Args:
        data: directory with c4_300docs.jsonl and wikitext2.valid.txt.
        chinese_at: directory with Chinese text.
        size: in bytes.
    """
    found = {"english": limited(docstrings(), size), "code": limited(python_files(), size)}
    if (data / "c4_300docs.jsonl").is_file():
        found["web"] = limited(web(data), size)
    if chinese_at is not None:
        found["chinese"] = limited(chinese(chinese_at), size // 2)
    rounds = zip_longest(*found.values(), fillvalue="")
    found["mixed"] = limited((text for row in rounds for text in row), size)
    return found


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """One {"text": ...} a line."""
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path
