"""Ranks with the rehearsal device as forks of one server, which has imported paddle."""

import shutil
import tempfile
from typing import Any

from tests.device import rehearsal
from tests.distributed.rank_server import RankServer

# Slow imports of training.
TRAINING = ("paddlenlp_ext.trainer", "matplotlib.backends.backend_agg", "matplotlib.figure")


class Device:
    """Ranks with the rehearsal device, each a fork of a server that has imported paddle."""

    def __init__(self) -> None:
        self._shared = tempfile.mkdtemp(prefix="rehearsal-", dir="/dev/shm")
        # The server prepares itself as for CPUs, which a device would not (llm.runtime.prepare).
        flags = {"FLAGS_use_stride_kernel": "1", "REHEARSAL_SHM": self._shared}
        flags["REHEARSAL_DEVICES"] = "2"  # of each process, for gpu:1
        self.server = RankServer(rehearsal.environment() | flags)

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
