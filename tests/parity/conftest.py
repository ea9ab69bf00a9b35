"""Where the peers' environment is, what it computed, and the table of errors at the end."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ERRORS: pytest.StashKey[dict[tuple[str, str], float]] = pytest.StashKey()
Measured = Callable[[str, str, float], float]


@pytest.fixture(scope="session")
def peer(repo: Path) -> Callable[..., None]:
    """Run a command of a peer-side module; skips where `make parity` did not start the tests."""
    chosen = os.environ.get("PEERS_PYTHON")
    if not chosen:
        pytest.skip("PEERS_PYTHON is not set; `make parity` makes an environment for it")
    python = Path(chosen)
    if not python.is_file():
        pytest.fail(f"PEERS_PYTHON={chosen} is not a file")
    # Settings that this process made for paddle are not the peer's.
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(repo)}

    def run(command: str, directory: Path, module: str = "hf_side") -> None:
        result = subprocess.run(
            [python.absolute(), "-m", f"tests.parity.{module}", command, directory],
            cwd=repo,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-4000:]

    return run


@pytest.fixture(scope="session")
def roots(
    request: pytest.FixtureRequest, repo: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return where the models and answers of a kind of cases lie; live ones are made on demand."""
    made: dict[str, Path] = {"reference": repo / "tests" / "parity" / "reference"}

    def root(kind: str) -> Path:
        if kind not in made:
            run = request.getfixturevalue("peer")
            directory = tmp_path_factory.mktemp(kind)
            run("write", directory)
            made[kind] = directory
        return made[kind]

    return root


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Record an error for the table at the end of the run; the largest one stays."""
    errors = request.config.stash.setdefault(ERRORS, {})

    def record(case: str, what: str, error: float) -> float:
        errors[case, what] = max(error, errors.get((case, what), 0.0))
        return error

    return record


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the largest error of every case."""
    errors = config.stash.get(ERRORS, {})
    if not errors:
        return
    columns = sorted({what for _, what in errors})
    terminalreporter.section("largest errors against transformers")
    terminalreporter.write_line(f"{'':42}" + "".join(f"{what:>18}" for what in columns))
    for case in dict.fromkeys(case for case, _ in errors):
        cells = (errors.get((case, what)) for what in columns)
        row = "".join(f"{'-' if cell is None else f'{cell:.1e}':>18}" for cell in cells)
        terminalreporter.write_line(f"{case:42}{row}")
