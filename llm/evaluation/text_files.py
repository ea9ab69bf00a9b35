"""Text that is measured: of files, or the documentation that comes with Python."""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.errors import UserError
from data.corpus.readers import BOM, detect_format, make_reader

_LEAST = 80  # characters of a documentation string worth reading


def read_texts(path: Path, form: str = "auto") -> tuple[str, list[str]]:
    """Read a file's texts.

    Args:
        path: the file.
        form: txt, jsonl or wikitext; auto decides by the ending, and by the first line of a .txt.

    Returns:
        The form, and at least one text.

    Raises:
        UserError: an unreadable file, an unknown ending, a bad line (by number), or no text.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path} to read text from")
    if form == "auto":
        form = detect_format(path, "Give the file one of these endings")
    hint = "texts are read under that key: rename yours"
    reader = make_reader(form, json_key="text", txt_documents="file", key_hint=hint)
    found = reader.read(path.read_bytes().removeprefix(BOM))
    if found.bad:
        line, reason = found.bad[0]
        raise UserError(f"{path}:{line}: {reason}")
    if not found.texts:
        raise UserError(f"{path} has no text")
    return form, found.texts


def library_modules() -> list[Path]:
    """Return the files of the standard library's modules, in a fixed order."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def documentation(files: Sequence[Path]) -> Iterator[str]:
    """Yield the documentation strings of Python files, but short ones."""
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="ignore"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                found = ast.get_docstring(node)
                if found and len(found) > _LEAST:
                    yield found
