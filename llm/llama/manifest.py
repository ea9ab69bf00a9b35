"""What lies beside an exported program: everything needed to run it without its checkpoint."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_whole
from data.vocabulary import check_origin
from external_ops import native
from llm.llama.config import LlamaConfig

FORMAT_VERSION = 1

# What one step takes beside the caches, in order: name, axes and type of each array. T tokens,
# N sequences, M cache blocks of the longest one, n rows whose logits are wanted.
STEP_ARRAYS = (
    ("ids", "T", "int64"),
    ("sequence", "T", "int32"),
    ("position", "T", "int32"),
    ("block_table", "NM", "int32"),
    ("rows", "n", "int64"),
)


@dataclass(frozen=True)
class Manifest:
    """Shapes, types and identity of one exported program.

    The program takes :data:`STEP_ARRAYS` and per layer a key and a value cache ``[blocks,
    block_size, G, D]``, and returns float32 logits ``[n, vocab_size]``.
    """

    model_name: str
    config: dict[str, Any]
    block_size: int
    max_model_len: int
    cache_dtype: str
    eos_ids: tuple[int, ...]
    tokenizer_fingerprint: str | None
    paddle_version: str
    ops: tuple[str, ...] = ()  # native ops that the program calls
    packed_layout: int = (
        0  # of its weights (external_ops.native.PACKED_LAYOUT); 0 where none are packed
    )
    program_bytes: int = 0
    weights_bytes: int = 0
    packed_bytes: int = 0  # of packed weights beside the program; 0 where they are inside it
    export: str = ""  # of the contents: files of one export belong together
    format_version: int = FORMAT_VERSION

    @property
    def architecture(self) -> LlamaConfig:
        """The network's configuration."""
        return LlamaConfig.from_hf(self.config, "manifest")

    @property
    def dtype(self) -> str:
        """The type of the weights that are not integers."""
        return str(self.config["torch_dtype"])

    @property
    def described(self) -> dict[str, str]:
        """What the header of the packed weights says: which export they belong to."""
        return {"format": "packed", "packed_layout": str(self.packed_layout), "export": self.export}

    def check_tokenizer(self, name: str, fingerprint: str) -> None:
        """Refuse a tokenizer other than the one the program was exported with.

        Raises:
            DataError: the fingerprints differ.
        """
        expected = self.tokenizer_fingerprint
        check_origin(
            f"{self.model_name} was exported",
            fingerprint,
            recorded=expected,
            recorded_name=f"fingerprint {str(expected)[:12]}",
            name=f"{name} ({fingerprint[:12]})",
            fix="export again",
        )

    def check_ops(self) -> None:
        """Register the native ops that the program calls.

        Raises:
            UserError: they are not there, or read another layout of weights.
        """
        if not self.ops:
            return
        if reason := native.reason():
            raise UserError(
                f"{self.model_name} was exported with native ops ({', '.join(self.ops)}), but "
                f"{reason}; or export again with --ops reference"
            )
        if self.packed_layout not in (0, native.PACKED_LAYOUT):
            raise UserError(
                f"{self.model_name} was exported with weights in layout {self.packed_layout}, but "
                f"the native ops read {native.PACKED_LAYOUT}; export again"
            )

    def save(self, file: Path) -> None:
        """Write as JSON, under a temporary name first."""
        write_whole(file, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def program_files(model_dir: str | Path, prefix: str) -> tuple[Path, Path, Path]:
    """Return where program, weights and manifest of an export lie."""
    directory = Path(model_dir)
    return (
        directory / f"{prefix}.json",
        directory / f"{prefix}.pdiparams",
        directory / f"{prefix}.manifest.json",
    )


def packed_file(model_dir: str | Path, prefix: str) -> Path:
    """Return where the packed weights of an export lie, if it has some."""
    return Path(model_dir) / f"{prefix}.packed"


def load_manifest(model_dir: str | Path, prefix: str) -> Manifest:
    """Read a manifest and check that program and weights beside it are whole.

    Raises:
        UserError: a missing, damaged, truncated or foreign export.
    """
    directory = Path(model_dir)
    if not directory.is_dir():
        raise UserError(
            f"model_dir {directory} does not exist; export_generation_model.py makes it"
        )
    program, weights, file = program_files(directory, prefix)
    if not file.is_file():
        found = sorted(
            p.name.removesuffix(".manifest.json") for p in directory.glob("*.manifest.json")
        )
        hint = f"; it holds {', '.join(found)}" if found else ""
        raise UserError(f"{directory} has no export named {prefix!r} ({file.name}){hint}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{file}: format_version={version}, but {FORMAT_VERSION} is needed; export again"
            )
        raw["eos_ids"], raw["ops"] = tuple(raw["eos_ids"]), tuple(raw["ops"])
        manifest = Manifest(**raw)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); export again") from error
    for part, expected in (
        (program, manifest.program_bytes),
        (weights, manifest.weights_bytes),
        (packed_file(directory, prefix), manifest.packed_bytes),
    ):
        if expected == 0:
            continue
        if not part.is_file():
            raise UserError(f"{part} is missing; export again")
        if part.stat().st_size != expected:
            raise UserError(
                f"{part} has {part.stat().st_size} bytes, the manifest says {expected}; the export "
                "is cut off or mixed with another; export again"
            )
    return manifest
