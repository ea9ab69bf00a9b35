"""Runs a script of the suite on the rehearsal device, on one process or several.

    python -m tests.device.run --role gpu --ranks 2 run_pretrain.py --device gpu ...

``-- -m MODULE`` in place of the script runs a module. Every rank's output is preceded by its
number; the exit status is the first that is not 0.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from typing import IO

from tests.device import build, rehearsal
from tests.distributed.rank_server import free_port, rank_environment


def _repeat(rank: int, lines: IO[str]) -> None:
    for line in lines:
        print(f"[{rank}] {line}", end="", flush=True)


def launch(role: str, ranks: int, words: list[str]) -> int:
    """Start the ranks, one device each, and wait; return the first exit status that is not 0.

    Args:
        role: one of :data:`rehearsal.ROLES`.
        ranks: number of processes.
        words: the script and its arguments.
    """
    ports = [free_port() for _ in range(ranks + 1)]
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir="/dev/shm") as shared:
        processes, readers = [], []
        for rank in range(ranks):
            told = rank_environment(rank, ports) | rehearsal.rank_environment() if ranks > 1 else {}
            told |= rehearsal.environment(role) | {"REHEARSAL_SHM": shared}
            process = subprocess.Popen(
                [sys.executable, *words],
                env=os.environ | told,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            processes.append(process)
            readers.append(threading.Thread(target=_repeat, args=(rank, process.stdout)))
            readers[-1].start()
        statuses = [process.wait() for process in processes]
        for reader in readers:
            reader.join()
    return next((status for status in statuses if status), 0)


def main() -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--role", choices=rehearsal.ROLES, default="gpu")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script and its arguments")
    arguments = parser.parse_args()
    if arguments.script[:1] == ["--"]:  # before -m, which argparse would take for its own
        del arguments.script[0]
    if not arguments.script:
        parser.error("no script was named")
    if not build.is_current():
        parser.error("the rehearsal device is not built from these sources: `make device`")
    return launch(arguments.role, arguments.ranks, arguments.script)


if __name__ == "__main__":
    sys.exit(main())
