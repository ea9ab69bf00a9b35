"""What an operator's files say, read before anything is served, and read again on SIGHUP."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from llm.config.serving import ServerArguments
from llm.serving.access_log import AccessLog
from llm.serving.keys import Keys
from llm.serving.tls import Tls


class OperatorFiles:
    """Keys, the access log, and what TLS needs.

    Args:
        arguments: name them.

    Raises:
        DataError: a wrong file of keys, or a log that cannot be written.
        UserError: the directory of adapters is none; a bad file of TLS.
    """

    def __init__(self, arguments: ServerArguments) -> None:
        path, directory = arguments.api_keys, arguments.adapter_dir
        if directory is not None and not Path(directory).is_dir():
            raise UserError(
                f"adapter_dir={directory} is no directory; make it, and put adapters below it"
            )
        self.keys = Keys(path, arguments.key)
        log = arguments.access_log
        self.access_log = None if log is None else AccessLog(log, texts=arguments.log_texts)
        self.tls = _tls(arguments)

    @property
    def may_change(self) -> bool:
        """Whether there is anything to read or to open again."""
        return any(one is not None for one in (self.keys.path, self.access_log, self.tls))

    def reload(self) -> None:
        """Read keys and certificates again, and open the log again, which may have been moved."""
        if self.keys.path is not None:
            self.keys.reload()
        if self.tls is not None:
            self.tls.reload()
        if self.access_log is not None:
            self.access_log.reopen()


def _tls(arguments: ServerArguments) -> Tls | None:
    if arguments.ssl_certfile is None:
        return None
    return Tls(
        arguments.ssl_certfile,
        arguments.ssl_keyfile,
        ca_certs=arguments.ssl_ca_certs,
        crl=arguments.ssl_crl,
    )


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


@contextmanager
def hearing_hangup(files: OperatorFiles) -> Iterator[list[Callable[[], None]]]:
    """Do what is put into the list at each SIGHUP within the block.

    Where no file may change SIGHUP ends the process as usual, if it can only say that the terminal
    was closed; `systemctl reload` of a server without such files does nothing.

    Args:
        files: of the operator.
    """
    acts: list[Callable[[], None]] = []
    if not files.may_change and _has_terminal():
        yield acts
        return

    def hear(*_: object) -> None:
        for act in acts:
            act()

    before = signal.signal(signal.SIGHUP, hear)
    try:
        yield acts
    finally:
        signal.signal(signal.SIGHUP, before)
