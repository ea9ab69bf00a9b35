"""Which engines bench_generation.py and bench_engine.py compare with, and what starts them."""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from interleave import Worker
from record import ROOT

HERE = ROOT / "benchmarks"
KINDS = ("bfloat16", "int8", "int4")


@dataclass(frozen=True)
class Peer:
    """An engine in an environment of its own.

    Args:
        name: of its column.
        place: of the environment, from the project's root.
        module: what is there when it is installed.
        files: by kind of weights, what it opens (``generation_models.py``).
        make: the target that installs it.
    """

    name: str
    place: str
    module: str
    files: dict[str, str]
    make: str

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(ROOT / self.place / "bin" / "python")

    @property
    def version(self) -> str | None:
        """Its version; None where it is not installed."""
        if not Path(self.python).exists():
            return None
        words = [self.python, "-c", _VERSION, self.module]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None

    def command(self, directory: Path, kind: str, threads: int, *how: str) -> list[str]:
        """Return the command of a worker."""
        script = HERE / f"generation_{self.name.replace('.', '').lower()}.py"
        words = [self.python, script, directory / self.files[kind], threads, *how]
        return [*map(str, words), str(directory / f"{self.name}-{kind}.npy")]


_VERSION = """
import sys
from importlib import metadata
names = metadata.packages_distributions().get(sys.argv[1], [])
print(*(metadata.version(name) for name in names[:1]))
"""

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "llama.cpp",
            ".venv-peers",
            "llama_cpp",
            {"bfloat16": "bf16.gguf", "int8": "q8_0.gguf", "int4": "q4_0.gguf"},
            ".venv-peers/.bench",
        ),
        Peer(
            "OpenVINO",
            ".venv-openvino",
            "openvino_genai",
            {kind: f"openvino-{kind}" for kind in KINDS},
            ".venv-openvino/.done",
        ),
        Peer(
            "vLLM",
            ".venv-vllm",
            "vllm",
            {"bfloat16": "hf", "int8": "int8", "int4": "int4-w"},
            ".venv-vllm/.done",
        ),
    )
}


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return versions of the peers that are there, and say which are not."""
    found = {}
    for name in names:
        version = PEERS[name].version
        if version is None:
            print(f"{name} is left out: it is not installed (make {PEERS[name].make})")
        else:
            found[name] = version
    return found


def write_models(shape: str, directory: Path, kinds: Iterable[str], peers: Iterable[str]) -> None:
    """Write what is not there yet, each in a process that then frees its memory."""
    kinds, ours = list(kinds), sys.executable
    wanted = {"hf": ours} | {kind: ours for kind in kinds if kind != "bfloat16"}
    for name in peers:
        peer = PEERS[name]
        if name == "llama.cpp":
            wanted[peer.files["bfloat16"]] = peer.python  # the others are made of it
        for kind in kinds:
            wanted.setdefault(peer.files[kind], ours if name == "vLLM" else peer.python)
    directory.mkdir(parents=True, exist_ok=True)
    for name, python in wanted.items():
        if not (directory / name).exists():
            print(f"writing {name} of {shape} ...", file=sys.stderr, flush=True)
            words = [python, str(HERE / "generation_models.py"), name, shape, str(directory)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"writing {name} failed:\n{done.stderr[-2000:]}")


def start(name: str, command: list[str], threads: int, log: Path) -> Worker | None:
    """Start an engine; None, and a line that says so, where a peer does not start here."""
    own = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    try:
        return Worker(name, command, own | {"HF_HUB_OFFLINE": "1"}, log)
    except SystemExit as error:
        if name.split(maxsplit=1)[0] not in PEERS:
            raise
        print(f"{name} is left out: {error}", flush=True)
        return None
