"""Fixtures of tests on the rehearsal device: functions and scripts in forks, in either role."""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.device import build, rehearsal
from tests.distributed.rank_server import RankServer


class Device:
    """Ranks with the rehearsal device, each a fork of a server that has imported paddle."""

    def __init__(self) -> None:
        self._shared = tempfile.mkdtemp(prefix="rehearsal-", dir="/dev/shm")
        self.server = RankServer(rehearsal.environment() | {"REHEARSAL_SHM": self._shared})

    def call(
        self, role: str, target: str, *arguments: Any, ranks: int = 1, **options: Any
    ) -> list[Any]:
        """Call ``module:function`` in the role ``gpu`` or ``itself``; each rank's returned value.

        Args:
            role: one of :data:`tests.device.rehearsal.ROLES`.
            target: the module as it is imported, ``tests.device.jobs_kernels:NAME``.
            arguments: JSON-able arguments, the same for every rank.
            ranks: number of processes, each of which has one device.
            options: ``timeout`` and ``environment`` of the rank server.

        Raises:
            RankError: a rank failed or was late; with each rank's last lines of output.
        """
        return self._run("call", role, target, list(arguments), ranks=ranks, **options)

    def script(
        self,
        role: str,
        name: str,
        words: list[Any],
        ranks: int = 1,
        before: str | None = None,
        **options: Any,
    ) -> None:
        """Run a script of the suite, such as ``run_pretrain``, as ``call`` runs a function.

        Args:
            role: as for ``call``.
            name: of the script, without its ending.
            words: flags and values.
            ranks: number of processes.
            before: ``module:function`` that every rank calls first, to break something.
            options: as for ``call``.
        """
        line = [str(word) for word in words]
        self._run("run_script", role, name, line, before, ranks=ranks, **options)

    def _run(self, job: str, *arguments: Any, ranks: int, **options: Any) -> list[Any]:
        environment = rehearsal.rank_environment() | options.pop("environment", {})
        target = f"tests.device.jobs_device:{job}"
        return self.server(ranks, target, *arguments, environment=environment, **options)

    def close(self) -> None:
        """End the server, and remove what killed ranks left in shared memory."""
        self.server.close()
        shutil.rmtree(self._shared, ignore_errors=True)


@pytest.fixture(scope="session")
def device() -> Iterator[Device]:
    """The rehearsal device; tests skip where it is not built."""
    if not build.is_current():
        pytest.skip("the rehearsal device is not built from these sources: `make device`")
    made = Device()
    yield made
    made.close()


@pytest.fixture(scope="session")
def training_device(device: Device) -> Device:
    """The device, with the slow imports of training done."""
    device.server.preload(
        "paddlenlp_ext.trainer", "matplotlib.backends.backend_agg", "matplotlib.figure"
    )
    return device
