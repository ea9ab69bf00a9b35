"""TLS of the server: its certificate, and whose clients it takes; read again while it runs."""

import logging
import ssl
from pathlib import Path

from common.errors import UserError

logger = logging.getLogger(__name__)


class Tls:
    """What TLS needs, as the files say it now.

    With a certificate authority, clients need a certificate that it has signed; with a list of
    revoked ones, none that is on it.

    Args:
        certfile: the server's certificate in PEM.
        keyfile: its private key, where it lies in another file.
        ca_certs: authorities of clients.
        crl: clients' certificates that are revoked.

    Raises:
        UserError: a file that is not there or cannot be used; names the flag and the file.
    """

    def __init__(
        self,
        certfile: str,
        keyfile: str | None = None,
        *,
        ca_certs: str | None = None,
        crl: str | None = None,
    ) -> None:
        self._certfile, self._keyfile = certfile, keyfile
        self._trusted = {"ssl_ca_certs": ca_certs, "ssl_crl": crl}
        self._now = self.context = self._read()
        self.follow(self.context)

    def follow(self, context: ssl.SSLContext) -> None:
        """Have each new connection of a context that listens go by what the files say now.

        Such a context cannot be replaced, and gives up nothing that it has taken in; but each
        handshake may go on with another, whether the client names a server or not.
        """

        def choose(one: ssl.SSLObject | ssl.SSLSocket, name: str | None, given: object) -> None:
            one.context = self._now

        context.sni_callback = choose

    def reload(self) -> None:
        """Read the files again; wrong ones change nothing. Connections that are open go on."""
        try:
            self._now = self._read()
        except UserError as error:
            logger.error("TLS stays as it was: %s", error)
            return
        logger.info("the files of TLS were read again; new connections go by them")

    def _read(self) -> ssl.SSLContext:
        certificate, key = self._certfile, self._keyfile
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.minimum_version = ssl.TLSVersion.TLSv1_2
        _check("ssl_certfile", certificate, "a certificate in PEM")
        if key is not None:
            _check("ssl_keyfile", key, "the private key in PEM")
        try:
            # A password cannot be asked for: the server may have no terminal.
            found.load_cert_chain(certificate, key, password=lambda: "")
        except (ssl.SSLError, ValueError) as error:
            raise UserError(
                f"ssl_certfile={certificate} and ssl_keyfile={key or certificate} cannot be used: "
                f"{_why(error)}; both are PEM, the key belongs to the first certificate and has no "
                "password"
            ) from error
        for flag, file in self._trusted.items():
            if file is not None:
                _add(found, flag, file)
        return found


def _add(found: ssl.SSLContext, flag: str, file: str) -> None:
    """Take authorities of clients' certificates, or a list of revoked ones."""
    what = "certificates of authorities in PEM" if flag == "ssl_ca_certs" else "a CRL in PEM"
    _check(flag, file, what)
    before = found.cert_store_stats()
    try:
        found.load_verify_locations(file)
    except ssl.SSLError as error:
        raise UserError(f"{flag}={file} cannot be used: {_why(error)}; give {what}") from error
    kind = "x509_ca" if flag == "ssl_ca_certs" else "crl"
    if found.cert_store_stats()[kind] == before[kind]:
        raise UserError(f"{flag}={file} holds none; give {what}")
    found.verify_mode = ssl.CERT_REQUIRED
    # Whoever goes on with a session of before shows no certificate, so that nobody would see that
    # it has expired since, or been revoked. In TLS 1.2 Python has no way to remember none.
    found.minimum_version = ssl.TLSVersion.TLSv1_3
    found.num_tickets = 0
    if flag == "ssl_crl":
        found.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _check(flag: str, file: str, what: str) -> None:
    try:
        Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{flag}={file} cannot be read: {error.strerror}; give {what}") from error


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
